// The page of the service: photos go in, names come out. What the server says only ever becomes text, never markup.

import { setUpSearch } from "./search.js";
import { TEXT, WORDS } from "./texts.js";

const AT_ONCE = 2;        // requests at the same time
const BY_ITSELF = 3;      // times that a photo is sent again after a countdown
const LIST = 20_000, ORDER = 100_000; // characters of a list of drugs, and bytes of its file
const PATIENCE = 120_000; // milliseconds of silence until an answer counts as lost
const MAY_CHANGE = [408, 425, 429, 502, 503, 504]; // statuses that the same photo may not get again
const LONG_SIDE = 2560;   // pixels that are sent at most
const SMALL = 2_000_000;  // bytes that are sent as they are
const QUALITY = 0.92;     // of the JPEG that is sent instead of a large photo
const KEPT_SIDE = 1024;   // pixels of a picture that survives a reload
const FRAME_SIDE = 640;   // pixels of a camera's frame that is judged
const FRAME_PAUSE = 300;  // milliseconds between two frames
const KEY = "pillsnap-key", LANGUAGE = "pillsnap-language", RESULTS = "pillsnap-results";

const byId = (id) => document.getElementById(id);
const recall = (storage, name) => {
  try { return window[storage].getItem(name); } catch { return null; } // a browser may forbid storage
};
const remember = (storage, name, value) => {
  try { window[storage].setItem(name, value); } catch { /* then it holds until the page is left */ }
};
const cards = []; // one for each photo, newest first
const queue = []; // cards that wait for their turn
let language = [recall("localStorage", LANGUAGE), navigator.language.slice(0, 2)].find((name) => name in TEXT) ?? "en";
let asking = 0;   // requests under way
let keeping = 0;  // how often results were kept
let several = true; // whether the server names several pills of a photo
let camera = null;  // the stream of a camera that is aimed

function say(name, ...values) {
  const text = TEXT[language][name];
  return typeof text === "function" ? text(...values) : text;
}

function number(value, options) {
  return new Intl.NumberFormat(language, options).format(value);
}

function percent(share) { // nobody is 100 % certain; the Python client rounds alike
  return number(Math.min(99, Math.floor(100 * share + 0.5)) / 100, { style: "percent" });
}

function translated(sentence) { // a note or a hint, null where it has no translation
  for (const [pattern, meaning] of TEXT[language].sentences) {
    const found = pattern.exec(sentence);
    if (found) return meaning(...found.slice(1));
  }
  return language === "en" ? sentence : null;
}

function sentence(text) {
  const known = translated(text);
  return known ? make("p", {}, known) : make("p", { lang: "en" }, text);
}

function words(text) { // of a label; unknown ones stay
  const [from, to] = language === "en" ? [0, 1] : [1, 0];
  const word = (part) => WORDS.find((pair) => pair[from] === part.trim())?.[to];
  return word(text) ?? text.split(/(\s*[,|/]\s*)/).map((part) => word(part) ?? part).join("");
}

function imprint(text) { // "M분할선25" of a label is "M | 25"
  const named = [];
  const sign = (pattern, shown, name) => (all) => all.replace(pattern, () => { named.push(name); return shown; });
  const signs = [
    sign(/십자\s*분할선/g, " + ", "cross"), sign(/분할선/g, " | ", "score"),
    sign(/마크|로고/g, ` [${say("logo")}] `, null),
  ];
  const shown = signs.reduce((all, one) => one(all), text).replace(/\s+/g, " ").trim();
  const meaning = [...new Set(named)].filter(Boolean).map((name) => say(name));
  return meaning.length ? `${shown} (${meaning.join(", ")})` : shown;
}

const nameOf = ({ name, details }) => (language === "en" && details.name_en) || name;

function found({ pills, model }) { // where the detector found nothing, the rest is a guess from the whole photo
  return pills.filter((one) => one.box_confidence !== null || model.detector === null);
}

// ---- Building the page: strings become text nodes.

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== false && value !== null) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(2).filter((child) => child !== null));
  return node;
}
const make = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const draw = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

function boxes({ photo }, pills, outlined) {
  const around = ({ box, verdict, outline }) => {
    const look = { class: verdict };
    if (outlined && outline?.length)
      return outline.map((points) => draw("polygon", { ...look, points: points.join(" ") }));
    return draw("rect", { ...look, x: box.x1, y: box.y1, width: box.x2 - box.x1, height: box.y2 - box.y1 });
  };
  const radius = Math.max(photo.width, photo.height) / 30;
  const places = placeBadges(photo, pills.map(({ box }) => box), radius);
  const badge = ({ verdict, box }, index) => {
    const { x, y, away } = places[index];
    const end = { x2: Math.min(Math.max(x, box.x1), box.x2), y2: Math.min(Math.max(y, box.y1), box.y2) };
    return draw("g", { class: verdict }, away ? draw("line", { x1: x, y1: y, ...end }) : null,
      draw("circle", { cx: x, cy: y, r: radius }),
      draw("text", { x, y, dy: "0.36em", "font-size": 1.1 * radius },
        `${index + 1}${verdict === "identified" ? "" : "?"}`));
  };
  const whole = `0 0 ${photo.width} ${photo.height}`;
  return draw("svg", { "aria-hidden": "true", viewBox: whole, preserveAspectRatio: "none" },
    pills.map(around), pills.map(badge));
}

