// Face boxes drawn over a picture. props.value: {picture, ratio, boxes, person}, see places.py.
const area = element.querySelector(".places-area");
const chips = [...element.querySelectorAll("[data-person]")];
let start = null; // where the pointer went down, [x, y] in [0, 1]

const value = () => props.value ?? {picture: null, ratio: 1, boxes: [null, null, null], person: 0};

function boxElement(box, person) {
  const [x0, y0, x1, y1] = box;
  const drawn = document.createElement("div");
  drawn.className = `places-box places-person-${person + 1}`;
  drawn.textContent = person + 1;
  const edges = {left: x0, top: y0, width: x1 - x0, height: y1 - y0};
  for (const [edge, part] of Object.entries(edges)) drawn.style[edge] = `${100 * part}%`;
  return drawn;
}

function draw(unfinished = null) {
  const {picture, ratio, boxes, person} = value();
  area.style.aspectRatio = ratio;
  area.style.backgroundImage = picture ? `url("${picture}")` : "none";
  const shown = boxes.map((box, index) => (unfinished && index === person ? unfinished : box));
  area.replaceChildren(...shown.flatMap((box, index) => (box ? [boxElement(box, index)] : [])));
  area.classList.toggle("places-empty", !shown.some(Boolean));
  chips.forEach((chip, index) => chip.setAttribute("aria-pressed", index === person));
}

function point(event) {
  const frame = area.getBoundingClientRect();
  const part = (at, from, length) => Math.min(Math.max((at - from) / length, 0), 1);
  return [part(event.clientX, frame.left, frame.width), part(event.clientY, frame.top, frame.height)];
}

function between([ax, ay], [bx, by]) {
  return [Math.min(ax, bx), Math.min(ay, by), Math.max(ax, bx), Math.max(ay, by)];
}

function change(changes) {
  props.value = {...value(), ...changes};
  draw();
  trigger("change");
}

area.addEventListener("pointerdown", (event) => {
  start = point(event);
  area.setPointerCapture(event.pointerId);
  event.preventDefault();
});

area.addEventListener("pointermove", (event) => {
  if (start) draw(between(start, point(event)));
});

area.addEventListener("pointerup", (event) => {
  if (!start) return;
  const box = between(start, point(event));
  start = null;
  if (box[2] - box[0] < 0.02 || box[3] - box[1] < 0.02) return draw(); // a click, not a box
  const {boxes, person} = value();
  const next = boxes.map((old, index) => (index === person ? box : old));
  const free = next.findIndex((old) => !old);
  change({boxes: next, person: free < 0 ? person : free});
});

area.addEventListener("pointercancel", () => {
  start = null;
  draw();
});

chips.forEach((chip, index) => chip.addEventListener("click", () => change({person: index})));
element.querySelector("[data-clear]").addEventListener("click", () => change({boxes: [null, null, null], person: 0}));

watch("value", () => draw());
draw();
