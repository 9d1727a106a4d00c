// The form of a request for a job, made from its schema and the catalogue; what it becomes is a job.
import { api, h, newKey, prose, Refusal, showError, t } from "./page.js";
import { choose, control, field, newId, options, several, threat } from "./form.js";

const form = document.getElementById("ask");
const kind = form?.dataset.kind;
const asked = new URLSearchParams(location.search);

/** What fields are called, and what they are for. */
const TEXTS = {
  limit: [t("Number of images"), t("Leave it empty for all. The first so many are taken.")],
  seed: [t("Seed"), t("The same seed gives the same result.")],
  batch_size: [t("Batch size"), t("Images worked on together. Less needs less memory; results do not depend on it.")],
  chunk: [t("Chunk"), t("Images whose results are stored together; a job that is stopped goes on from there.")],
  eight_bit: [t("Round to 8 bits"), t("Judge adversarial images as a PNG file would hold them.")],
  sweep: [t("Curve over budgets"), t("Also measure accuracy at smaller and larger budgets.")],
  pairs: [t("Pairs of classes"), t("Targeted attacks from one class to another: all, or TRUE:TARGET,TRUE:TARGET.")],
  window: [t("Window of pictures"), t("Two pixel values, shown as black and white in pictures of the report.")],
  fpr: [t("False alarms"), t("Share of clean images that may be flagged; it sets the thresholds.")],
  fit_limit: [t("Images to fit on"), t("Leave it empty for all of the training split.")],
  adaptive: [t("Attacker who knows the detector"), t("Also attack each detector by one who knows it. Without that a detector looks better than it is.")],
  steps: [t("Steps of that attacker"), null],
  budgets: [t("Further budgets"), t("Numbers with commas between them, such as 2/255, 4/255.")],
  layers: [t("Layers"), t("Names or patterns with commas between them; empty: the outputs of all blocks.")],
  share: [t("Share that counts as sensitive"), t("Of the neurons of a layer.")],
  test: [t("Images to mask neurons on"), null],
  draws: [t("Random choices to compare with"), null],
};
const MAIN = {
  audit: ["model", "data", "threat", "suite", "limit"],
  train: ["data", "from", "recipe", "epochs", "budget"],
  detect: ["model", "data", "detectors", "attacks", "threat", "limit"],
  explain: ["models", "data", "threat", "attacks", "limit"],
};
const ASIDE = ["kind", "start", "model_options", "options"]; // filled in by others

if (form) {
  try {
    const [schema, catalog, { models }, { items }] = await Promise.all([api(`/requests/${kind}`), api("/catalog"), api("/models"), api("/data")]);
    build(schema, catalog, models, [...items.map(({ id, name, form, facts }) => ({ id, name, form, ...facts })), digits()]);
  } catch (error) {
    showError(form, error, t("The form could not be loaded"));
  }
}

function digits() {
  const splits = { train: {}, test: {} };
  return { id: "digits", name: "digits", shape: [1, 8, 8], splits };
}