function placeBadges(photo, boxes, radius) { // beside their boxes, and where they cover neither a pill nor a badge
  const overlap = (x, y, size, other) =>
    Math.max(0, Math.min(x + size, other.x2) - Math.max(x - size, other.x1)) *
    Math.max(0, Math.min(y + size, other.y2) - Math.max(y - size, other.y1));
  const within = (value, size) => Math.min(Math.max(value, radius), Math.max(size - radius, radius));
  const placed = [];
  for (const box of boxes) {
    let best = null;
    for (const step of [1.15, 2.3, 3.5, 5, 7, 9]) {
      const away = step * radius, middle = [(box.x1 + box.x2) / 2, (box.y1 + box.y2) / 2];
      const columns = [box.x1 + radius, box.x2 - radius, middle[0]];
      const rows = [box.y1 + radius, box.y2 - radius, middle[1]];
      const around = [
        ...[box.y1 - away, box.y2 + away].flatMap((y) => columns.map((x) => [x, y])),
        ...[box.x1 - away, box.x2 + away].flatMap((x) => rows.map((y) => [x, y])),
        ...[box.y1 - away, box.y2 + away].flatMap((y) => [box.x1 - away, box.x2 + away].map((x) => [x, y])),
        [box.x1 + radius, box.y1 + radius], [box.x2 - radius, box.y1 + radius], // inside, at a corner
        [box.x1 + radius, box.y2 - radius], [box.x2 - radius, box.y2 - radius],
      ];
      for (const [wishedX, wishedY] of around) {
        const x = within(wishedX, photo.width), y = within(wishedY, photo.height);
        const covered = boxes.reduce((sum, other) => sum + overlap(x, y, 1.05 * radius, other), 0) +
          20 * placed.reduce((sum, other) => sum + overlap(x, y, 1.1 * radius, other), 0);
        const cost = covered / radius ** 2 + 0.01 * step;
        if (!best || cost < best.cost - 1e-9) best = { x, y, cost, away: step > 2 };
      }
    }
    placed.push({ ...best, x1: best.x - radius, y1: best.y - radius, x2: best.x + radius, y2: best.y + radius });
  }
  return placed;
}

function pairs(kind, rows) {
  return make("dl", { class: kind }, rows.map(([name, value]) =>
    make("div", {}, make("dt", {}, name), make("dd", {}, value))));
}

function facts({ code, edi_codes, maker, details }, more = []) {
  const english = language === "en";
  const known = {
    code, edi: edi_codes.join(", ") || say("none"),
    maker: (english && details.company_en) || maker, shape: words(details.shape ?? ""),
    colors: words(details.colors ?? ""), form: words(details.form ?? ""),
    front: imprint(details.print_front ?? ""), back: imprint(details.print_back ?? "")
  };
  const rows = Object.entries(known).filter(([, value]) => value).map(([name, value]) => [say(name), value]);
  return pairs("facts", [...rows, ...more]);
}

function confidence(share) {
  const meaning = {
    role: "meter", "aria-label": say("confidence"), "aria-valuemin": 0, "aria-valuemax": 1,
    "aria-valuenow": share, "aria-valuetext": percent(share)
  };
  return make("div", { class: "confidence" },
    draw("svg", meaning, draw("rect", { width: `${100 * share}%`, height: "100%" })),
    make("span", {}, percent(share)));
}

function titleOf(answer) { // the name only where one drug stands out
  if (answer.verdict === "identified") return nameOf(answer);
  return answer.verdict === "ambiguous" ? say("perhaps", nameOf(answer)) : say("no_name");
}

function about({ verdict, alike, differ, reason }) { // the verdict in words, and why
  if (verdict !== "ambiguous") return say(verdict);
  const marks = differ.map((mark) => say(`mark_${mark}`)).join(", ");
  const why = reason.reason === "look_alikes" ? say("ambiguous", alike) : `${say("doubt")} ${reason[language]}`;
  return [why, marks ? say("differ", marks) : say("compare")].join(" ");
}

function compared(answer, { answer: { photo }, picture }) { // the pill of the photo beside a reference of its drug
  if (!answer.picture || answer.verdict === "unknown") return null;
  const { x1, y1, x2, y2 } = answer.box;
  const crop = draw("svg", { viewBox: `${x1} ${y1} ${x2 - x1} ${y2 - y1}`, role: "img", "aria-label": say("own") },
    draw("image", { href: picture.src, width: photo.width, height: photo.height, preserveAspectRatio: "none" }));
  return make("div", { class: "compared" },
    make("figure", {}, crop, make("figcaption", {}, say("own"))),
    make("figure", {}, reference(answer), make("figcaption", {}, say("reference"))));
}

