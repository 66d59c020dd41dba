// Search by look: imprint, colours and shape are tapped, the server's answer is shown in its groups.
// It needs neither a camera nor a model. What the server says only ever becomes text, never markup.

const SIZE = 50; // records of one request
const COLORS = { // as the server calls them, and how they look
  white: "#ffffff", yellow: "#f5d63d", orange: "#f08a24", pink: "#f4a3b5", red: "#d23b36", brown: "#85552f",
  "light green": "#aad75f", green: "#3b9747", teal: "#1d9a94", blue: "#3d8ed5", navy: "#20356b", magenta: "#a5306f",
  purple: "#7750a2", grey: "#989898", black: "#1f1f1f", transparent: "none",
};
const SHAPES = { // outlines in a square of 32
  round: ["circle", { cx: 16, cy: 16, r: 11 }],
  oval: ["ellipse", { cx: 16, cy: 16, rx: 13, ry: 8 }],
  oblong: ["rect", { x: 2, y: 10, width: 28, height: 12, rx: 6 }],
  semicircular: ["path", { d: "M4 22a12 12 0 0 1 24 0z" }],
  triangular: ["path", { d: "M16 5 28 26H4z" }],
  square: ["rect", { x: 6, y: 6, width: 20, height: 20, rx: 2 }],
  diamond: ["path", { d: "M16 3 29 16 16 29 3 16z" }],
  pentagonal: ["path", { d: "M16 4 28 13 23.5 27h-15L4 13z" }],
  hexagonal: ["path", { d: "M9 5h14l7 11-7 11H9L2 16z" }],
  octagonal: ["path", { d: "M11 4h10l7 7v10l-7 7H11l-7-7V11z" }],
};
const ASKED = { oblong: "oblong,capsule" }; // the Taiwanese register calls a capsule a shape
const byId = (id) => document.getElementById(id);

