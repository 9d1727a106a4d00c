// One image attacked: what goes in, and what the model makes of what comes out.
import { api, base64, busy, dropZone, h, number, percent, prose, say, showError, t } from "./page.js";
import { options, several, threat } from "./form.js";
import { thumbs } from "./thumbs.js";
import { enlarge } from "./zoom.js";

const $ = (id) => document.getElementById(id);
const asked = new URLSearchParams(location.search);
const form = $("try");
const shown = $("shown");
let image = null; // {file} or {data, split, number, label, source}
let model = null;
let made = null; // options of the attack

const [catalog, { models }, { items: guards }, { items }] = await Promise.all([api("/catalog"), api("/models"), api("/guards"), api("/data")]);
const sets = Object.fromEntries([...items.map(({ id, facts }) => [id, facts]), ["digits", { shape: [1, 8, 8], splits: { train: {}, test: {} } }]]);
const chosenThreat = threat({ free: true });
const defences = several(t("Defences"), catalog.preprocessors, { help: t("Each is tried alone, in front of the model. The attack does not know them.") });
const pictures = thumbs($("thumbs"), { picked: (one) => take({ data: $("data").value, split: splitOf($("data").value), ...one }), small: true });

$("threat").append(chosenThreat.element);
$("defences").append(defences.element);
$("attack").append(...catalog.attacks.map(({ name }) => h("option", { value: name }, name)));
$("attack").value = "fgsm";
if (models.some(({ id }) => id === asked.get("model"))) $("model").value = asked.get("model");
if (sets[asked.get("data")]) $("data").value = asked.get("data");

function splitOf(id) {
  const names = Object.keys(sets[id]?.splits ?? {});
  return names.includes("test") ? "test" : names[0] ?? "all";
}

function take(next) {
  image = next;
  $("drop").querySelector("img")?.remove();
  if (next.file) {
    pictures.forget();
    const url = URL.createObjectURL(next.file);
    const preview = h("img", { src: url, alt: next.file.name });
    preview.addEventListener("load", () => URL.revokeObjectURL(url), { once: true });
    $("drop").append(preview);
    $("label").value = "";
  } else if (fits()) {
    const name = next.name_of_class;
    const at = model.classes.indexOf(name);
    $("label").value = at >= 0 ? String(at) : "";
  }
}

/** Whether the images of the data set are as the model takes them. */
const fits = () => JSON.stringify(sets[image.data]?.shape) === JSON.stringify(model.shape);

function chooseModel() {
  model = models.find(({ id }) => id === $("model").value);
  const [channels, ...sides] = model.shape;
  $("model-help").textContent = t("Takes images of {size}; channels: {channels}, classes: {n}.", { size: sides.join(" × "), channels, n: model.classes.length });
  const names = model.classes.map((name, index) => h("option", { value: index }, name));
  $("label").replaceChildren(h("option", { value: "" }, t("as predicted")), ...names);
  $("target").replaceChildren(h("option", { value: "" }, t("any class")), h("option", { value: "nearest" }, t("the nearest")), h("option", { value: "least-likely" }, t("the least likely")),
    ...model.classes.map((name, index) => h("option", { value: index }, name)));
  const fitting = guards.filter(({ facts }) => JSON.stringify(facts.shape) === JSON.stringify(model.shape));
  $("guard-field").hidden = !fitting.length;
  $("guard").replaceChildren(h("option", { value: "" }, t("none")), ...fitting.map(({ id, name }) => h("option", { value: id }, name)));
  chooseAttack();
  if (image) take(image);
}

function chooseAttack() {
  const attack = catalog.attacks.find(({ name }) => name === $("attack").value);
  $("attack-help").replaceChildren(...prose(t(attack.summary)));
  made = options(attack.options);
  $("options").replaceChildren(made.element);
  chosenThreat.fit({ norms: attack.norms, shape: model.shape, span: model.high - model.low, minimum: attack.minimum });
  $("target").disabled = !attack.targeted;
  if (!attack.targeted) $("target").value = "";
}

async function request() {
  const attack = { name: $("attack").value, options: made.value() };
  const json = { model: model.id, attack, threat: chosenThreat.value(), defences: defences.value() };
  if ($("label").value !== "") json.label = Number($("label").value);
  if ($("target").value !== "") json.target = $("target").value;
  if ($("guard").value) json.guard = $("guard").value;
  if (image.file) json.image = await base64(image.file);
  else if (fits()) Object.assign(json, { data: image.split === "all" ? image.data : `${image.data}:${image.split}`, number: image.number });
  else json.image = await base64(await (await fetch(image.source)).blob()); // brought to size like a file
  return json;
}