function build(schema, catalog, models, sets) {
  const attacks = [...catalog.attacks, ...catalog.joint];
  const fields = {};
  const known = { ...schema.properties };
  if (kind === "train") Object.assign(known, { from: {}, epochs: {}, budget: {}, more: {} });
  if (kind === "train") delete known.model;

  const widgets = {
    model: () => choose(t("Model"), models.map(({ id, name }) => [id, name]), { value: asked.get("model") ?? undefined, name: "model" }),
    models: () => modelsField(models),
    data: () => dataField(sets),
    threat: () => threat(),
    suite: () => choose(t("Suite"), catalog.suites.map(({ name, summary }) => [name, `${name}: ${t(summary)}`.replaceAll("`", "")]), {
      value: kind === "audit" ? "fast" : undefined,
      empty: kind === "audit" ? t("none: only the attacks chosen below") : t("none"),
      help: kind === "audit" ? t("Which attacks are run.") : t("Attacks what is left once neurons are taken out."),
      name: "suite",
    }),
    attacks: () => several(kind === "audit" ? t("Further attacks") : t("Attacks"), kind === "audit" ? attacks : catalog.attacks, {
      picked: { detect: ["pgd"], explain: ["pgd"] }[kind],
      help: { detect: t("What detectors are judged by, and what some of them learn from."), explain: t("The first makes the pairs of images all figures are about.") }[kind],
    }),
    defences: () => several(t("Defences in front of the model"), catalog.preprocessors, { help: t("They belong to what is attacked.") }),
    detectors: () => several(t("Detectors"), catalog.detectors, { picked: ["knn", "squeezing"] }),
    from: () => startField(catalog, models),
    recipe: () => recipeField(catalog),
    epochs: () => control("epochs", { type: "integer", minimum: 1 }, { label: t("Epochs"), help: t("Passes over the training images; leave it empty for those of the recipe.") }),
    budget: () => control("threat", { type: "string" }, { label: t("What to withstand"), help: t("For recipes that harden, such as linf:8/255; leave it empty for what the recipe says.") }),
    more: () => {
      const area = h("textarea", { id: newId("more"), rows: 4, spellcheck: "false", placeholder: "batch_size=128\nlearning_rate=0.001" });
      return field(t("Other options of the recipe"), area, { help: t("One for each line, as name=value."), value: () => (area.value.trim() ? area.value : undefined) });
    },
  };

  for (const name of [...MAIN[kind], ...Object.keys(known)]) {
    if (fields[name] || !(name in known) || (ASIDE.includes(name) && !widgets[name])) continue;
    const [label, help] = TEXTS[name] ?? [];
    fields[name] = widgets[name]?.() ?? control(name, known[name], { defs: schema.$defs, label, help: help ?? undefined });
  }
  const main = MAIN[kind].filter((name) => fields[name]);
  const rest = Object.keys(fields).filter((name) => !main.includes(name));
  const failed = h("div");
  const button = h("button", { class: "primary" }, { audit: t("Start the audit"), train: t("Start the training"), detect: t("Start the detection"), explain: t("Start the explanation") }[kind]);
  form.replaceChildren(
    h("div", { class: "panel" }, main.map((name) => fields[name].element)),
    h("details", {}, h("summary", {}, t("More settings")), h("div", { class: "inside" }, h("div", { class: "panel" }, fields.data?.aside, rest.map((name) => fields[name].element)))),
    failed,
    h("p", { class: "actions" }, button),
  );

  const chosen = () => models.find(({ id }) => id === (fields.model?.value() ?? fields.models?.value()?.[0]));
  const fit = () => {
    const model = chosen();
    if (model) {
      fields.threat?.fit({ shape: model.shape, span: model.high - model.low });
      fields.data?.fit?.(model.shape);
    } else fields.threat?.fit();
    if (fields.recipe && fields.data) fields.recipe.fit?.(fields.data.id());
  };
  form.addEventListener("change", (event) => {
    if ([fields.model?.select, fields.data?.select].includes(event.target) || event.target.name === "models") fit();
  });
  fit();

  let key = newKey();
  let sentBefore = "";
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    for (const made of Object.values(fields)) made.mark(null);
    showError(failed, null);
    const json = request(fields, known);
    const empty = Object.keys(fields).filter((name) => schema.required?.includes(name) && !(json[name]?.length > 0));
    if (empty.length) {
      for (const name of empty) fields[name].mark(t("Something has to stand here."));
      fields[empty[0]].focus();
      return;
    }
    if (JSON.stringify(json) !== sentBefore) key = newKey(); // the same again is the same job, also after a lost answer
    sentBefore = JSON.stringify(json);
    button.disabled = true;
    try {
      const job = await api("/jobs", { method: "POST", json, headers: { "Idempotency-Key": key } });
      location.assign(`/jobs/${job.id}`);
    } catch (error) {
      button.disabled = false;
      mark(error, fields);
      showError(failed, error, t("This request was not taken"));
      failed.scrollIntoView({ block: "nearest" });
    }
  });
}

/** What is sent: only what was chosen, and differs from the defaults. */
function request(fields, known) {
  const json = { kind };
  for (const [name, made] of Object.entries(fields)) {
    const value = made.value();
    if (value === undefined || ["from", "epochs", "budget", "more"].includes(name)) continue;
    if (JSON.stringify(value) === JSON.stringify(known[name].default) || (Array.isArray(value) && !value.length && "default" in known[name])) continue;
    json[name] = value;
  }
  if (kind !== "train") return json;
  Object.assign(json, fields.from.value());
  const lines = (fields.more.value() ?? "").split("\n").map((line) => line.split("=")).filter(([name, value]) => name.trim() && value !== undefined);
  const more = Object.fromEntries(lines.map(([name, ...value]) => [name.trim(), read(value.join("=").trim())]));
  const set = { epochs: fields.epochs.value(), threat: fields.budget.value() };
  json.options = { ...more, ...Object.fromEntries(Object.entries(set).filter(([, value]) => value !== undefined)) };
  return json;
}

function read(text) {
  try {
    return JSON.parse(text);
  } catch {
    return text;
  }
}

/** Mark what the service found wrong, and go to the first of it. */
function mark(error, fields) {
  if (!(error instanceof Refusal)) return;
  let first = null;
  for (const fault of error.fields) {
    const parts = fault.field.split(".").filter((part) => !["root", kind].includes(part));
    const made = fields[parts[0]];
    if (!made) continue;
    made.mark(fault.message);
    first ??= made;
  }
  first?.focus();
}

