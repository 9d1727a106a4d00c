// The images of a data set, by split and class; one that is chosen is enlarged.
import { thumbs } from "./thumbs.js";
import { enlarge } from "./zoom.js";

const place = document.getElementById("thumbs");
const split = document.getElementById("split");
const kind = document.getElementById("class");
const shown = thumbs(place, {
  picked: ({ source, name_of_class: name, number }) => enlarge([{ source, caption: `${name} · ${number}` }], 0),
});
const show = () =>
  shown.show({ id: place.dataset.id, split: split.value, label: kind.value === "" ? "" : kind.selectedIndex - 1 });
split.addEventListener("change", show);
kind.addEventListener("change", show);
show();