function reference({ picture, ...drug }) {
  return picture ? make("img", { src: picture, alt: `${say("reference")}: ${nameOf(drug)}` }) : null;
}

function pill(answer, index, all, card) {
  const whole = answer.box_confidence === null, identified = answer.verdict === "identified";
  return make("li", { class: `pill ${answer.verdict}` },
    make("h4", {}, make("span", { class: "number" }, String(index + 1)), titleOf(answer)),
    make("div", { class: "level" },
      make("p", { class: "verdict" }, about(answer)), identified ? confidence(answer.confidence) : null),
    compared(answer, card),
    facts(answer, [
      ...(whole ? [[say("detection"), say("whole")]] : []),
      ...(answer.imprint ? [[say("imprint"), answer.imprint]] : [])
    ]),
    identified ? null
      : make("button", { type: "button", onclick: () => look.fill(seen(answer)) }, say("look_this")),
    make("details", { open: answer.verdict === "ambiguous" && all.length < 3 },
      make("summary", {}, say("candidates", answer.candidates.length)),
      make("ol", {}, answer.candidates.map((candidate) =>
        make("li", {}, make("b", {}, nameOf(candidate)), reference(candidate), confidence(candidate.confidence),
          facts(candidate))))));
}

function seen({ verdict, confidence: best, candidates, imprint: read }) { // what the search is filled with
  // What looks like no drug of the model has the colour and shape of none of them.
  const likely = verdict === "unknown" ? [] : candidates.filter(({ confidence: share }) => share >= best / 2);
  const english = (text) => (text ?? "").split(",").map((word) => word.trim())
    .map((word) => WORDS.find(([korean]) => korean === word)?.[1] ?? word).filter(Boolean);
  const common = (name) => likely.map(({ details }) => english(details[name]))
    .reduce((all, words) => all?.filter((word) => words.includes(word)) ?? words, null) ?? [];
  // One letter is soon read into a shadow.
  return { imprint: read?.length > 1 ? read : "", colors: common("colors"), shapes: common("shape") };
}

function recommendation(card, { pipeline, reason }) {
  return make("div", { class: "hint" },
    make("p", {}, make("b", {}, say("hint"))), sentence(reason), repeat(card, pipeline, "main"));
}

function repeat(card, pipeline, look) { // a button, where the photo is still there
  if (!card.file) return make("p", {}, say("gone"));
  const again = () => askAgain(card, pipeline);
  return make("button", { type: "button", class: look, onclick: again }, say(`again_${pipeline}`));
}

function advice({ quality }) { // what is wrong with the photo, before the answer
  if (!quality?.reasons.length) return null;
  return make("div", { class: quality.good_enough ? "notes" : "notes poor" },
    make("b", {}, say(quality.good_enough ? "could_be_better" : "poor")),
    quality.reasons.map((reason) => make("p", {}, reason[language])));
}

function turn(card) { // the other side of the pill, asked together with this one
  const taken = make("input", { type: "file", accept: "image/*,.heic,.heif,.avif", hidden: true, onchange: () => {
    Object.assign(card, { back: taken.files[0], preparedBack: null });
    if (card.back) askAgain(card, "single");
  } });
  return [make("button", { type: "button", onclick: () => taken.click() }, say(card.back ? "new_back" : "add_back")),
    taken];
}

function recolor(card) { // the photo in the colours that were compared, or as it was
  const again = () => {
    card.corrected = !card.corrected;
    askAgain(card, card.pipeline);
  };
  return make("button", { type: "button", "aria-pressed": String(Boolean(card.corrected)), onclick: again },
    say(card.corrected ? "original" : "corrected"));
}

function trace(card) { // outlines instead of boxes, asked for once
  const again = () => {
    card.outlined = !card.outlined;
    if (card.outlined && !hasOutlines(card)) askAgain(card, card.pipeline);
    else render(card);
  };
  return make("button", { type: "button", "aria-pressed": String(Boolean(card.outlined)), onclick: again },
    say("outlines"));
}
const hasOutlines = ({ answer }) => answer.pills.some((one) => one.outline);

