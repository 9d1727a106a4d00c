// Forms from JSON schemas: a control for each property, with labels, bounds and defaults.
import { h, number, prose, t } from "./page.js";

let count = 0;
export const newId = (name) => `f${++count}-${name.replace(/\W+/g, "-")}`;

/** A property with references followed and "or null" taken off. */
function plain(property, defs) {
  if (property.$ref) return { ...defs[property.$ref.split("/").at(-1)], ...property, $ref: undefined };
  const parts = property.anyOf?.filter((part) => part.type !== "null");
  if (parts?.length === 1) return { ...property, ...plain(parts[0], defs), anyOf: undefined, optional: true };
  return property;
}

/**
 * A labelled control around an input.
 *
 * A field has `element`, `value()` (undefined where nothing was chosen), `mark(message)` and `focus()`.
 */
export function field(label, input, { help, extra, value, units } = {}) {
  const id = (input.id ||= newId("field"));
  const fault = h("p", { class: "fault", id: `${id}-fault`, hidden: true });
  const helped = help ? h("p", { class: "help", id: `${id}-help` }, help) : null;
  if (helped) input.setAttribute("aria-describedby", `${id}-help`);
  const element = input.type === "checkbox"
    ? h("div", { class: "field" }, h("div", { class: "check" }, input, h("div", {}, h("label", { for: id }, label), helped)), fault)
    : h("div", { class: "field" }, h("label", { for: id }, label, units ? h("span", { class: "soft" }, ` ${units}`) : null), extra ?? input, helped, fault);
  return {
    element,
    input,
    value: value ?? (() => (input.type === "checkbox" ? input.checked : input.value === "" ? undefined : input.value)),
    mark(message) {
      fault.textContent = message ?? "";
      fault.hidden = !message;
      if (message) {
        input.setAttribute("aria-invalid", "true");
        input.setAttribute("aria-errormessage", fault.id);
      } else input.removeAttribute("aria-invalid");
    },
    focus: () => input.focus(),
  };
}

/** A number, with a slider beside it where there is something to slide along. */
export function slider(label, { low, high, step, value, help, units, name = "number", strict = false, slides = true }) {
  const id = newId(name);
  const input = h("input", { id, type: "number", inputmode: "decimal", step: step === 1 ? 1 : "any", min: strict ? undefined : low, max: high?.strict ? undefined : high?.hard, value: value ?? "", placeholder: value === null ? (/limit/.test(name) ? t("all") : t("by itself")) : undefined });
  const read = () => (input.value === "" ? undefined : Number(input.value));
  if (!slides) return field(label, input, { help, units, value: read });
  const range = h("input", { type: "range", min: strict ? step : low, max: high.soft, step, "aria-label": label });
  range.value = value;
  range.addEventListener("input", () => {
    input.value = Number(Number(range.value).toPrecision(6));
    input.dispatchEvent(new Event("change", { bubbles: true }));
  });
  input.addEventListener("input", () => (range.value = input.value));
  return { ...field(label, input, { help, units, extra: h("div", { class: "slider" }, range, input), value: read }), range };
}

