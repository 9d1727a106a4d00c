// Pictures enlarged, pixel by pixel, in a dialog: arrow keys go from one to the next, Escape closes.
import { h, t } from "./page.js";

/** Enlarge one of several pictures, each with its source and a caption. */
export function enlarge(pictures, first) {
  let at = first;
  const image = h("img", { alt: "" });
  const title = h("h2", { id: "zoom-title", "aria-live": "polite" });
  const step = (by) => () => {
    at = (at + by + pictures.length) % pictures.length;
    show();
  };
  const several = pictures.length > 1;
  const dialog = h("dialog", { class: "zoom", "aria-labelledby": "zoom-title" }, title, image,
    h("form", { method: "dialog", class: "actions" },
      several && h("button", { type: "button", onclick: step(-1) }, t("Previous")),
      several && h("button", { type: "button", onclick: step(1) }, t("Next")),
      h("button", { class: "primary", autofocus: true }, t("Close"))));
  function show() {
    image.src = pictures[at].source;
    title.textContent = pictures[at].caption;
  }
  dialog.addEventListener("keydown", (event) => {
    if (several && event.key === "ArrowRight") step(1)();
    if (several && event.key === "ArrowLeft") step(-1)();
  });
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  show();
  dialog.showModal();
}
