// Curves of what a job tells, drawn as SVG while it runs: one small figure for each value.
import { h, number, t } from "./page.js";

const WIDTH = 320;
const HEIGHT = 130;
const LEFT = 44;
const BOTTOM = 18;
const MOST = 400; // points of a line; of more, every second one goes

const svg = (tag, attributes, ...children) => {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
};

/** Figures in a place. `add(event)` takes an event of a job. */
export function curves(place) {
  const figures = new Map();
  let begun = null;
  let waiting = false;

  function add({ at, stage, values }) {
    begun ??= at;
    if (/^(check|eps sweep)/.test(stage)) return; // other questions than the one of the job
    for (const [name, value] of Object.entries(values ?? {})) {
      if (name === "batch") continue; // how far one batch is
      if (!figures.has(name)) figures.set(name, made(name));
      const figure = figures.get(name);
      if (figure.lines.at(-1)?.stage !== stage) figure.lines.push({ stage, points: [] });
      const line = figure.lines.at(-1);
      line.points.push([at - begun, value]);
      if (line.points.length > MOST) line.points = line.points.filter((_, index) => index % 2 === 0 || index === line.points.length - 1);
      figure.changed = true;
    }
    if (!waiting) {
      waiting = true;
      requestAnimationFrame(() => {
        waiting = false;
        for (const figure of figures.values()) if (figure.changed) draw(figure);
      });
    }
  }

  function made(name) {
    const latest = h("span");
    const picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img" });
    place.append(h("figure", { class: "curve" }, h("h3", {}, h("b", { lang: "en" }, name), latest), picture));
    return { name, latest, picture, lines: [], changed: false };
  }

  return { add, get empty() { return !figures.size; } };
}

function draw(figure) {
  figure.changed = false;
  const points = figure.lines.flatMap((line) => line.points);
  const ys = points.map(([, y]) => y);
  const last = points.at(-1);
  const end = Math.max(points.reduce((most, [x]) => Math.max(most, x), 0), 1e-3);
  let low = Math.min(...ys);
  let high = Math.max(...ys);
  if (low >= 0 && high <= 1) [low, high] = [0, 1]; // shares
  if (low === high) [low, high] = [low - 0.5, high + 0.5];
  const x = (value) => LEFT + (value / end) * (WIDTH - LEFT - 6);
  const y = (value) => 8 + (1 - (value - low) / (high - low)) * (HEIGHT - BOTTOM - 12);
  const told = (value) => number(value, 3);
  const stage = figure.lines.length > 1 ? `${figure.lines.at(-1).stage}: ` : ""; // each attack has images of its own
  figure.latest.textContent = `${stage}${told(last[1])}`;
  figure.picture.setAttribute("aria-label",
    t("{name}: {value} now, between {low} and {high} so far", { name: figure.name, value: told(last[1]), low: told(Math.min(...ys)), high: told(Math.max(...ys)) }));
  figure.picture.replaceChildren(
    ...[low, high].flatMap((value) => [
      svg("line", { class: "axis", x1: LEFT, x2: WIDTH - 6, y1: y(value), y2: y(value) }),
      svg("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, number(value, 2)),
    ]),
    svg("text", { x: LEFT, y: HEIGHT - 2 }, "0 s"),
    svg("text", { x: WIDTH - 6, y: HEIGHT - 2, "text-anchor": "end" }, `${number(end, 2)} s`),
    ...figure.lines.filter(({ points: [point, second] }) => !second).map(({ points: [[a, b]] }) => svg("circle", { cx: x(a), cy: y(b), r: 2.5 })),
    ...figure.lines.map((line, index) =>
      svg("polyline", { class: index % 2 ? "odd" : "", points: line.points.map(([a, b]) => `${x(a).toFixed(1)},${y(b).toFixed(1)}`).join(" ") },
        svg("title", {}, line.stage))),
    svg("circle", { cx: x(last[0]), cy: y(last[1]), r: 3.5 }),
  );
}
