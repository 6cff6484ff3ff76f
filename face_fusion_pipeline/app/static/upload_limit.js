// Files of more than LIMIT bytes are refused before they are sent, with a message beside their field.
function refuseLargeFiles(event, files) {
  const field = event.target.closest("[id^=photos_], .row");
  if (!field) return;
  if (field.nextElementSibling?.matches(".over-limit")) field.nextElementSibling.remove();
  const large = [...files].filter((file) => file.size > LIMIT);
  if (!large.length) return;
  event.stopImmediatePropagation(); // before the page's own listeners: this one is called on the way down
  event.preventDefault();
  if (event.type === "change") event.target.value = "";
  const megabytes = (bytes) => `${(bytes / 2 ** 20).toFixed(1)} MB`;
  const text = document.createElement("p");
  text.className = "error";
  text.setAttribute("role", "alert");
  const named = large.map((file) => `${file.name}: ${megabytes(file.size)}`).join(", ");
  text.textContent = `${named}: above the limit of ${megabytes(LIMIT)} for a file`;
  const message = document.createElement("div");
  message.className = "message over-limit";
  message.append(text);
  field.after(message);
}

document.addEventListener("change", (event) => {
  if (event.target.type === "file") refuseLargeFiles(event, event.target.files);
}, true);
document.addEventListener("drop", (event) => refuseLargeFiles(event, event.dataTransfer?.files ?? []), true);
