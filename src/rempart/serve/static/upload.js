// Uploads: a file, with progress, to a place of the API; then on to the page of what it became.
import { bytes, csrf, dropZone, h, parsed, percent, Refusal, say, showError, t } from "./page.js";

/** Send a file; `told` gets the share that is sent. */
function sent(url, file, told) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("POST", url);
    request.setRequestHeader("Content-Type", "application/octet-stream");
    request.setRequestHeader("X-CSRF-Token", csrf);
    request.upload.onprogress = (event) => event.lengthComputable && told(event.loaded / event.total);
    request.upload.onload = () => told(1);
    request.onerror = () => reject(new Refusal(0, { message: t("The service does not answer. Check the connection and try again.") }));
    request.onload = () => {
      const answer = parsed(request.responseText);
      if (request.status === 201) resolve(answer);
      else reject(new Refusal(request.status, answer?.error ?? { message: `${request.status} ${request.statusText}` }));
    };
    request.send(file);
  });
}

for (const form of document.querySelectorAll("form[data-upload]")) {
  const label = form.querySelector(".drop");
  const name = label.querySelector("b");
  const place = form.querySelector("[data-progress]");
  const button = form.querySelector(".primary");
  dropZone(label, ([file]) => {
    name.textContent = file ? `${file.name} · ${bytes(file.size)}` : "";
  });
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const file = label.querySelector("input").files[0];
    if (!file) {
      showError(place, new Refusal(0, { message: t("Choose a file first.") }), t("No file yet"));
      label.querySelector("input").focus();
      return;
    }
    const query = new URLSearchParams({ name: file.name });
    for (const field of form.querySelectorAll("input[name], select[name]")) if (field.value.trim()) query.set(field.name, field.value.trim());
    const bar = h("progress", { max: 1, value: 0, "aria-label": t("Upload") });
    const text = h("p", { class: "soft" }, t("Sending {name}", { name: file.name }));
    place.replaceChildren(bar, text);
    button.disabled = true;
    say(text.textContent);
    try {
      const item = await sent(`${form.dataset.upload}?${query}`, file, (share) => {
        if (share < 1) {
          bar.value = share;
          text.textContent = `${t("Sending {name}", { name: file.name })}: ${percent(share)}`;
        } else {
          bar.removeAttribute("value");
          text.textContent = t("Sent. The service looks at it now.");
          say(text.textContent);
        }
      });
      location.assign(form.dataset.to + item.id);
    } catch (error) {
      showError(place, error, t("This file was not taken"));
      button.disabled = false;
    }
  });
}