export function setUpSearch({ say, make, draw, pairs, number, words, imprint, key, refused, announce }) {
  const groups = new Map(); // name -> records so far
  let asked = null;  // parameters of the last search
  let answer = null; // the last answer, with all records so far
  let problem = null;
  let turn = 0;

  function choice(kind, name, picture) {
    return make("label", {}, make("input", { type: "checkbox", name: kind, value: name }), picture,
      make("span", {}, words(name)));
  }

  function swatch(name) {
    const clear = COLORS[name] === "none" ? draw("path", { class: "outline", d: "M8 24 24 8" }) : null;
    return draw("svg", { viewBox: "0 0 32 32", "aria-hidden": "true" },
      draw("circle", { class: "outline", cx: 16, cy: 16, r: 13, fill: COLORS[name] }), clear);
  }

  function outline(name) {
    const [tag, place] = SHAPES[name];
    return draw("svg", { viewBox: "0 0 32 32", "aria-hidden": "true" },
      draw(tag, { class: "outline", fill: "none", ...place }));
  }

  function choices() { // again in another language, with what was chosen
    const chosen = new Set([...document.querySelectorAll("#look-form :checked")].map((box) => box.value));
    byId("look-colors").replaceChildren(...Object.keys(COLORS).map((name) => choice("color", name, swatch(name))));
    byId("look-shapes").replaceChildren(...Object.keys(SHAPES).map((name) => choice("shape", name, outline(name))));
    for (const box of document.querySelectorAll("#look-form [type=checkbox]")) box.checked = chosen.has(box.value);
  }

  function wanted() {
    const named = (kind) => [...document.querySelectorAll(`#look-form [name=${kind}]:checked`)]
      .map((box) => ASKED[box.value] ?? box.value).join(",");
    const fields = { imprint: byId("look-imprint").value, back: byId("look-back").value,
      color: named("color"), shape: named("shape") };
    return Object.fromEntries(Object.entries(fields).filter(([, value]) => value.trim()));
  }

  function sides({ front, back }) {
    const side = (text) => (text === null ? say("look_unrecorded") : imprint(text) || say("look_blank"));
    return `${side(front)} / ${side(back)}`;
  }

  function hit(record) {
    const list = (values) => values.map(words).join(", ") || say("look_unrecorded");
    const rows = [
      [say("look_code"), record.code],
      record.maker ? [say("maker"), record.maker] : null,
      [say("look_imprints"), record.imprints.map(sides).join("; ") || say("look_unrecorded")],
      [say("colors"), list(record.colors)], [say("shape"), list(record.shapes)],
      record.lengths_mm.length ? [say("look_length"), `${record.lengths_mm.map((one) => number(one)).join(", ")} mm`]
        : null,
      record.form ? [say("form"), words(record.form)] : null,
      [say("look_source"), say(`look_${record.source}`) ?? record.source],
    ].filter(Boolean);
    const near = Object.entries(record.fits).filter(([, fit]) => fit === "near")
      .map(([name]) => say(`look_near_${name}`));
    const english = document.documentElement.lang === "en";
    return make("li", {}, make("b", {}, (english && record.name_en) || record.name),
      near.length ? make("small", {}, near.join(" ")) : null, pairs("facts", rows));
  }

  function group({ name, count }) {
    const hits = groups.get(name) ?? [];
    return make("section", { class: "group" },
      make("h3", {}, `${say(`look_group_${name}`)}: ${number(count)}`),
      make("p", {}, say(`look_about_${name}`)),
      hits.length ? make("ol", {}, hits.map(hit)) : null);
  }

  function left() {
    const { excluded, contradictions } = answer;
    const fields = Object.entries(contradictions)
      .map(([name, count]) => `${say(`look_field_${name}`)} ${number(count)}`);
    return make("p", { class: "notes" }, say("look_excluded", number(excluded), fields.join(", ")));
  }

  function more() {
    const shown = [...groups.values()].reduce((sum, hits) => sum + hits.length, 0);
    const all = answer.records - answer.excluded;
    return shown < all
      ? make("button", { type: "button", onclick: () => ask(asked, shown) }, say("look_more", number(all - shown)))
      : null;
  }

  function show() {
    choices();
    const shown = problem ? [make("div", { class: "problem", role: "alert" }, make("p", {}, refused(problem)))]
      : !answer ? []
        : !answer.records ? [make("p", { class: "notes" }, say("look_empty"))]
          : [left(), ...answer.groups.filter(({ count }) => count).map(group), more()];
    byId("found").replaceChildren(...shown.filter(Boolean));
  }

  async function ask(parameters, offset = 0) {
    const mine = ++turn;
    asked = parameters;
    problem = null;
    let got = null;
    try {
      const query = new URLSearchParams({ ...parameters, limit: SIZE, offset });
      const response = await fetch(`search?${query}`, { headers: key() ? { "X-API-Key": key() } : {} });
      const body = await response.json();
      if (response.ok) got = body;
      else problem = body;
    } catch {
      problem = { own: "unreachable" };
    }
    if (mine !== turn) return; // a later search has been answered
    if (got) {
      if (!offset) groups.clear();
      for (const { name, hits } of got.groups) groups.set(name, [...(groups.get(name) ?? []), ...hits]);
      answer = got;
      announce(say("look_said", number(got.records - got.excluded), number(got.excluded)));
    }
    show();
  }

  byId("look-form").addEventListener("submit", (event) => {
    event.preventDefault();
    ask(wanted());
  });
  byId("look-form").addEventListener("reset", () => {
    turn += 1;
    [answer, problem] = [null, null];
    groups.clear();
    byId("found").replaceChildren();
  });

  return {
    show,
    fill({ imprint, colors, shapes }) { // what was seen, from an uncertain answer
      byId("look-form").reset();
      byId("look").open = true;
      for (const box of document.querySelectorAll("#look-form [type=checkbox]"))
        box.checked = [...colors, ...shapes].includes(box.value);
      byId("look-imprint").value = imprint;
      byId("look-imprint").focus();
      byId("look").scrollIntoView({ block: "start" });
      if (imprint || colors.length || shapes.length) ask(wanted());
    },
  };
}