function show(trial) {
  const { original, adversarial } = trial.predicted;
  const verdict = !trial.attacked ? t("There was nothing to attack.")
    : trial.success ? t("The attack works: {before} becomes {after}.", { before: original.name, after: adversarial.name })
    : t("The attack does not work within this budget: the model still says {name}.", { name: adversarial.name });
  const images = [
    [t("Original"), trial.original_png, told(original)],
    [t("Perturbation"), trial.perturbation_png, t("enlarged {factor} times; grey is no change", { factor: number(trial.amplification) })],
    [t("Adversarial"), trial.adversarial_png, told(adversarial)],
  ].map(([name, png, caption]) => ({ name, source: `data:image/png;base64,${png}`, caption }));
  const { distances } = trial;
  shown.replaceChildren(
    h("p", { class: `note verdict ${trial.success ? "rejected" : ""}` }, verdict),
    h("div", { class: "triple" }, images.map(({ name, source, caption }, index) => h("figure", {},
      h("button", { type: "button", "aria-label": t("Enlarge: {name}", { name }), onclick: () => enlarge(images.map((one) => ({ source: one.source, caption: `${one.name}: ${one.caption}` })), index) }, h("img", { src: source, alt: "" })),
      h("figcaption", {}, h("b", {}, name), caption)))),
    ...(trial.guarded ? [guarded(trial.guarded)] : []),
    h("h3", {}, t("What the model says")),
    bars(original, adversarial),
    ...(Object.keys(trial.behind).length ? [h("h3", {}, t("Behind each defence")), behind(trial.behind, original)] : []),
    h("h3", {}, t("How far")),
    h("dl", { class: "facts" },
      row(t("Largest change"), t("{n}/255 of the range", { n: number(distances.levels) })),
      row("l2", number(distances.l2)), row("l1", number(distances.l1)),
      trial.ssim !== null && row("SSIM", number(trial.ssim, 4)), trial.psnr !== null && row("PSNR", `${number(trial.psnr)} dB`),
      row(t("Cost"), t("images forward: {queries}, backward: {gradients}; {seconds} s", { queries: trial.queries, gradients: trial.gradients, seconds: number(Math.ceil(1000 * trial.seconds) / 1000, 2) }))),
    ...(trial.notes.length ? [h("ul", { class: "notes", lang: "en" }, trial.notes.map((note) => h("li", { class: "note" }, note)))] : []),
  );
  say(verdict);
}

const row = (name, text) => [h("dt", {}, name), h("dd", {}, text)];
const told = ({ name, confidence }) => (confidence === null ? name : `${name}, ${percent(confidence)}`);

function bars(original, adversarial) {
  const names = [...new Set([...Object.keys(original.probabilities), ...Object.keys(adversarial.probabilities)])];
  const cell = (answer, name, wrong) => {
    const value = answer.probabilities[name];
    if (value === undefined) return h("td", {}, "");
    const fill = h("span");
    fill.style.width = `${100 * value}%`;
    const top = Math.max(...Object.values(answer.probabilities)) === value;
    return h("td", { class: `${top ? "top-class" : ""} ${top && wrong ? "wrong" : ""}`.trim() || undefined }, percent(value), h("span", { class: "bar", "aria-hidden": "true" }, fill));
  };
  const wrong = original.label !== adversarial.label;
  return h("div", { class: "scroll", role: "region", tabindex: 0, "aria-label": t("What the model says") }, h("table", { class: "bars" },
    h("thead", {}, h("tr", {}, [t("Class"), t("Original"), t("Adversarial")].map((text) => h("th", { scope: "col" }, text)))),
    h("tbody", {}, names.map((name) => h("tr", {}, h("th", { scope: "row" }, name), cell(original, name, false), cell(adversarial, name, wrong))))));
}

function behind(answers, original) {
  return h("div", { class: "scroll", role: "region", tabindex: 0, "aria-label": t("Behind each defence") }, h("table", {},
    h("thead", {}, h("tr", {}, [t("Defence"), t("Original"), t("Adversarial")].map((text) => h("th", { scope: "col" }, text)))),
    h("tbody", {}, Object.entries(answers).map(([name, both]) => h("tr", {}, h("th", { scope: "row" }, name), h("td", {}, told(both.original)),
      h("td", { class: both.adversarial.label === original.label ? "accepted" : "rejected" }, told(both.adversarial)))))));
}

function guarded({ original, adversarial }) {
  const says = (answer) => h("span", { class: `verdict ${answer.verdict}` }, answer.verdict === "accepted" ? t("accepted") : t("rejected"), answer.attack ? ` (${answer.attack})` : "");
  return h("div", { class: "note" }, h("b", {}, t("The guard")), h("dl", { class: "facts" }, row(t("Original"), says(original)), row(t("Adversarial"), says(adversarial))));
}

dropZone($("drop"), ([file]) => file && take({ file }));
$("model").addEventListener("change", chooseModel);
$("attack").addEventListener("change", chooseAttack);
const showPictures = () => pictures.show({ id: $("data").value, split: splitOf($("data").value), label: "" });
$("data").addEventListener("change", showPictures);
form.addEventListener("submit", async (event) => {
  event.preventDefault();
  $("before").hidden = true;
  if (!image) {
    shown.replaceChildren(h("p", { class: "note", role: "alert" }, t("Choose an image first: a file, or one of the small pictures.")));
    $("file").focus();
    return;
  }
  const budget = chosenThreat.value();
  chosenThreat.mark(budget ? null : t("Something has to stand here."));
  if (!budget) {
    chosenThreat.focus();
    return;
  }
  const button = form.querySelector(".primary");
  button.disabled = true;
  shown.replaceChildren(busy(t("Attacking")));
  say(t("Attacking"));
  if (shown.getBoundingClientRect().top > innerHeight) $("result").scrollIntoView();
  try {
    show(await api("/try", { method: "POST", json: await request() }));
  } catch (error) {
    showError(shown, error, t("This attack was not run"));
  } finally {
    button.disabled = false;
  }
});
chooseModel();
showPictures();
form.dataset.ready = "yes";
