// What every page needs: words, requests to the API, elements, errors, questions.

const root = document.documentElement;
const words = JSON.parse(document.getElementById("words").textContent);
const csrf = document.querySelector('meta[name="csrf-token"]').content;
export const language = root.lang;
root.classList.add("scripted");

/** A sentence in the language of the page, with values for the names in braces. */
export function t(sentence, values = {}) {
  const found = words[sentence] ?? sentence;
  return found.replace(/\{(\w+)\}/g, (whole, name) => values[name] ?? whole);
}

/** An element. Attributes named on... are listeners; children are elements or texts, never HTML. */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "value") element.value = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== undefined && child !== null && child !== false));
  return element;
}

/** A sentence in which names between backticks are code. */
export const prose = (sentence) => sentence.split("`").map((part, index) => (index % 2 ? h("code", {}, part) : part));

/** What the API refused: what was expected, what came, what to try. */
export class Refusal extends Error {
  constructor(status, told) {
    super(told.message || String(status));
    Object.assign(this, { status, fields: [], ...told });
  }
}

/** Ask the API; `json` is what is sent. */
export async function api(path, { method = "GET", json, body, headers = {} } = {}) {
  const sent = { Accept: "application/json", ...headers };
  if (method !== "GET") sent["X-CSRF-Token"] = csrf;
  if (json !== undefined) sent["Content-Type"] = "application/json";
  let answer;
  try {
    answer = await fetch(`/api/v1${path}`, { method, headers: sent, body: json === undefined ? body : JSON.stringify(json) });
  } catch {
    throw new Refusal(0, { message: t("The service does not answer. Check the connection and try again.") });
  }
  const text = await answer.text();
  const told = parsed(text);
  if (!answer.ok) throw new Refusal(answer.status, told?.error ?? { message: `${answer.status} ${answer.statusText}` });
  return told;
}

export function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

export { csrf };

/** Show an error in a place, or take it away. */
export function showError(place, error, title = t("This did not work")) {
  place.replaceChildren();
  if (!error) return;
  if (!(error instanceof Refusal)) console.error(error);
  const rows = [
    [t("Expected"), error.expected],
    [t("Came"), error.got],
    [t("What to try"), error.hint],
  ].filter(([, text]) => text);
  if (!error.expected && !error.fields?.length) rows.unshift([t("Answer"), error.message]);
  for (const fault of error.fields ?? []) rows.push([fault.field, fault.message]);
  place.append(
    h("div", { class: "error", role: "alert" }, h("h3", {}, title),
      h("dl", { class: "facts" }, rows.flatMap(([name, text]) => [h("dt", {}, name), h("dd", {}, text)]))),
  );
}

/** Tell those who listen instead of looking. */
export function say(text) {
  document.getElementById("live").textContent = text;
}

export function busy(text) {
  return h("div", { class: "busy" }, text);
}

export const number = (value, digits = 3) =>
  new Intl.NumberFormat(language, { maximumSignificantDigits: digits }).format(value);
export const percent = (value) =>
  new Intl.NumberFormat(language, { style: "percent", minimumFractionDigits: 1, maximumFractionDigits: 1 }).format(value);

export function bytes(size) {
  const unit = size < 1 << 20 ? ["KB", 1 << 10] : size < 1 << 30 ? ["MB", 1 << 20] : ["GB", 1 << 30];
  return `${new Intl.NumberFormat(language, { maximumFractionDigits: 1 }).format(size / unit[1])} ${unit[0]}`;
}

/** Ask before something is lost. */
export function confirmed(question, verb) {
  const dialog = h("dialog", { "aria-labelledby": "question" },
    h("h2", { id: "question" }, question),
    h("p", {}, t("This cannot be undone.")),
    h("form", { method: "dialog", class: "actions" },
      h("button", { value: "no", autofocus: true }, t("Keep it")),
      h("button", { value: "yes", class: "danger" }, verb)));
  document.body.append(dialog);
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(dialog.returnValue === "yes");
    });
  });
}

/** A drop zone: a label around a file input, which the keyboard reaches. */
export function dropZone(label, taken) {
  const input = label.querySelector("input");
  const toggle = (on) => (event) => {
    event.preventDefault();
    label.classList.toggle("over", on);
  };
  label.addEventListener("dragover", toggle(true));
  label.addEventListener("dragleave", toggle(false));
  label.addEventListener("drop", (event) => {
    toggle(false)(event);
    if (!event.dataTransfer.files.length) return;
    input.files = event.dataTransfer.files;
    taken([...input.files]);
  });
  input.addEventListener("change", () => taken([...input.files]));
}

/** The bytes of a file in base64. */
export function base64(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(new Refusal(0, { message: t("The file cannot be read.") }));
    reader.readAsDataURL(file);
  });
}

/** A key by which the service knows a request again. */
export function newKey() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

for (const time of document.querySelectorAll("time[datetime]")) {
  const at = new Date(time.dateTime);
  if (!Number.isNaN(at.valueOf())) time.textContent = at.toLocaleString(language, { dateStyle: "medium", timeStyle: "short" });
}

document.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-delete]");
  if (!button || !(await confirmed(t("Delete {name}?", { name: button.dataset.name }), t("Delete")))) return;
  button.disabled = true;
  try {
    await api(button.dataset.delete.replace("/api/v1", ""), { method: "DELETE" });
    location.assign(button.dataset.then);
  } catch (error) {
    button.disabled = false;
    const place = h("div");
    document.getElementById("main").prepend(place);
    showError(place, error);
    place.scrollIntoView({ block: "nearest" });
  }
});

document.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-first-model]");
  if (!button) return;
  button.disabled = true;
  try {
    const json = { kind: "train", data: "digits", model: "lenet", recipe: "plain:digits" };
    const job = await api("/jobs", { method: "POST", json, headers: { "Idempotency-Key": newKey() } });
    location.assign(`/jobs/${job.id}`);
  } catch (error) {
    button.disabled = false;
    showError(button.closest("section").querySelector("[data-error]"), error);
  }
});
