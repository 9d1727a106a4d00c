// Guards: made from a detection, and asked about images.
import { api, base64, busy, dropZone, h, number, percent, showError, t } from "./page.js";

const make = document.getElementById("make");
make?.addEventListener("submit", async (event) => {
  event.preventDefault();
  const chosen = document.getElementById("detector").selectedOptions[0];
  const button = make.querySelector(".primary");
  button.disabled = true;
  try {
    await api("/guards", { method: "POST", json: { name: document.getElementById("name").value, job: chosen.dataset.job, detector: chosen.value } });
    location.assign("/guards");
  } catch (error) {
    button.disabled = false;
    showError(make.querySelector("[data-error]"), error, t("The guard was not made"));
  }
});

const drop = document.getElementById("drop");
const answers = document.getElementById("answers");
if (drop) {
  dropZone(drop, async (files) => {
    if (!files.length) return;
    answers.replaceChildren(busy(t("Asking the guard")));
    try {
      const images = await Promise.all(files.map(base64));
      const answer = await api(`/guards/${document.getElementById("asked").value}/predict`, { method: "POST", json: { images } });
      answers.replaceChildren(table(files, answer), h("p", { class: "soft" }, t("Answered in {seconds} s.", { seconds: number(answer.seconds, 2) })));
    } catch (error) {
      showError(answers, error);
    }
  });
}

function table(files, { predictions }) {
  return h("div", { class: "scroll", role: "region", tabindex: 0, "aria-label": t("Answers"), "aria-live": "polite" }, h("table", {},
    h("thead", {}, h("tr", {}, [t("Image"), t("Class"), t("Verdict"), t("Score")].map((text) => h("th", { scope: "col" }, text)))),
    h("tbody", {}, predictions.map((said, index) => h("tr", {},
      h("th", { scope: "row" }, files[index].name),
      h("td", {}, said.confidence === null ? said.name : `${said.name}, ${percent(said.confidence)}`),
      h("td", {}, h("span", { class: `verdict ${said.verdict}` }, said.verdict === "accepted" ? t("accepted") : t("rejected")), said.attack ? h("span", { class: "soft", lang: "en" }, said.attack) : null),
      h("td", {}, said.score === null ? "" : `${number(said.score)} / ${number(said.threshold)}`))))));
}
