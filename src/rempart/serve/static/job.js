// A job while it runs: events as they come, curves, log, cancel.
import { api, h, language, percent, say, showError, t } from "./page.js";
import { curves } from "./curves.js";

const page = document.getElementById("job");
const log = document.getElementById("log");
const stage = document.getElementById("stage");
const bar = document.getElementById("bar");
const count = document.getElementById("count");
const running = ["queued", "running"].includes(page.dataset.state);
const section = document.getElementById("curves-section");
const figures = curves(document.getElementById("curves"));
let said = "";
let last = "";
let queue = [];

function line(event) {
  const text = [event.stage, event.note].filter(Boolean).join(": ");
  if (text === last) return;
  last = text;
  const at = new Date(1000 * event.at);
  document.getElementById("log-section").hidden = false;
  const low = log.scrollTop + log.clientHeight >= log.scrollHeight - 30;
  log.append(h("li", {}, h("time", { datetime: at.toISOString() }, at.toLocaleTimeString(language)), h("span", {}, text)));
  if (log.children.length > 500) log.firstChild.remove();
  if (low) log.scrollTop = log.scrollHeight;
}

function progress(event) {
  figures.add(event);
  section.hidden = figures.empty;
  line(event);
  if (!running) return;
  stage.replaceChildren(h("span", { lang: "en" }, event.stage));
  if (event.total) {
    bar.max = event.total;
    bar.value = Math.min(event.done, event.total);
    count.textContent = `${event.done} / ${event.total} · ${percent(event.done / event.total)}`;
  } else {
    bar.removeAttribute("value");
    count.textContent = "";
  }
  if (event.stage !== said) {
    said = event.stage;
    say(t("Now: {stage}", { stage: event.stage }));
  }
}

function state(job) {
  if (job.state === page.dataset.state) return;
  if (job.state === "running") {
    page.dataset.state = "running";
    const told = document.querySelector("#state .state");
    told.className = "state running";
    told.textContent = t("running");
    if (!said) stage.textContent = t("Starting");
  } else location.reload(); // the page shows how it ended
}

const source = new EventSource(`/api/v1/jobs/${page.dataset.id}/events`);
source.addEventListener("progress", (event) => {
  queue.push(JSON.parse(event.data));
  if (queue.length > 1) return;
  setTimeout(() => { // events of the past come all at once
    const events = queue;
    queue = [];
    events.forEach(progress);
  }, 50);
});
source.addEventListener("state", (event) => {
  const job = JSON.parse(event.data);
  if (!["queued", "running"].includes(job.state)) source.close();
  state(job);
});
source.addEventListener("open", () => document.getElementById("lost")?.remove());
source.addEventListener("error", () => {
  if (!running || document.getElementById("lost")) return;
  setTimeout(() => { // the service ends each answer after a while; that is no loss
    if (source.readyState !== EventSource.OPEN && !document.getElementById("lost")) {
      stage.after(h("p", { class: "note", id: "lost", role: "status" }, t("The connection was lost. The job goes on; this page looks for it again.")));
    }
  }, 8000);
});
addEventListener("pagehide", () => source.close());

document.getElementById("cancel")?.addEventListener("click", async (event) => {
  const button = event.currentTarget;
  button.disabled = true;
  button.textContent = t("Cancelling");
  try {
    await api(`/jobs/${page.dataset.id}/cancel`, { method: "POST" });
  } catch (error) {
    button.disabled = false;
    button.textContent = t("Cancel this job");
    showError(document.querySelector("#job [data-error]"), error);
  }
});