function comparison({ prescription, pills }) { // with the drugs that were expected
  if (!prescription) return null;
  const { complete, matched, missing, surplus, doubtful, unknown } = prescription;
  const at = (place) => `${place + 1} ${nameOf(pills[place])}`;
  const coded = ({ code, name }) => `${name} (${code})`;
  const rows = {
    expected_matched: matched.map((one) => `${one.pill + 1} ${coded(one)}`), expected_missing: missing.map(coded),
    expected_surplus: surplus.map(at), expected_doubtful: doubtful.map(({ pill, drugs }) =>
      `${pill + 1}: ${drugs.map(coded).join(say("or"))}?`),
    expected_unknown: unknown,
  };
  return make("div", { class: complete ? "prescription complete" : "prescription" },
    make("b", {}, say(complete ? "expected_complete" : "expected_open")),
    Object.entries(rows).filter(([, texts]) => texts.length)
      .map(([name, texts]) => make("p", {}, `${say(name)}: ${texts.join(", ")}`)));
}

function internals({ timings_ms, model, pills, quality }) {
  const times = Object.entries(timings_ms).map(([name, time]) => [name === "imprint" ? "read_imprint" : name, time])
    .map(([step, time]) => [say(step) ?? step, `${number(time, { maximumFractionDigits: time < 10 ? 1 : 0 })} ms`]);
  const networks = [model.classifier, model.detector, model.version].filter(Boolean).join(", ");
  const seen = pills.map((one) => (one.box_confidence === null ? "–" : percent(one.box_confidence))).join(", ");
  const other = pills.filter((one) => nameOf(one) !== one.name).map((one) => one.name).join(", ");
  const korean = other ? [[say("korean"), other]] : [];
  return make("details", { class: "internals" }, make("summary", {}, say("details")),
    make("small", {}, say("time")), pairs("timings", times),
    pairs("facts", [
      [say("detection"), seen || "–"], [say("quality"), quality ? `${quality.tier} (${percent(quality.score)})` : "–"],
      ...korean, [say("model"), networks]]));
}

function result(card) {
  const { notes, hint, notice } = card.answer, pills = found(card.answer);
  const other = card.pipeline === "single" ? "combo" : "single";
  const told = pills.length ? notes : notes.filter((note) => !/^No pill was (found|detected)/.test(note));
  const offered = hint?.pipeline === other || !several || !pills.length || !card.file;
  return [
    advice(card.answer),
    comparison(card.answer),
    card.expected && card.back && card.pipeline === "single"
      ? make("p", { class: "notes" }, say("expected_one_side")) : null,
    pills.length ? make("ol", { class: "pills" }, pills.map((one, index, all) => pill(one, index, all, card)))
      : make("div", { class: "notes nothing" }, make("b", {}, say("nothing")), make("p", {}, say("nothing_about"))),
    hint ? recommendation(card, hint) : null,
    told.length ? make("div", { class: "notes" }, make("b", {}, say("notes")), told.map(sentence)) : null,
    language === "en" ? make("small", { lang: "en" }, notice) : make("small", {}, say("notice")),
    offered ? null : make("div", { class: "actions" }, repeat(card, other, "")),
    card.file && card.pipeline === "single" && pills.length && !card.answer.prescription
      ? make("div", { class: "turn" }, turn(card)) : null,
    card.file && card.answer.model.color !== "none" ? make("div", { class: "actions" }, recolor(card)) : null,
    pills.length && card.answer.model.segmenter && (card.file || hasOutlines(card))
      ? make("div", { class: "actions" }, trace(card)) : null,
    internals(card.answer),
  ];
}

function failure(card) {
  const { own, code, detail, request, retry } = card.problem, seconds = secondsLeft(card);
  const known = own ? say(own) : TEXT[language].problems[code];
  const shown = known ? make("p", {}, make("b", {}, known)) : say("refused") ? make("p", {}, say("refused")) : null;
  return [
    make("div", { class: "problem", role: "alert" }, shown,
      detail && !known ? make("p", { lang: "en" }, make("b", {}, detail)) : null,
      request ? make("small", {}, `${say("request")}: `, make("code", {}, request)) : null),
    retry ? make("div", { class: "actions" },
      make("button", { type: "button", disabled: seconds > 0, onclick: () => askAgain(card, card.pipeline) },
        say("again")),
      make("span", { role: "timer" }, seconds > 0 ? countdown(card, seconds) : "")) : null,
  ];
}

function summary(card) {
  const pills = found(card.answer);
  const named = pills.map((one, index) =>
    `${index + 1}: ${titleOf(one)}, ${about(one)}, ${percent(one.confidence)}`);
  const { quality } = card.answer, poor = quality && !quality.good_enough ? [say("poor")] : [];
  return [`${card.name}: ${say("pills", named.length)}`, ...poor, ...named].join(". ");
}

function busy(card) {
  return [make("div", { class: "busy" }, make("span", {}, say(card.state)),
    card.state === "sending" ? make("progress", { max: 1, value: 0, "aria-label": say("sent") }) : null)];
}

