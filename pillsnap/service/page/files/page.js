// The page of the service: photos go in, names come out. What the server says only ever becomes text, never markup.

const TEXT = {
  en: {
    skip: "Skip to the results", title: "Which pill is it?",
    intro: "Photograph a pill, or a handful: each one is named, with how sure the answer is. " +
      "An imprint is often on one side only, so take the front and the back.",
    notice: "This is no medical advice: ask a pharmacist or a doctor before you take anything.",
    pipeline: "Pills in a photo", single: "One pill", combo: "Several pills",
    single_about: "The clearest pill of the photo is named.",
    combo_about: "Every pill of the photo is found and named.",
    choose: "Choose photos", shoot: "Take a photo", drop: "or drop photos here, or paste them",
    key: "API key", key_use: "Use this key",
    key_about: "It is kept until this tab is closed, and goes to this server only.",
    results: "Results", none_yet: "No photo yet.",
    private: "Your photos are sent to this server for their answers; otherwise they stay in this tab.",
    docs: "For programs: the API",
    waiting: "Waiting for its turn", asking: "Asking",
    pills: (count) => (count === 1 ? "1 pill" : `${count || "no"} pills`),
    sure: "Sure", unsure: "Not sure", compare: "Not sure: compare the imprint, and look at the other candidates",
    confidence: "Confidence", candidates: (count) => `The ${count} most likely drugs`, detection: "Detection",
    whole: "none, the whole photo was taken",
    code: "K-code", edi: "EDI codes", maker: "Maker", shape: "Shape", colors: "Colours", front: "Imprint, front",
    back: "Imprint, back", none: "none",
    time: "Time on the server", decode: "open", detect: "find", crop: "cut out", classify: "name", total: "total",
    notes: "Note", hint: "Recommendation", again: "Ask again", again_single: "Ask again for one pill",
    again_combo: "Ask again for several pills",
    remove: "Remove", remove_this: (name) => `Remove ${name}`,
    countdown: (seconds) => `Asks again by itself in ${seconds} s`,
    wait: (seconds) => `You can ask again in ${seconds} s`,
    unreachable: "The server can't be reached: check the connection, then ask again.",
    late: "No answer within two minutes: ask again.",
    silent: "There was an answer, but not one of this service: ask again later.",
    key_wanted: "The server wants an API key, or another one: type it here.",
    key_odd: "This key holds characters that no key has: copy it again.",
    request: "Request number", failed: "No answer", problems: {},
  },
  ko: {
    skip: "결과로 건너뛰기", title: "이 알약은 무엇일까요?",
    intro: "알약 하나 또는 여러 알을 찍으면 하나하나 이름과 확신도를 알려 드립니다. 글자는 한쪽에만 있는 경우가 많으니 앞면과 뒷면을 모두 찍어 주세요.",
    notice: "의학적 조언이 아닙니다. 약을 드시기 전에 약사나 의사에게 확인하세요.",
    pipeline: "사진 속 알약", single: "한 알", combo: "여러 알",
    single_about: "사진에서 가장 뚜렷한 한 알의 이름을 찾습니다.", combo_about: "사진의 모든 알약을 찾아 이름을 댑니다.",
    choose: "사진 고르기", shoot: "사진 찍기", drop: "또는 사진을 여기에 끌어다 놓거나 붙여 넣으세요",
    key: "API 키", key_use: "이 키 사용", key_about: "이 탭을 닫을 때까지만 보관하며 이 서버에만 보냅니다.",
    results: "결과", none_yet: "아직 사진이 없습니다.",
    private: "사진은 답을 얻기 위해 이 서버로만 보내며, 그 밖에는 이 탭을 벗어나지 않습니다.", docs: "프로그램을 위한 API",
    waiting: "차례를 기다리는 중", asking: "묻는 중",
    pills: (count) => (count ? `알약 ${count}개` : "알약 없음"),
    sure: "확실함", unsure: "확실하지 않음", compare: "확실하지 않음: 글자를 비교하고 다른 후보도 살펴보세요",
    confidence: "확신도", candidates: (count) => `가능성이 높은 약 ${count}개`, detection: "알약 검출", whole: "없음, 사진 전체를 사용",
    code: "K-코드", edi: "EDI 코드", maker: "제조사", shape: "모양", colors: "색", front: "앞면 글자", back: "뒷면 글자", none: "없음",
    time: "서버 처리 시간", decode: "열기", detect: "찾기", crop: "자르기", classify: "이름 찾기", total: "전체",
    notes: "참고", hint: "추천", again: "다시 묻기", again_single: "한 알로 다시 묻기", again_combo: "여러 알로 다시 묻기",
    remove: "지우기", remove_this: (name) => `${name} 지우기`, countdown: (seconds) => `${seconds}초 뒤에 저절로 다시 묻습니다`,
    wait: (seconds) => `${seconds}초 뒤에 다시 물을 수 있습니다`,
    unreachable: "서버에 연결할 수 없습니다. 연결을 확인하고 다시 물어 주세요.",
    late: "2분 안에 답이 오지 않았습니다. 다시 물어 주세요.",
    silent: "답이 왔지만 이 서비스의 답이 아닙니다. 나중에 다시 물어 주세요.",
    key_wanted: "API 키가 없거나 맞지 않습니다. 여기에 입력해 주세요.", key_odd: "키에 쓸 수 없는 문자가 있습니다. 키를 다시 복사해 주세요.",
    request: "요청 번호", failed: "답 없음",
    problems: { // what the server says in English, by its code
      key_missing: "API 키가 필요합니다.", key_wrong: "API 키가 맞지 않습니다.", too_large: "사진이 너무 큽니다.",
      too_many_pixels: "사진의 픽셀이 너무 많습니다.",
      not_an_image: "읽을 수 있는 사진이 아닙니다. JPEG, PNG, WebP, BMP를 보내 주세요.", damaged_image: "사진이 손상되었거나 잘렸습니다.",
      too_many_requests: "요청이 너무 많습니다.", no_model: "서버에 아직 모델이 없습니다.", pipeline_unavailable: "이 서버의 모델로는 할 수 없는 방식입니다.",
      not_active: "이 서버에서 쓰지 않는 방식입니다.", queue_full: "서버가 바쁩니다.", too_slow: "제시간에 답을 마치지 못했습니다.",
      upload_too_slow: "사진이 제시간에 도착하지 않았습니다.",
      upload_ended: "전송이 도중에 끝났습니다. 다시 보내 주세요.", internal_error: "서버에서 예상하지 못한 문제가 생겼습니다.",
    },
  },
};
const AT_ONCE = 2;        // requests at the same time
const BY_ITSELF = 3;      // times that a photo is sent again after a countdown
const PATIENCE = 120_000; // milliseconds until an answer counts as lost
const KEY = "pillsnap-key", LANGUAGE = "pillsnap-language";

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
let several = true; // whether the server names several pills of a photo