/** A control made from a property of a schema. */
export function control(name, property, { defs = {}, label, help, value: start } = {}) {
  const of = plain(property, defs);
  const value = start ?? of.default;
  const text = label ?? name.replaceAll("_", " ");
  if (of.enum) return choose(text, of.enum.map((one) => [one, one]), { value, help, name });
  if (of.type === "boolean") return field(text, h("input", { id: newId(name), type: "checkbox", checked: value === true }), { help });
  if (of.type === "integer" || of.type === "number") {
    const low = of.minimum ?? of.ge ?? of.exclusiveMinimum ?? of.gt;
    const hard = of.maximum ?? of.le ?? of.exclusiveMaximum ?? of.lt;
    const strict = of.exclusiveMinimum !== undefined || of.gt !== undefined;
    const soft = hard ?? (value > 0 ? 4 * value : 10);
    const whole = of.type === "integer";
    const slides = typeof value === "number" && low !== undefined && !/seed|limit/.test(name);
    const step = whole ? 1 : Number(((soft - low) / 100).toPrecision(2));
    return slider(text, { low: low ?? undefined, high: { soft, hard, strict: of.exclusiveMaximum !== undefined }, step, value: value ?? (of.optional ? null : ""), help: help ?? bounds(low, hard, value), name, strict, slides });
  }
  const input = h("input", { id: newId(name), type: "text", value: Array.isArray(value) ? value.join(", ") : value ?? "", autocomplete: "off", spellcheck: "false" });
  if (of.type === "array") {
    const items = plain(of.items ?? {}, defs);
    const numbers = items.type === "number" || of.prefixItems?.[0]?.type === "number";
    return field(text, input, {
      help,
      value: () => {
        const parts = input.value.split(",").map((part) => part.trim()).filter(Boolean);
        if (!parts.length) return undefined;
        return numbers ? parts.map(fraction) : parts;
      },
    });
  }
  return field(text, input, { help });
}

/** A number, or a fraction such as 8/255. */
function fraction(text) {
  const [above, below] = text.split("/").map(Number);
  const found = below === undefined ? above : above / below;
  return Number.isFinite(found) ? found : text;
}

function bounds(low, high, value) {
  const parts = [];
  if (low !== undefined && high !== undefined) parts.push(t("from {low} to {high}", { low: number(low, 6), high: number(high, 6) }));
  else if (low !== undefined) parts.push(t("at least {low}", { low: number(low, 6) }));
  if (typeof value === "number") parts.push(t("usually {value}", { value: number(value, 6) }));
  return parts.join(", ");
}

/** A choice of one; options are pairs of value and text. */
export function choose(label, options, { value, help, name = "choice", empty } = {}) {
  const select = h("select", { id: newId(name) });
  const fill = (pairs, wanted) => {
    select.replaceChildren(...(empty !== undefined ? [h("option", { value: "" }, empty)] : []), ...pairs.map(([one, text]) => h("option", { value: one }, text)));
    if (wanted !== undefined && pairs.some(([one]) => one === wanted)) select.value = wanted;
  };
  fill(options, value);
  return { ...field(label, select, { help }), select, fill };
}

/** The options of something registered: only those that differ from their defaults are told. */
export function options(schema) {
  const fields = Object.entries(schema?.properties ?? {}).map(([name, property]) => [name, property, control(name, property, { defs: schema.$defs })]);
  return {
    element: fields.length ? h("div", { class: "grid", lang: "en" }, fields.map(([, , made]) => made.element)) : h("p", { class: "soft" }, t("There is nothing to set.")),
    value: () => Object.fromEntries(fields.map(([name, property, made]) => [name, made.value(), property.default]).filter(([, value, usual]) => value !== undefined && value !== usual).map(([name, value]) => [name, value])),
    fields: Object.fromEntries(fields.map(([name, , made]) => [name, made])),
  };
}