function render(card) {
  const focused = card.node.contains(document.activeElement);
  const about = card.state === "done" ? say("pills", found(card.answer).length)
    : card.state === "failed" ? say("failed") : "";
  card.picture.alt = card.state === "done" ? summary(card) : card.name;
  card.title = make("h3", { tabindex: -1 }, card.name,
    make("small", {}, [say(card.pipeline), about].filter(Boolean).join(" · ")));
  const remove = make("button",
    { type: "button", "aria-label": say("remove_this", card.name), onclick: () => discard(card) }, say("remove"));
  const body = { done: result, failed: failure }[card.state] ?? busy;
  const photo = card.broken ? null : make("div", { class: "photo" },
    card.picture, card.state === "done" && found(card.answer).length
      ? boxes(card.answer, found(card.answer), card.outlined) : null);
  card.node.replaceChildren(
    make("header", {}, card.title, remove),
    make("div", { class: "sides" },
      ...[photo, make("div", { class: "body" }, body(card).filter(Boolean))].filter(Boolean)));
  if (focused) card.title.focus({ preventScroll: true });
}

// ---- What is sent: a small photo as it is, a large one shrunk, both as they are shown.

// What only the server knows how to turn: orientation in XMP, or in the EXIF of anything but a JPEG.
const TURNED = /tiff:Orientation/;
const TURNED_ELSEWHERE = /tiff:Orientation|Exif\0\0|EXIF|eXIf|XMP |com\.adobe\.xmp|^.{4}ftyp/s;

async function prepare(file) { // the file to send, and whether the server has to show how it sees it
  const bitmap = await createImageBitmap(file).catch(() => null);
  if (!bitmap) return { sent: file, unseen: true };
  const bytes = new TextDecoder("latin1").decode(await file.arrayBuffer()), jpeg = bytes.startsWith("\xff\xd8");
  if ((jpeg ? TURNED : TURNED_ELSEWHERE).test(bytes)) return { sent: file, unseen: true };
  const scale = Math.min(1, LONG_SIDE / Math.max(bitmap.width, bitmap.height));
  if ((scale === 1 && file.size <= SMALL) || (jpeg && mayBeCut(bytes, bitmap))) return { sent: file, unseen: false };
  return { sent: await shrink(bitmap, scale), unseen: false };
}

// A browser shows a JPEG that ends early; sent anew it would look whole, so the server gets the file itself.
function mayBeCut(bytes, bitmap) {
  const progressive = /\xff\xc2\0[\x08-\x20]\x08/.test(bytes); // where it ends early, it is only less sharp
  if (progressive || bytes.lastIndexOf("\xff\xd9") < bytes.lastIndexOf("\xff\xda")) return true;
  const row = canvasOf(bitmap.width, 1).getContext("2d");
  row.drawImage(bitmap, 0, 1 - bitmap.height);
  const { data } = row.getImageData(0, 0, bitmap.width, 1);
  return data.every((value, index) => index % 4 === 3 || Math.abs(value - 128) < 3); // the grey of what is missing
}

function canvasOf(width, height) {
  return Object.assign(document.createElement("canvas"), { width, height });
}

async function shrink(bitmap, scale, quality = QUALITY) { // a JPEG in sRGB, upright
  const width = Math.max(1, Math.round(bitmap.width * scale)), height = Math.max(1, Math.round(bitmap.height * scale));
  const small = await createImageBitmap(bitmap, { resizeWidth: width, resizeHeight: height, resizeQuality: "high" });
  const canvas = canvasOf(width, height), brush = canvas.getContext("2d");
  brush.fillStyle = "white"; // below what is transparent, as the server does
  brush.fillRect(0, 0, width, height);
  brush.drawImage(small, 0, 0);
  return new Promise((resolve) => { canvas.toBlob(resolve, "image/jpeg", quality); });
}

function show(card, source) {
  URL.revokeObjectURL(card.picture.src);
  card.broken = false;
  card.picture.src = source;
}

// ---- Asking the server.

function cardOf(name, pipeline, file, source) {
  const card = { name, pipeline, file, tries: 0, node: make("article", { class: "card" }), picture: make("img", {}) };
  // The browser can't show this file.
  card.picture.addEventListener("error", () => { card.broken = true; render(card); });
  card.picture.src = source;
  return card;
}

function add(files) {
  byId("drop-problem")?.remove();
  const pipeline = document.querySelector("[name=pipeline]:checked").value;
  const expected = byId("expected").value.trim();
  const added = files.map((file) =>
    Object.assign(cardOf(file.name, pipeline, file, URL.createObjectURL(file)), { expected }));
  cards.unshift(...added);
  byId("cards").prepend(...added.map((card) => card.node));
  byId("none-yet").hidden = cards.length > 0;
  added.forEach(enqueue);
  added[0]?.node.scrollIntoView({ block: "start" });
}

function discard(card) {
  card.stop?.();
  clearInterval(card.clock);
  URL.revokeObjectURL(card.picture.src);
  for (const list of [cards, queue]) if (list.includes(card)) list.splice(list.indexOf(card), 1);
  card.node.remove();
  keep();
  byId("none-yet").hidden = cards.length > 0;
  (cards[0]?.title ?? byId("choose")).focus();
}