/** A data set, a split and how its images are read. */
function dataField(sets) {
  const select = h("select", { id: newId("data") }, sets.map(({ id, name }) => h("option", { value: id }, name)));
  if (sets.some(({ id }) => id === asked.get("data"))) select.value = asked.get("data");
  const whole = ["train", "detect"].includes(kind);
  const split = choose(t("Split"), [], { name: "split" });
  const words = control("reading", { type: "string" }, { label: t("Conversion"), help: t("How images are brought to what the model takes: @64 or @64x48 resizes, @grey or @rgb converts, @window=40:400 for DICOM.") });
  const set = () => sets.find(({ id }) => id === select.value);
  const splits = () => {
    const names = Object.keys(set().splits ?? {});
    split.fill(names.map((name) => [name, name]), names.includes("test") ? "test" : names[0]);
  };
  select.addEventListener("change", splits);
  splits();
  const box = field(t("Data"), select, { help: whole ? t("Its splits are used as they are needed.") : undefined });
  const note = h("p", { class: "note", hidden: true });
  let stiff = false; // they do not fit, and are of a form that cannot be converted
  const tell = () => {
    note.hidden = !words.value() && !stiff;
    note.textContent = words.value()
      ? t("Its images are not as the model takes them, and are converted: {words}. More settings can change that.", { words: words.value() })
      : t("Its images are not as the model takes them, and cannot be converted: choose other data or another model.");
  };
  words.input.addEventListener("change", tell);
  let shape = null;
  return {
    ...box,
    element: h("div", {}, h("div", { class: whole ? "" : "pair" }, box.element, whole ? null : split.element), note),
    aside: words.element,
    select,
    id: () => select.value,
    fit(wanted) {
      shape = wanted ?? shape;
      const own = set().shape;
      const parts = [];
      if (shape && own && shape.length === 3 && own.length === 3) {
        if (shape[1] !== own[1] || shape[2] !== own[2]) parts.push(shape[1] === shape[2] ? `@${shape[1]}` : `@${shape[2]}x${shape[1]}`);
        if (shape[0] !== own[0]) parts.push({ 1: "@grey", 3: "@rgb" }[shape[0]] ?? "");
      }
      const converts = ![undefined, ".npz"].includes(set().form);
      stiff = parts.length > 0 && !converts;
      words.input.value = converts ? parts.join("") : "";
      tell();
    },
    value: () => select.value + (words.value() ?? "") + (whole || split.value() === "all" ? "" : `:${split.value()}`),
  };
}

/** Models to explain, one or more. */
function modelsField(models) {
  const rows = models.map(({ id, name }, index) => {
    const box = h("input", { type: "checkbox", id: newId("model"), name: "models", value: id, checked: asked.has("model") ? asked.get("model") === id : index === 0 });
    return { box, element: h("div", { class: "choice" }, h("div", { class: "check" }, box, h("label", { for: box.id }, name))) };
  });
  const fault = h("p", { class: "fault", hidden: true, role: "alert" });
  return {
    element: h("fieldset", { class: "field" }, h("legend", {}, t("Models")), h("p", { class: "help" }, t("One or more; the first is illustrated.")), h("div", { class: "choices" }, rows.map((row) => row.element)), fault),
    value: () => rows.filter((row) => row.box.checked).map((row) => row.box.value),
    mark(message) {
      fault.textContent = message ?? "";
      fault.hidden = !message;
    },
    focus: () => rows[0].box.focus(),
  };
}

/** A new network, or a model to go on from. */
function startField(catalog, models) {
  const select = h("select", { id: newId("start") },
    h("optgroup", { label: t("A new network") }, catalog.architectures.map(({ name, summary }) => h("option", { value: `new:${name}` }, `${name}: ${t(summary)}`.replaceAll("`", "")))),
    models.length ? h("optgroup", { label: t("A trained model, to go on from") }, models.map(({ id, name }) => h("option", { value: `old:${id}` }, name))) : null);
  select.value = asked.has("start") ? `old:${asked.get("start")}` : "new:lenet";
  const place = h("div");
  const box = field(t("Network"), select);
  let made = null;
  const show = () => {
    const [which, name] = select.value.split(":");
    const schema = which === "new" && catalog.architectures.find((one) => one.name === name).options;
    made = schema && Object.keys(schema.properties ?? {}).length ? options(schema) : null;
    place.replaceChildren(...(made ? [made.element] : []));
  };
  select.addEventListener("change", show);
  show();
  return {
    ...box,
    element: h("div", {}, box.element, place),
    value() {
      const [which, name] = select.value.split(":");
      return which === "old" ? { start: name } : { model: name, model_options: made?.value() ?? {} };
    },
  };
}

/** A recipe; the families of one stand together, and one made for the data is taken first. */
function recipeField(catalog) {
  const made = choose(t("Recipe"), catalog.recipes.map(({ name, summary }) => [name, name]), { value: "plain", name: "recipe", help: " " });
  const help = made.element.querySelector(".help");
  const tell = () => help.replaceChildren(...prose(t(catalog.recipes.find(({ name }) => name === made.select.value).summary)));
  let touched = false;
  made.select.addEventListener("change", () => {
    touched = true;
    tell();
  });
  tell();
  return {
    ...made,
    fit(data) {
      if (touched) return;
      made.select.value = data === "digits" ? "plain:digits" : "plain";
      tell();
    },
  };
}