/** Several out of a catalogue, each with its options; the value is a list of {name, options}. */
export function several(label, entries, { picked = [], help } = {}) {
  const first = entries.filter(({ name }) => picked.includes(name));
  const rows = [...first, ...entries.filter((entry) => !first.includes(entry))].map((entry) => {
    const id = newId(entry.name);
    const box = h("input", { type: "checkbox", id, checked: picked.includes(entry.name) });
    const place = h("div", { class: "of", hidden: true });
    let made = null;
    const show = () => {
      if (box.checked && Object.keys(entry.options?.properties ?? {}).length) {
        if (!made) {
          made = options(entry.options);
          place.append(h("details", {}, h("summary", {}, t("Options")), h("div", { class: "inside" }, made.element)));
        }
        place.hidden = false;
      } else place.hidden = true;
    };
    box.addEventListener("change", show);
    show();
    return {
      element: h("div", { class: "choice" }, h("div", { class: "check" }, box, h("label", { for: id }, h("b", {}, entry.name), h("span", { class: "help" }, prose(t(entry.summary))))), place),
      box,
      value: () => box.checked && { name: entry.name, options: made?.value() ?? {} },
    };
  });
  const fault = h("p", { class: "fault", hidden: true, role: "alert" });
  const element = h("fieldset", { class: "field" }, h("legend", {}, label), help ? h("p", { class: "help" }, help) : null, h("div", { class: "choices" }, rows.map((row) => row.element)), fault);
  return {
    element,
    value: () => rows.map((row) => row.value()).filter(Boolean),
    mark(message) {
      fault.textContent = message ?? "";
      fault.hidden = !message;
    },
    focus: () => rows[0].box.focus(),
  };
}

const SPAN = { linf: 64, l2: 32, l1: 16 }; // the slider's end, in 255ths for each pixel

/** A norm and a budget: `linf:8/255`, `l2:0.5`. `fit` sets what they are chosen for. */
export function threat({ start = "linf:8/255", free = false } = {}) {
  const [startNorm, startEps = ""] = start.split(":");
  const norm = choose(t("Norm"), [], { name: "norm", help: t("linf: the largest change of a pixel; l2 and l1: all changes together.") });
  const place = h("div");
  const without = field(t("Without a budget: look for the smallest change"), h("input", { type: "checkbox", id: newId("free") }));
  let shape = [1, 28, 28];
  let span = 1;
  let budget = null;
  const last = {};

  function rebuild() {
    const name = norm.select.value;
    const pixels = shape.reduce((all, side) => all * side, 1);
    const whole = name === "linf" && span === 1;
    const end = whole ? SPAN.linf : (span * SPAN[name] / 255) * (name === "l2" ? Math.sqrt(pixels) : name === "l1" ? pixels : 1);
    const step = whole ? 1 : Number((end / 100).toPrecision(1));
    const value = last[name] ?? (whole ? 8 : Number((end / 4).toPrecision(2)));
    budget = slider(t("Budget"), { low: 0, high: { soft: end, hard: whole ? 255 : undefined }, step, value, name: "budget", units: whole ? t("/255 of the range of a pixel") : t("in pixel values from {low} to {high}", { low: 0, high: number(span) }) });
    if (whole) budget.input.step = "any";
    budget.input.addEventListener("change", () => (last[name] = budget.value()));
    budget.input.addEventListener("input", () => (last[name] = budget.value()));
    place.replaceChildren(budget.element);
    toggle();
  }
  function toggle() {
    const off = without.input.checked && !without.element.hidden;
    budget.input.disabled = budget.range.disabled = off;
  }
  norm.select.addEventListener("change", rebuild);
  without.input.addEventListener("change", toggle);
  without.element.hidden = !free;
  const element = h("div", {}, norm.element, place, without.element);
  const [above, below] = startEps.split("/").map(Number);
  if (startNorm === "linf" && startEps) last.linf = below ? (above * 255) / below : above * 255;

  return {
    element,
    fit({ norms = ["linf", "l2", "l1"], shape: sides = shape, span: width = span, minimum = false } = {}) {
      const kept = norm.select.value || startNorm;
      shape = sides;
      if (width !== span) delete last.linf;
      span = width;
      norm.fill(norms.map((name) => [name, name]), norms.includes(kept) ? kept : norms[0]);
      without.element.hidden = !(free && minimum);
      rebuild();
    },
    value() {
      const name = norm.select.value;
      if (without.input.checked && !without.element.hidden) return name;
      const eps = budget.value();
      if (eps === undefined) return undefined;
      return name === "linf" && span === 1 ? `linf:${eps}/255` : `${name}:${eps}`;
    },
    mark: (message) => budget.mark(message),
    focus: () => budget.focus(),
  };
}