function askAgain(card, pipeline) {
  card.pipeline = pipeline;
  card.tries = 0;
  enqueue(card);
}

function enqueue(card) {
  clearInterval(card.clock);
  card.state = "waiting";
  render(card);
  queue.push(card);
  next();
}

async function next() {
  if (asking >= AT_ONCE || queue.length === 0) return;
  const card = queue.shift();
  asking += 1;
  card.state = "preparing";
  render(card);
  Object.assign(card, await ask(card));
  asking -= 1;
  if (cards.includes(card)) settle(card);
  next();
}

function settle(card) { // the answer is here, or it never will be
  render(card);
  if (card.state === "done") {
    announce(summary(card));
    keep();
  }
  if (card.problem?.key) wantKey();
  if (card.until > Date.now()) card.clock = setInterval(() => tick(card), 250);
}

async function ask(card) {
  const failed = (problem, until = 0) => ({ state: "failed", problem, until });
  const key = byId("key").value.trim();
  if (/[^\x21-\x7e]/.test(key)) return failed({ own: "key_odd", key: true });
  card.prepared ??= await prepare(card.file);
  if (card.back) card.preparedBack ??= await prepare(card.back);
  if (!cards.includes(card)) return {};
  if (card.prepared.sent !== card.file) show(card, URL.createObjectURL(card.prepared.sent));
  const { own, status, text, header } = await post(card, key);
  if (own) return failed({ own, retry: true });
  const told = parse(text);
  if (status === 200 && told.photo) {
    const shown = told.corrected || told.picture;
    if (shown) show(card, shown);
    else if (card.recolored) show(card, URL.createObjectURL(card.prepared.sent));
    card.recolored = Boolean(told.corrected);
    return { state: "done", answer: { ...told, picture: null, corrected: null }, problem: null };
  }
  const until = waitUntil(status, header("Retry-After"));
  card.tries += until ? 1 : 0;
  const reason = typeof told.detail === "string" ? { detail: told.detail, code: told.code } : { own: "silent" };
  const retry = reason.own || MAY_CHANGE.includes(status) || told.code === "upload_ended";
  const request = told.request_id ?? header("X-Request-ID");
  return failed({ ...reason, request, retry, key: [401, 403].includes(status) }, until);
}

function parse(text) { // something between here and the server may answer with a page
  try { return JSON.parse(text) ?? {}; } catch { return {}; }
}

function post(card, key) { // only XMLHttpRequest tells how much is sent
  const { sent, unseen } = card.prepared, form = new FormData(), request = new XMLHttpRequest();
  form.append("image", sent, card.name);
  const turned = card.back && card.pipeline === "single";
  if (turned) form.append("image_back", card.preparedBack.sent, card.back.name);
  else if (card.expected) form.append("expected", card.expected); // a list is for all pills of one photo
  return new Promise((resolve) => {
    let clock = 0;
    const end = (answer) => { clearTimeout(clock); resolve(answer); };
    const wait = () => {
      clearTimeout(clock);
      clock = setTimeout(() => { end({ own: "late" }); request.abort(); }, PATIENCE);
    };
    request.upload.addEventListener("progress", ({ loaded, total }) => { wait(); progress(card, loaded / total); });
    request.upload.addEventListener("load", () => { wait(); card.state = "asking"; render(card); });
    request.addEventListener("load", () => end({
      status: request.status, text: request.responseText, header: (name) => request.getResponseHeader(name)
    }));
    for (const kind of ["error", "abort"]) request.addEventListener(kind, () => end({ own: "unreachable" }));
    const wanted = [unseen && "&picture=true", card.corrected && "&corrected=true", card.outlined && "&masks=true"]
      .filter(Boolean).join("");
    request.open("POST", `predict?pipeline=${card.pipeline}${wanted}`);
    if (key) request.setRequestHeader("X-API-Key", key);
    card.stop = () => request.abort();
    card.state = "sending";
    render(card);
    wait();
    request.send(form);
  });
}

function progress(card, share) {
  const bar = card.node.querySelector("progress");
  if (!bar) return;
  bar.value = share;
  bar.previousSibling.textContent = `${say("sending")}: ${number(share, { style: "percent" })}`;
}

function waitUntil(status, wanted) { // milliseconds since 1970, 0 = no need to wait
  if (!wanted || ![429, 503].includes(status)) return 0;
  return Math.max(
    Date.now() + 1000, /^\d+$/.test(wanted) ? Date.now() + 1000 * Number(wanted) : Date.parse(wanted) || 0);
}

function secondsLeft(card) {
  return Math.ceil((card.until - Date.now()) / 1000);
}

function countdown(card, seconds) {
  return say(card.tries <= BY_ITSELF ? "countdown" : "wait", seconds);
}