function say(name, ...values) {
  const text = TEXT[language][name];
  return typeof text === "function" ? text(...values) : text;
}

function number(value, options) {
  return new Intl.NumberFormat(language, options).format(value);
}

function percent(share) {
  const limit = 0.999; // nobody is 100 % sure
  const text = number(Math.min(share, limit), { style: "percent", minimumFractionDigits: 1, maximumFractionDigits: 1 });
  return share > limit ? `> ${text}` : text;
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

function boxes({ photo, pills }) {
  const across = (x) => `${(100 * x) / photo.width}%`, down = (y) => `${(100 * y) / photo.height}%`;
  const around = ({ box, sure }) => draw("rect", {
    class: sure ? "sure" : "unsure", rx: 4,
    x: across(box.x1), y: down(box.y1), width: across(box.x2 - box.x1), height: down(box.y2 - box.y1)
  });
  const label = ({ box, sure, name }, index) => {
    const right = box.x1 + box.x2 > photo.width, high = box.y1 < photo.height * 0.1; // the words stay inside the photo
    const short = name.length > 16 ? `${name.slice(0, 15)}…` : name;
    return draw("text", {
      x: across(right ? box.x2 : box.x1), y: down(box.y1),
      dx: right ? -4 : 4, dy: high ? 18 : -6, "text-anchor": right ? "end" : "start"
    }, `${index + 1} ${short}${sure ? "" : " ?"}`);
  };
  return draw("svg", { "aria-hidden": "true" }, pills.map(around), pills.map(label));
}

function pairs(kind, rows) {
  return make("dl", { class: kind }, rows.map(([name, value]) =>
    make("div", {}, make("dt", {}, name), make("dd", {}, value))));
}

function facts({ code, edi_codes, maker, details }, more = []) {
  const known = {
    code, edi: edi_codes.join(", ") || say("none"), maker, shape: details.shape, colors: details.colors,
    front: details.print_front, back: details.print_back
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

function pill(answer, index) {
  const where = answer.box_confidence === null ? say("whole") : percent(answer.box_confidence);
  return make("li", { class: answer.sure ? "pill" : "pill unsure" },
    make("h4", {}, make("span", { class: "number" }, String(index + 1)), answer.name),
    make("p", { class: "verdict" }, say(answer.sure ? "sure" : "compare")),
    confidence(answer.confidence),
    facts(answer, [[say("detection"), where]]),
    make("details", { open: !answer.sure }, make("summary", {}, say("candidates", answer.candidates.length)),
      make("ol", {}, answer.candidates.map((candidate) =>
        make("li", {}, make("b", {}, candidate.name), confidence(candidate.confidence), facts(candidate))))));
}

function recommendation(card, { pipeline, reason }) {
  return make("div", { class: "hint" },
    make("p", {}, make("b", {}, say("hint"))), make("p", { lang: "en" }, reason),
    make("button", { type: "button", class: "main", onclick: () => askAgain(card, pipeline) },
      say(`again_${pipeline}`)));
}

function result(card) {
  const { pills, notes, hint, timings_ms, notice, model } = card.answer;
  const other = card.pipeline === "single" ? "combo" : "single";
  const times = Object.entries(timings_ms).map(([step, time]) =>
    [say(step) ?? step, `${number(time, { maximumFractionDigits: time < 10 ? 1 : 0 })} ms`]);
  return [
    hint ? recommendation(card, hint) : null,
    notes.length ? make("div", { class: "notes" }, make("b", {}, say("notes")),
      notes.map((note) => make("p", { lang: "en" }, note))) : null,
    make("ol", { class: "pills" }, pills.map(pill)),
    make("div", {}, make("small", {}, say("time")), pairs("timings", times)),
    make("small", { lang: "en" },
      `${notice} ${model.classifier}${model.detector ? `, ${model.detector}` : ""}, ${model.version}`),
    hint?.pipeline === other || !several ? null : make("div", { class: "actions" },
      make("button", { type: "button", onclick: () => askAgain(card, other) }, say(`again_${other}`))),
  ];
}

function failure(card) {
  const { own, code, detail, request } = card.problem, seconds = secondsLeft(card);
  const translated = own ? say(own) : TEXT[language].problems[code];
  return [
    make("div", { class: "problem", role: "alert" },
      translated ? make("p", {}, make("b", {}, translated)) : null,
      detail ? make("p", { lang: "en" }, detail) : null,
      request ? make("small", {}, `${say("request")}: `, make("code", {}, request)) : null),
    make("div", { class: "actions" },
      make("button", { type: "button", disabled: seconds > 0, onclick: () => askAgain(card, card.pipeline) },
        say("again")),
      make("span", { role: "timer" }, seconds > 0 ? countdown(card, seconds) : "")),
  ];
}

function summary(card) {
  const named = card.answer.pills.map((one, index) =>
    `${index + 1}: ${one.name}, ${say(one.sure ? "sure" : "unsure")}, ${percent(one.confidence)}`);
  return [`${card.file.name}: ${say("pills", named.length)}`, ...named].join(". ");
}

function render(card) {
  const focused = card.node.contains(document.activeElement);
  const about = card.state === "done" ? say("pills", card.answer.pills.length)
    : card.state === "failed" ? say("failed") : "";
  card.picture.alt = card.state === "done" ? summary(card) : card.file.name;
  card.title = make("h3", { tabindex: -1 }, card.file.name,
    make("small", {}, [say(card.pipeline), about].filter(Boolean).join(" · ")));
  const remove = make("button",
    { type: "button", "aria-label": say("remove_this", card.file.name), onclick: () => discard(card) }, say("remove"));
  const body = { done: result, failed: failure }[card.state] ?? (() => [make("p", { class: "busy" }, say(card.state))]);
  const photo = card.broken ? null : make("div", { class: "photo" },
    card.picture, card.state === "done" ? boxes(card.answer) : null);
  card.node.replaceChildren(
    make("header", {}, card.title, remove),
    make("div", { class: "sides" },
      ...[photo, make("div", { class: "body" }, body(card).filter(Boolean))].filter(Boolean)));
  if (focused) card.title.focus({ preventScroll: true });
}

// ---- Asking the server.

function add(files) {
  const pipeline = document.querySelector("[name=pipeline]:checked").value;
  const added = files.map((file) => ({
    file, pipeline, tries: 0, node: make("article", { class: "card" }),
    picture: make("img", { src: URL.createObjectURL(file) })
  }));
  cards.unshift(...added);
  byId("cards").prepend(...added.map((card) => card.node));
  byId("none-yet").hidden = cards.length > 0;
  for (const card of added) {
    // The browser can't show this file.
    card.picture.addEventListener("error", () => { card.broken = true; render(card); });
    enqueue(card);
  }
  added[0]?.node.scrollIntoView({ block: "start" });
}

function discard(card) {
  card.stop?.abort();
  clearInterval(card.clock);
  URL.revokeObjectURL(card.picture.src);
  for (const list of [cards, queue]) if (list.includes(card)) list.splice(list.indexOf(card), 1);
  card.node.remove();
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
  card.state = "asking";
  render(card);
  Object.assign(card, await ask(card));
  asking -= 1;
  if (cards.includes(card)) settle(card);
  next();
}

function settle(card) { // the answer is here, or it never will be
  render(card);
  if (card.state === "done") announce(summary(card));
  if (card.problem?.key) wantKey();
  if (card.until > Date.now()) card.clock = setInterval(() => tick(card), 250);
}

async function ask(card) {
  const failed = (problem, until = 0) => ({ state: "failed", problem, until });
  const key = byId("key").value.trim();
  if (/[^\x21-\x7e]/.test(key)) return failed({ own: "key_odd", key: true });
  const form = new FormData();
  form.append("image", card.file);
  card.stop = new AbortController();
  const signal = AbortSignal.any([card.stop.signal, AbortSignal.timeout(PATIENCE)]);
  try {
    const response = await fetch(`predict?pipeline=${card.pipeline}`, {
      method: "POST", body: form, headers: key ? { "X-API-Key": key } : {}, signal
    });
    // Something between here and the server may answer with a page.
    const told = await response.json().catch(() => ({}));
    if (response.ok && told.photo) return { state: "done", answer: told, problem: null };
    const until = waitUntil(response);
    card.tries += until ? 1 : 0;
    const reason = typeof told.detail === "string" ? { detail: told.detail, code: told.code } : { own: "silent" };
    const request = told.request_id ?? response.headers.get("X-Request-ID");
    return failed({ ...reason, request, key: [401, 403].includes(response.status) }, until);
  } catch {
    return failed({ own: signal.reason?.name === "TimeoutError" ? "late" : "unreachable" });
  }
}

function waitUntil({ status, headers }) { // milliseconds since 1970, 0 = no need to wait
  const wanted = headers.get("Retry-After");
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
  try { several = (await (await fetch("health")).json()).pipelines.includes("combo"); } catch { return; }
  if (several) return;
  document.querySelector("fieldset").hidden = true;
  document.querySelector("[name=pipeline][value=single]").checked = true;
  cards.forEach(render);
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
}

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
document.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length === 0) return;
  event.preventDefault();
  add([...event.clipboardData.files]);
});
const area = document.querySelector(".drop");
// A drop beside the area must not leave the page.
document.addEventListener("dragover", (event) => { event.preventDefault(); area.classList.add("over"); });
document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) area.classList.remove("over"); });
document.addEventListener("drop", (event) => {
  event.preventDefault();
  area.classList.remove("over");
  add([...event.dataTransfer.files]);
});
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
learnWhatIsOffered();
