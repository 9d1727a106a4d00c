// The list of jobs, kept up to date while one of them runs.
import { api, h, percent, t } from "./page.js";

const names = { queued: t("queued"), running: t("running") };
const rows = () => [...document.querySelectorAll("[data-job]")].filter((row) => row.querySelector("[data-state]").dataset.state in names);

async function look() {
  for (const row of rows()) {
    let job;
    try {
      job = await api(`/jobs/${row.dataset.job}`);
    } catch {
      return;
    }
    const state = row.querySelector("[data-state]");
    if (!(job.state in names)) {
      location.reload();
      return;
    }
    state.dataset.state = job.state;
    state.className = `state ${job.state}`;
    state.textContent = names[job.state];
    const { stage, done, total } = job.progress ?? {};
    if (job.state === "running" && stage) {
      row.querySelector("[data-progress]").replaceChildren(h("span", { lang: "en" }, stage), total ? ` ${percent(done / total)}` : "");
    }
  }
}

const timer = setInterval(() => {
  if (!rows().length) clearInterval(timer);
  else if (!document.hidden) look();
}, 2000);