function tick(card) {
  const seconds = secondsLeft(card), timer = card.node.querySelector("[role=timer]");
  if (seconds > 0) {
    if (timer) timer.textContent = countdown(card, seconds);
    return;
  }
  clearInterval(card.clock);
  if (card.tries <= BY_ITSELF) enqueue(card);
  else render(card);
}

// ---- Results outlive a reload, in this tab.

async function keep() {
  const turn = ++keeping, done = cards.filter((card) => card.state === "done");
  const kept = await Promise.all(done.map(async (card) =>
    ({ name: card.name, pipeline: card.pipeline, answer: card.answer, source: await thumbnail(card) })));
  if (turn !== keeping) return; // a later one holds more
  for (; kept.length; kept.pop()) { // the oldest go where the storage is full
    try { sessionStorage.setItem(RESULTS, JSON.stringify(kept)); return; } catch { /* one less */ }
  }
  try { sessionStorage.removeItem(RESULTS); } catch { /* forbidden: then nothing was kept */ }
}

async function thumbnail(card) {
  if (card.kept?.of === card.picture.src) return card.kept.source;
  const { picture } = card, of = picture.src;
  await picture.decode().catch(() => null);
  const scale = Math.min(1, KEPT_SIDE / Math.max(picture.naturalWidth, picture.naturalHeight, 1));
  const canvas = canvasOf(Math.round(picture.naturalWidth * scale), Math.round(picture.naturalHeight * scale));
  canvas.getContext("2d").drawImage(picture, 0, 0, canvas.width, canvas.height);
  card.kept = { of, source: card.broken ? "" : canvas.toDataURL("image/jpeg", 0.85) };
  return card.kept.source;
}

function restore() {
  for (const { name, pipeline, answer, source } of JSON.parse(recall("sessionStorage", RESULTS) ?? "[]")) {
    const card = Object.assign(cardOf(name, pipeline, null, source), { state: "done", answer, problem: null });
    card.broken = !source;
    card.kept = { of: card.picture.src, source };
    render(card);
    cards.push(card);
    byId("cards").append(card.node);
  }
  byId("none-yet").hidden = cards.length > 0;
}

function announce(text) {
  byId("said").append(make("p", {}, text));
  if (byId("said").children.length > 5) byId("said").firstChild.remove();
}

function wantKey() {
  byId("key").setAttribute("aria-invalid", "true");
  byId("key-problem").hidden = false;
  byId("key").focus();
}

async function learnWhatIsOffered() {
  // Where this fails, the first answer tells.
  let health;
  try { health = await (await fetch("health")).json(); } catch { return; }
  byId("aim").hidden = !health.model?.quality || !navigator.mediaDevices?.getUserMedia;
  several = health.pipelines.includes("combo");
  if (several) return;
  document.querySelector("fieldset").hidden = true;
  document.querySelector("[name=pipeline][value=single]").checked = true;
  cards.forEach(render);
}

// ---- Aiming: a few small frames a second are judged while the camera runs.

async function aim() {
  const wanted = { facingMode: "environment", width: { ideal: 1920 }, height: { ideal: 1080 } };
  byId("aim").disabled = true;
  try { camera = await navigator.mediaDevices.getUserMedia({ video: wanted }); } catch {
    close();
    refuse("no_camera");
    return;
  }
  byId("drop-problem")?.remove();
  byId("view").srcObject = camera;
  byId("aiming").hidden = false;
  byId("aiming").scrollIntoView({ block: "nearest" });
  advise("aim_wait");
  byId("snap").focus({ preventScroll: true });
  byId("view").play().catch(() => null); // the camera was closed before it began
  watch(camera);
}

async function watch(stream) {
  while (camera === stream) {
    const pause = await judge(stream).catch(() => { advise("unreachable"); return 2000; });
    await new Promise((resolve) => { setTimeout(resolve, pause); });
  }
}

async function judge(stream) { // returns the milliseconds until the next frame
  if (!byId("view").videoWidth) return FRAME_PAUSE;
  const key = byId("key").value.trim(), form = new FormData();
  form.append("image", await still(FRAME_SIDE, 0.85), "frame.jpg");
  const answer = await fetch("quality", { method: "POST", body: form, headers: key ? { "X-API-Key": key } : {} });
  const told = parse(await answer.text());
  if (camera !== stream) return 0;
  if ([401, 403].includes(answer.status)) {
    close();
    wantKey();
  } else if (answer.ok) {
    advise(told.good_enough ? "aim_good" : "poor", told);
  } else {
    advise("aim_wait");
  }
  return Math.max(FRAME_PAUSE, waitUntil(answer.status, answer.headers.get("Retry-After")) - Date.now());
}

function advise(name, { good_enough, reasons } = {}) {
  const text = (!good_enough && reasons?.[0]?.[language]) || say(name);
  byId("advice").className = good_enough ? "good" : "";
  if (byId("advice").textContent !== text) byId("advice").textContent = text; // said once by screen readers
}

