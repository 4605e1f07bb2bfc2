// Sends pictures to the service and draws what it sees in them. Everything that comes from a file
// or an answer is put in as text.
"use strict";

const find = (selector, within = document) => within.querySelector(selector);
const cards = new Map();
const waiting = [];
const AT_ONCE = 2;
let key = sessionStorage.getItem("key") || "";
let model = null;
let threshold = null;
let underWay = 0;

function say(text) { find("#status").textContent = text; }
function percent(score) { return `${Math.round(100 * score)} %`; }
function headers() { return key ? { Authorization: `Bearer ${key}` } : {}; }
function boxes(count) { return count === 1 ? "1 box" : `${count} boxes`; }

async function problem(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the service answered ${response.status}`;
  }
}

async function askModel() {
  const line = find("#model");
  let response;
  try {
    response = await fetch("model", { headers: headers() });
  } catch {
    line.textContent = "The service cannot be reached.";
    return setTimeout(askModel, 5000);
  }
  find("#key-form").hidden = response.status !== 401;
  if (response.status === 401) {
    line.textContent = key ? "This API key is not valid." : "This service asks for an API key.";
    return;
  }
  if (!response.ok) {
    line.textContent = `Not ready: ${await problem(response)}`;
    if (response.status === 503) setTimeout(askModel, 5000);
    return;
  }
  const answer = await response.json();
  const former = model;
  model = answer;
  line.textContent = `Model ${model.model}, threshold ${percent(model.threshold)}, ${model.engine}`;
  // What a person chose stays.
  if (threshold === null || threshold === former?.threshold) setThreshold(model.threshold);
  find("#threshold").min = model.score_floor;
  find("#storage").textContent = model.stores === "always"
    ? "They are stored and scored again." : "They are looked at and not stored.";
}

function setThreshold(value) {
  threshold = value;
  find("#threshold").value = value;
  find("#threshold-value").textContent = percent(value);
  for (const card of cards.values()) draw(card);
}

function add(files) {
  const pictures = [...files];
  if (!pictures.length) return;
  for (const file of pictures) {
    const element = find("#card").content.firstElementChild.cloneNode(true);
    const card = { file, element, answer: null, bitmap: null, tries: 0 };
    cards.set(element, card);
    find("h2", element).textContent = file.name || "picture";
    find(".remove", element).addEventListener("click", () => remove(card));
    find(".again", element).addEventListener("click", () => send(card));
    find(".download", element).addEventListener("click", () => download(card));
    find(".save-json", element).addEventListener("click", () =>
      save(new Blob([find("pre", element).textContent], { type: "application/json" }), card, "json"));
    find("#results").append(element);
    send(card);
  }
  find("#controls").hidden = false;
  say(`${pictures.length === 1 ? "One picture was" : `${pictures.length} pictures were`} added.`);
}

function remove(card) {
  card.bitmap?.close();
  cards.delete(card.element);
  const next = card.element.nextElementSibling || card.element.previousElementSibling;
  card.element.remove();
  find("#controls").hidden = !cards.size;
  (next || find("#files")).focus();
  say("The picture was removed.");
}

function send(card) {
  tell(card, "Waiting …");
  find(".again", card.element).hidden = true;
  waiting.push(card);
  work();
}

async function work() {
  while (underWay < AT_ONCE && waiting.length) {
    const card = waiting.shift();
    if (!cards.has(card.element)) continue;
    underWay += 1;
    look(card).catch((error) => fail(card, error.message)).finally(() => { underWay -= 1; work(); });
  }
}

async function look(card) {
  tell(card, "Looking at it …");
  if (!card.bitmap) {
    // Upright, as the service sees it.
    card.bitmap = await createImageBitmap(card.file, { imageOrientation: "from-image" }).catch(() => null);
    if (card.bitmap) draw(card);
  }
  const form = new FormData();
  form.append("file", card.file);
  let response;
  // All that is kept, so that the slider needs no other request.
  const floor = model ? `&threshold=${model.score_floor}` : "";
  try {
    response = await fetch(`predict/?format=json${floor}`, { method: "POST", body: form, headers: headers() });
  } catch {
    return fail(card, "the service cannot be reached");
  }
  if (response.status === 401) askModel();
  const pause = Number(response.headers.get("Retry-After"));
  if ((response.status === 429 || response.status === 503) && pause && card.tries < 5) {
    card.tries += 1;
    tell(card, `${await problem(response)} (goes on by itself)`);
    setTimeout(() => send(card), 1000 * pause);
    return;
  }
  if (!response.ok) return fail(card, await problem(response));
  card.answer = await response.json();
  find(".download", card.element).hidden = !card.bitmap;
  find("details", card.element).hidden = false;
  // It was replaced since it was asked for.
  if (model && card.answer.model !== model.model) await askModel();
  if (threshold === null) setThreshold(card.answer.threshold);
  draw(card);
  say(`${card.file.name}: ${find(".summary", card.element).textContent}`);
}

function tell(card, text) {
  const line = find(".summary", card.element);
  line.className = "summary dim";
  line.textContent = text;
}

function fail(card, message) {
  const line = find(".summary", card.element);
  line.className = "summary bad";
  line.textContent = `Not looked at: ${message}.`;
  find(".again", card.element).hidden = false;
  say(`${card.file.name}: ${line.textContent}`);
}

function shown(card) {
  return card.answer ? card.answer.detections.filter((one) => one.score >= threshold) : [];
}

function draw(card) {
  const { element, answer, bitmap } = card;
  if (answer) {
    const above = shown(card);
    const line = find(".summary", element);
    line.className = "summary";
    line.replaceChildren(
      above.length ? `${boxes(above.length)}, surest ${percent(above[0].score)} · ` : "No box at this threshold · ",
      Object.assign(document.createElement("span"), { className: "state", textContent: "unreviewed" }));
    list(card, above);
  }
  const canvas = find("canvas", element);
  if (!bitmap) {
    canvas.hidden = true;
    return;
  }
  canvas.hidden = false;
  canvas.width = bitmap.width;
  canvas.height = bitmap.height;
  canvas.setAttribute("aria-label", answer
    ? `${card.file.name}, ${boxes(shown(card).length)}` : card.file.name);
  const context = canvas.getContext("2d");
  context.drawImage(bitmap, 0, 0);
  if (!answer) return;
  // As thick on the screen whatever the size of the picture.
  const scale = Math.max(1, Math.max(bitmap.width / 360, bitmap.height / 500));
  const colour = getComputedStyle(document.documentElement).getPropertyValue("--box");
  context.lineWidth = 2.5 * scale;
  context.font = `600 ${14 * scale}px system-ui, sans-serif`;
  context.textBaseline = "top";
  const found = shown(card).reverse();
  context.strokeStyle = colour;
  for (const { box: [left, top, right, bottom] } of found) {
    context.strokeRect(left, top, right - left, bottom - top);
  }
  const label = (text, left, top, ground) => {
    const width = context.measureText(text).width + 8 * scale;
    context.fillStyle = ground;
    context.fillRect(Math.max(0, Math.min(left, bitmap.width - width)), top, width, 18 * scale);
    context.fillStyle = "#fff";
    context.fillText(text, Math.max(0, Math.min(left, bitmap.width - width)) + 4 * scale, top + 2 * scale);
  };
  for (const { box: [left, top], score } of found) {
    label(percent(score), left, top >= 18 * scale ? top - 18 * scale : top, colour);
  }
  label("unreviewed", 0, bitmap.height - 18 * scale, "#333");
}

function list(card, above) {
  const rows = card.answer.detections.map(({ box, score }) => {
    const row = document.createElement("tr");
    row.className = score >= threshold ? "" : "below";
    for (const value of [percent(score), ...box.map((v) => Math.round(v))]) {
      row.append(Object.assign(document.createElement("td"), { textContent: value }));
    }
    return row;
  });
  find("tbody", card.element).replaceChildren(...rows);
  find("pre", card.element).textContent = JSON.stringify({ ...card.answer, threshold, detections: above }, null, 2);
}

function save(blob, card, suffix) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = `${(card.file.name || "picture").replace(/\.[^.]*$/, "")}-unreviewed.${suffix}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

function download(card) {
  find("canvas", card.element).toBlob((blob) => blob && save(blob, card, "png"), "image/png");
}

find("#files").addEventListener("change", (event) => { add(event.target.files); event.target.value = ""; });
find("#camera").addEventListener("change", (event) => { add(event.target.files); event.target.value = ""; });
find("#threshold").addEventListener("input", (event) => setThreshold(Number(event.target.value)));
find("#reset").addEventListener("click", () => model && setThreshold(model.threshold));
find("#clear").addEventListener("click", () => { for (const card of [...cards.values()]) remove(card); });
find("#key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = find("#key").value.trim();
  sessionStorage.setItem("key", key);
  askModel();
});
// A desktop's browser takes the second button for another way to choose files.
find("#camera-label").hidden = !matchMedia("(pointer: coarse)").matches;
const drop = find("#drop");
for (const name of ["dragenter", "dragover"]) {
  addEventListener(name, (event) => { event.preventDefault(); drop.classList.add("over"); });
}
addEventListener("dragleave", (event) => { if (!event.relatedTarget) drop.classList.remove("over"); });
addEventListener("drop", (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  add(event.dataTransfer.files);
});
addEventListener("paste", (event) => add(event.clipboardData.files));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => cards.forEach(draw));
askModel();
