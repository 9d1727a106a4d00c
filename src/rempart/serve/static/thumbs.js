// Images of a data set as small pictures to look at or to choose from.
import { api, busy, h, showError, t } from "./page.js";

/** Show images in a place; `picked(image)` is called with the chosen one. Returns a way to show others. */
export function thumbs(place, { picked, small = false } = {}) {
  let current = 0;
  const list = h("ul", { class: small ? "thumbs small" : "thumbs" });
  const more = h("button", { type: "button", hidden: true }, t("Show more"));
  const status = h("div");
  place.replaceChildren(list, status, h("p", {}, more));
  let wanted = null;

  async function load() {
    const mine = ++current;
    status.replaceChildren(busy(t("Loading images")));
    more.hidden = true;
    const query = new URLSearchParams({ split: wanted.split, offset: list.children.length, limit: 24 });
    if (wanted.label !== "" && wanted.label !== undefined) query.set("label", wanted.label);
    try {
      const found = await api(`/data/${wanted.id}/images?${query}`);
      if (mine !== current) return;
      status.replaceChildren();
      for (const image of found.images) list.append(h("li", {}, thumb(image, { ...wanted })));
      more.hidden = list.children.length >= found.total;
      if (!found.total) status.replaceChildren(h("p", { class: "note" }, t("No image is like that.")));
    } catch (error) {
      if (mine === current) showError(status, error);
    }
  }

  function thumb(image, { id, split }) {
    const source = `/api/v1/data/${id}/images/${image.number}.png?split=${split}`;
    const name = t("{name}, number {number}", { name: image.name_of_class, number: image.number });
    const button = h("button", { type: "button", "aria-pressed": picked && "false", "aria-label": name },
      h("img", { src: source, alt: "", loading: "lazy", width: 64, height: 64 }), image.name_of_class);
    button.addEventListener("click", () => {
      for (const other of list.querySelectorAll("button")) if (picked) other.setAttribute("aria-pressed", other === button);
      picked({ ...image, source, button });
    });
    return button;
  }

  more.addEventListener("click", load);
  return {
    show(next) {
      wanted = next;
      list.replaceChildren();
      return load();
    },
    forget() {
      for (const button of list.querySelectorAll("[aria-pressed=true]")) button.setAttribute("aria-pressed", "false");
    },
  };
}