function still(longest, quality) { // a JPEG of what the camera sees
  const { videoWidth, videoHeight } = byId("view"), scale = Math.min(1, longest / Math.max(videoWidth, videoHeight));
  const canvas = canvasOf(Math.round(videoWidth * scale), Math.round(videoHeight * scale));
  canvas.getContext("2d").drawImage(byId("view"), 0, 0, canvas.width, canvas.height);
  return new Promise((resolve) => { canvas.toBlob(resolve, "image/jpeg", quality); });
}

function close() {
  camera?.getTracks().forEach((track) => track.stop());
  camera = null;
  byId("view").srcObject = null;
  byId("aiming").hidden = true;
  byId("aim").disabled = false;
}

async function snap() {
  const photo = await still(LONG_SIDE, QUALITY);
  close();
  add([new File([photo], `${say("snapped")}.jpg`, { type: "image/jpeg" })]);
}

// ---- What a person does.

function speak(chosen) {
  language = chosen;
  document.documentElement.lang = chosen;
  document.title = `pillsnap: ${say("title")}`;
  for (const node of document.querySelectorAll("[data-text]")) node.textContent = say(node.dataset.text);
  for (const button of document.querySelectorAll("[data-language]"))
    button.setAttribute("aria-pressed", String(button.dataset.language === chosen));
  cards.forEach(render);
  look.show();
}

const look = setUpSearch({
  say, make, draw, pairs, number, words, imprint, announce,
  key: () => byId("key").value.trim(),
  refused({ own, code, detail }) { // one sentence
    if (code === "key_missing" || code === "key_wrong") wantKey();
    return own ? say(own) : TEXT[language].problems[code] ?? detail ?? say("silent");
  },
});

for (const button of document.querySelectorAll("[data-language]")) {
  button.addEventListener("click", () => {
    remember("localStorage", LANGUAGE, button.dataset.language);
    speak(button.dataset.language);
  });
}
for (const [button, input] of [["choose", "photos"], ["shoot", "camera"]]) {
  byId(button).addEventListener("click", () => byId(input).click());
  // An empty value lets the same file be chosen again.
  byId(input).addEventListener("change", ({ target }) => { add([...target.files]); target.value = ""; });
}
for (const [button, action] of [["aim", aim], ["snap", snap], ["stop", close]])
  byId(button).addEventListener("click", action);
document.addEventListener("visibilitychange", () => { if (document.hidden) close(); });
byId("expected-choose").addEventListener("click", () => byId("expected-file").click());
byId("expected-file").addEventListener("change", async ({ target }) => {
  const file = target.files[0], whole = file ? decoded(await file.slice(0, ORDER + 1).arrayBuffer()) : "";
  const long = file && (file.size > ORDER || whole.length > LIST);
  byId("expected-problem").hidden = !long;
  if (file && !long) byId("expected").value = whole;
  target.value = "";
});
function decoded(bytes) { // text as spreadsheets of both countries write it
  const [first, second] = new Uint8Array(bytes);
  const wide = first === 0xff && second === 0xfe ? "utf-16le" : first === 0xfe && second === 0xff ? "utf-16be" : "";
  if (wide) return new TextDecoder(wide).decode(bytes);
  try { return new TextDecoder("utf-8", { fatal: true }).decode(bytes); } catch { /* cp949 */ }
  return new TextDecoder("euc-kr").decode(bytes);
}
function take(event, { files }) { // what is dropped or pasted
  if (event.target.matches?.("input, textarea") && files.length === 0) return;
  event.preventDefault();
  if (files.length) add([...files]);
  else refuse();
}

function refuse(reason = "no_file") {
  byId("drop-problem")?.remove();
  const named = { id: "drop-problem", class: "problem", role: "alert", "data-text": reason };
  const problem = make("p", named, say(reason));
  document.querySelector(".drop").after(problem);
  problem.scrollIntoView({ block: "nearest" });
}

document.addEventListener("paste", (event) => take(event, event.clipboardData));
const area = document.querySelector(".drop");
// A drop beside the area must not leave the page.
document.addEventListener("dragover", (event) => { event.preventDefault(); area.classList.add("over"); });
document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) area.classList.remove("over"); });
document.addEventListener("drop", (event) => { area.classList.remove("over"); take(event, event.dataTransfer); });
byId("key").value = recall("sessionStorage", KEY) ?? "";
byId("key").addEventListener("input", ({ target }) => {
  target.removeAttribute("aria-invalid");
  byId("key-problem").hidden = true;
  remember("sessionStorage", KEY, target.value.trim());
});
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  cards.filter((card) => card.state === "failed" && card.problem.key).forEach((card) => askAgain(card, card.pipeline));
});
speak(language);
try { restore(); } catch { remember("sessionStorage", RESULTS, "[]"); } // kept by another release
learnWhatIsOffered();
