"use strict";

// Text of the album becomes text nodes and nothing else; no markup is made of strings.

const EACH = Number(document.getElementById("program").dataset.each);
const ROW = 34;
const SPARE = 8; // rows drawn beyond either end of what is seen
const KEPT = 12; // blocks kept unpacked

const at = (id) => document.getElementById(id);
const listed = at("list");

let listing; // columns, one place per card
let places; // of cards, by index of the feature
let hay; // what each place is searched for, by scope
let shown = []; // places in the order of the list
let chosen = -1; // place
let sort = { key: "index", down: false };
let wanted = ""; // what is searched for
let texts = null; // of all examples, by place, once somebody searched them

// ---- Unpacking -------------------------------------------------------------

async function unpacked(id) {
  const letters = atob(at(id).textContent);
  const bytes = new Uint8Array(letters.length);
  for (let i = 0; i < letters.length; i++) bytes[i] = letters.charCodeAt(i);
  const inflate = new DecompressionStream("deflate");
  return new Response(new Blob([bytes]).stream().pipeThrough(inflate)).json();
}

const kept = new Map(); // promises of blocks, those used last at the end

function block(number) {
  const cards = kept.get(number) ?? unpacked(`block${number}`);
  kept.delete(number);
  kept.set(number, cards);
  if (kept.size > KEPT) kept.delete(kept.keys().next().value);
  return cards;
}

async function cardOf(place) {
  return (await block(Math.floor(place / EACH)))[place % EACH];
}

// ---- Words and numbers -----------------------------------------------------

function number(x) {
  if (x === 0) return "0";
  const size = Math.abs(x);
  if (size >= 1e5 || (size > 0 && size < 1e-3))
    return x.toExponential(1).replaceAll("-", "−");
  const digits = size >= 100 ? 0 : size >= 10 ? 1 : size >= 0.1 ? 2 : 3;
  return x.toFixed(digits).replace("-", "−");
}

const signed = (x) => (x > 0 ? "+" : "") + number(x);
const count = (x) => x.toLocaleString("en");

function often(x) {
  return x < 0.01
    ? `one token in ${count(Math.round(1 / x))}`
    : `${percent(x)} of tokens`;
}

function percent(x) {
  if (x === 0) return "0";
  const share = 100 * x;
  if (share < 1e-3) return "<0.001 %";
  return `${share >= 10 ? share.toFixed(0) : Number(share.toPrecision(2))} %`;
}

const UNSEEN =
  /[\u0000-\u001f\u007f\u00a0\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g;
const INVISIBLE =
  /[\u0000-\u0020\u007f\u00a0\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/;

function visible(letter) {
  if (letter === " " || letter === "\u00a0") return "·";
  if (letter === "\n") return "⏎";
  if (letter === "\r") return "␍";
  if (letter === "\t") return "⇥";
  const code = letter.charCodeAt(0);
  return code < 0x20 ? String.fromCharCode(0x2400 + code) : "◌";
}

// ---- Elements --------------------------------------------------------------

function make(kind, name = "", ...children) {
  const element = document.createElement(kind);
  if (name) element.className = name;
  element.append(...children);
  return element;
}

const drawing = at("drawing").content.querySelector("svg");

function draw(kind, attributes, ...children) {
  const element = document.createElementNS(drawing.namespaceURI, kind);
  for (const [key, value] of Object.entries(attributes))
    element.setAttribute(key, value);
  element.append(...children);
  return element;
}

function share(element, value) {
  element.style.setProperty("--share", value.toFixed(4));
  return element;
}

function tipped(element, text) {
  element.dataset.tip = text;
  return element;
}

/** A token by itself: every space of it shows. */
function chip(text, name = "") {
  const element = make("span", `chip ${name}`);
  if (text === "") element.append(make("span", "mark", "∅"));
  for (const letter of text) {
    if (INVISIBLE.test(letter)) element.append(make("span", "mark", visible(letter)));
    else element.append(letter);
  }
  return element;
}

/** A token in running text: breaks and runs of spaces show, long ones cut short. */
function written(text) {
  return text
    .replace(/ {4,}/g, "·⋯·")
    .replace(/ {2,}/g, (run) => "·".repeat(run.length))
    .replace(UNSEEN, visible);
}

// ---- The list --------------------------------------------------------------

const pool = [];

function row() {
  const parts = {
    number: make("span", "number"),
    label: make("span", "label"),
    density: make("span", "meter"),
    maximum: make("span"),
    cause: make("span", "cause"),
  };
  const element = make("div", "row", ...Object.values(parts));
  element.setAttribute("role", "option");
  return { element, parts, place: -1 };
}

/** The token that was searched for, if it is among them; else the first. */
function sought(tokens) {
  return tokens.find((x) => wanted && x.toLowerCase().includes(wanted)) ?? tokens[0];
}

function label(place) {
  if (listing.density[place] === 0) return ["dead"];
  const fires = sought(listing.fires[place]);
  const parts = fires === undefined ? [] : [chip(fires, "fires")];
  const promoted = sought(listing.promoted[place]);
  return promoted === undefined ? parts : [...parts, "→", chip(promoted)];
}

function fill(line, place) {
  const { element, parts } = line;
  const density = listing.density[place];
  element.className = density === 0 ? "row dead" : "row";
  element.id = `row${place}`;
  parts.number.textContent = listing.index[place];
  parts.label.replaceChildren(...label(place));
  parts.density.textContent = percent(density);
  // Six decades: from one token in a million to all of them.
  share(parts.density, density > 0 ? Math.max(0, 1 + Math.log10(density) / 6) : 0);
  parts.maximum.textContent = density === 0 ? "" : number(listing.maximum[place]);
  const cause = listing.cause[place];
  parts.cause.textContent = cause === null ? "" : signed(cause);
  parts.cause.className = `cause ${cause > 0 ? "raises" : "lowers"}`;
  line.place = place;
}

function drawRows() {
  const first = Math.max(0, Math.floor(listed.scrollTop / ROW) - SPARE);
  const many = Math.ceil(listed.clientHeight / ROW) + 2 * SPARE;
  while (pool.length < many) {
    pool.push(row());
    at("rows").append(pool.at(-1).element);
  }
  pool.forEach((line, i) => {
    // A row keeps its element while it is seen: those that scroll out come in again.
    const spot = first + ((((i - first) % pool.length) + pool.length) % pool.length);
    const place = shown[spot];
    line.element.hidden = place === undefined;
    if (place === undefined) {
      line.element.removeAttribute("id");
      line.place = -1;
      return;
    }
    if (line.place !== place) fill(line, place);
    line.element.style.transform = `translateY(${spot * ROW}px)`;
    line.element.setAttribute("aria-selected", String(place === chosen));
  });
}

let drawn = 0;
function drawSoon() {
  cancelAnimationFrame(drawn);
  drawn = requestAnimationFrame(drawRows);
}

function scrollTo(place) {
  const spot = shown.indexOf(place);
  if (spot < 0) return;
  const above = spot * ROW;
  const seen = listed.scrollTop;
  if (above < seen || above + ROW > seen + listed.clientHeight) {
    const near = Math.abs(above - seen - listed.clientHeight / 2) < listed.clientHeight;
    listed.scrollTop = near
      ? above < seen
        ? above
        : above + ROW - listed.clientHeight
      : above - listed.clientHeight / 2;
  }
}

function strength(key) {
  const column = listing[key];
  return key === "cause"
    ? (i) => (column[i] === null ? -1 : Math.abs(column[i]))
    : (i) => column[i];
}

function matches(scope) {
  const isNumber = /^#?\d+$/.test(wanted);
  const digits = wanted.replace("#", "");
  const numbered = (i) => isNumber && String(listing.index[i]).startsWith(digits);
  if (scope === "index") return numbered;
  if (scope === "text") return (i) => texts[i].includes(wanted);
  if (scope === "any")
    return (i) =>
      numbered(i) || hay.fires[i].includes(wanted) || hay.promoted[i].includes(wanted);
  return (i) => hay[scope][i].includes(wanted);
}

let asked = 0;

async function refresh() {
  const mine = ++asked;
  wanted = at("query").value.toLowerCase().replaceAll("·", " ").replaceAll("⏎", "\n");
  const scope = at("scope").value;
  const life = new FormData(at("filter")).get("life");
  if (wanted && scope === "text" && !texts) {
    if (!(await readTexts(mine))) return;
  }
  const fits = wanted ? matches(scope) : () => true;
  const lives = { all: () => true, alive: (x) => x > 0, dead: (x) => x === 0 }[life];
  shown = listing.index
    .map((_, i) => i)
    .filter((i) => lives(listing.density[i]) && fits(i));
  const value = strength(sort.key);
  const sign = sort.down ? -1 : 1;
  shown.sort((a, b) => sign * (value(a) - value(b)) || a - b);
  // Whoever types a number means this feature first.
  const exact = places.get(Number(wanted.replace("#", "") || NaN));
  if (["any", "index"].includes(scope) && shown.includes(exact)) {
    shown = [exact, ...shown.filter((i) => i !== exact)];
  }
  at("found").value =
    shown.length === listing.index.length
      ? `${count(shown.length)} features`
      : `${count(shown.length)} of ${count(listing.index.length)}`;
  at("rows").style.height = `${shown.length * ROW}px`;
  for (const line of pool) line.place = -1;
  listed.scrollTop = 0;
  drawRows();
}

/** Unpacks every block once for the text of its examples; false if nobody waits. */
async function readTexts(mine) {
  const found = [];
  for (let i = 0; i * EACH < listing.index.length; i++) {
    at("found").value = `reading ${count(i * EACH)} of ${count(listing.index.length)}…`;
    const cards = await unpacked(`block${i}`);
    if (mine !== asked) return false;
    for (const card of cards) {
      const examples = card.bands.flatMap((x) => x.examples);
      found.push(
        examples
          .map((x) => x.tokens.join(""))
          .join("\u0000")
          .toLowerCase(),
      );
    }
  }
  texts = found;
  return true;
}

// ---- The card --------------------------------------------------------------

function panel(title, detail, ...children) {
  const head = make("h3", "", title);
  if (detail) head.append(" ", make("span", "soft", detail));
  return make("section", "panel", head, ...children);
}

const note = (...parts) => make("p", "note soft", ...parts);

const power = (x) => "10" + [...String(x)].map((digit) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[digit]).join("");

function histogram(card, width) {
  const [height, left, top, foot] = [206, 32, 6, 34];
  const most = Math.max(...card.counts);
  const tall = height - top - foot;
  const rise = (x) => (Math.log10(1 + x) / Math.log10(1 + most)) * tall;
  const step = (width - left) / card.counts.length;
  const svg = draw("svg", {
    viewBox: `0 0 ${width} ${height}`,
    class: "histogram",
    role: "img",
    "aria-label": "Histogram of activations",
  });
  for (let ten = 1; ten <= most; ten *= 10) {
    const y = height - foot - rise(ten);
    svg.append(draw("line", { x1: left, x2: width, y1: y, y2: y, class: "rule" }));
    svg.append(
      draw(
        "text",
        { x: left - 6, y: y + 3.5, "text-anchor": "end" },
        ten < 1e3 ? ten : power(Math.round(Math.log10(ten))),
      ),
    );
  }
  card.counts.forEach((many, i) => {
    const x = left + i * step;
    const bar = draw("rect", {
      x: x + 0.5,
      width: Math.max(0.5, step - 1),
      y: height - foot - rise(many),
      height: rise(many),
      class: "bar",
    });
    const hit = draw("rect", { x, width: step, y: top, height: tall, class: "hit" });
    hit.dataset.tip = `${number(card.edges[i])} to ${number(card.edges[i + 1])}\n${count(many)} tokens`;
    svg.append(draw("g", {}, bar, hit));
  });
  const base = height - foot;
  svg.append(draw("line", { x1: left, x2: width, y1: base, y2: base, class: "rule" }));
  const middle = card.edges.length >> 1;
  [
    [0, "start"],
    [middle, "middle"],
    [card.edges.length - 1, "end"],
  ].forEach(([i, anchor]) => {
    svg.append(
      draw(
        "text",
        { x: left + i * step, y: base + 14, "text-anchor": anchor },
        number(card.edges[i]),
      ),
    );
  });
  svg.append(
    draw(
      "text",
      { x: (left + width) / 2, y: height - 3, "text-anchor": "middle" },
      "activation",
    ),
  );
  return svg;
}

function logits(pairs, side) {
  if (!pairs.length) return note("None given.");
  const most = Math.max(...pairs.map((x) => Math.abs(x[1]))) || 1;
  const lines = pairs.map(([text, logit]) =>
    make(
      "div",
      "",
      share(make("span", `bar ${side}`, chip(text)), Math.abs(logit) / most),
      make("span", "value", signed(logit)),
    ),
  );
  return make("div", "logits", ...lines);
}

function nearest(pairs) {
  if (!pairs.length) return note("None given.");
  return make(
    "div",
    "near",
    ...pairs.map(([index, cosine]) => {
      const place = places.get(index);
      const line = make(
        place === undefined ? "span" : "a",
        "",
        make("b", "", `#${index}`),
      );
      line.append(
        make("span", "label", ...(place === undefined ? [] : label(place).slice(0, 1))),
        number(cosine),
      );
      if (place !== undefined) line.href = `#${index}`;
      return line;
    }),
  );
}

function example(found, most) {
  const text = make("p", "text");
  const peak = Math.max(...found.activations);
  const peaked = found.activations.indexOf(peak);
  found.tokens.forEach((token, i) => {
    const value = found.activations[i];
    const span = make("span", value > 0 ? "on" : "", written(token));
    if (i === peaked) span.classList.add("peak");
    if (value > 0)
      span.style.background = `rgba(var(--on), ${(0.1 + 0.75 * Math.min(1, value / most)).toFixed(3)})`;
    text.append(tipped(span, `${number(value)} at token ${found.first + i}`));
  });
  const where = `${found.id} · tokens ${found.first}–${found.first + found.tokens.length - 1}`;
  return make(
    "div",
    "example",
    tipped(make("span", "value", number(peak)), where),
    make("div", "", text),
  );
}

function examples(card) {
  const part = panel(
    "Where it fires",
    " ",
    ...card.bands.map((band) =>
      make(
        "div",
        "band",
        make("h4", "", band.name),
        ...band.examples.map((x) => example(x, card.maximum || 1)),
      ),
    ),
  );
  part
    .querySelector(".soft")
    .replaceChildren("activation 0", make("span", "scale"), number(card.maximum));
  if (!card.bands.length)
    part.replaceChildren(
      make("h3", "", "Where it fires"),
      note("Nowhere: it was on at none of the tokens that were looked at."),
    );
  return part;
}

function cause(found, most) {
  const side = found.score > 0 ? "raises" : "lowers";
  const text = make("p", "text");
  text.textContent = found.text.replace(UNSEEN, (x) =>
    x === "\n" ? "⏎\n" : visible(x),
  );
  return make(
    "div",
    "cause-item",
    make(
      "header",
      "",
      make("span", "", found.id),
      make("b", side, signed(found.score)),
    ),
    share(make("div", `strength ${side}`), Math.abs(found.score) / most),
    text,
  );
}

function causes(card) {
  const title = "Training sequences behind it";
  if (card.causes === null) {
    return panel(
      title,
      "",
      note(
        "Not computed. Make this page again with ",
        make("code", "", "--run RUN"),
        ", RUN a finished influence run of the same model, to see which training sequences made this feature what it is.",
      ),
    );
  }
  if (!card.causes.length)
    return panel(title, "", note("None: nothing was measured for it."));
  const most = Math.max(...card.causes.map((x) => Math.abs(x.score))) || 1;
  return panel(
    title,
    "change of its pre-activation per added copy",
    ...card.causes.map((x) => cause(x, most)),
  );
}

/** Draws as wide as there is room, so that letters keep their size. */
function plot(room, card) {
  if (room) room.append(histogram(card, Math.max(160, room.clientWidth)));
}

/** Adds a button to every text that is cut off, once it can be measured. */
function offerMore(part) {
  for (const item of part.querySelectorAll(".cause-item")) {
    const text = item.querySelector(".text");
    if (text.scrollHeight <= text.clientHeight + 1) continue;
    const more = make("button", "more", "show all");
    more.type = "button";
    more.addEventListener("click", () => {
      more.textContent = item.classList.toggle("open") ? "show less" : "show all";
    });
    item.append(more);
  }
}

function gist(place) {
  if (listing.density[place] === 0)
    return make(
      "div",
      "gist",
      "It is dead: never on, at any of the tokens that were looked at.",
    );
  const part = make("div", "gist", "fires on");
  listing.fires[place].slice(0, 4).forEach((x) => part.append(chip(x, "fires")));
  if (!listing.fires[place].length) part.replaceChildren();
  if (listing.promoted[place].length) {
    part.append(
      make("span", "then", "promotes"),
      ...listing.promoted[place].slice(0, 4).map((x) => chip(x)),
    );
  }
  return part;
}

function steps() {
  const part = make("div", "steps");
  for (const [sign, by, name] of [
    ["↑", -1, "Previous in the list"],
    ["↓", 1, "Next in the list"],
  ]) {
    const button = tipped(make("button", "", sign), name);
    button.type = "button";
    button.setAttribute("aria-label", name);
    button.addEventListener("click", () => step(by));
    part.append(button);
  }
  return part;
}

function face(card, place) {
  const dead = card.density === 0;
  const facts = dead
    ? "dead"
    : `on at ${often(card.density)}, up to ${number(card.maximum)}`;
  const title = make("h2", "", `Feature ${card.index} `, make("small", "", facts));
  const where = examples(card);
  where.classList.add("examples");
  const behind = causes(card);
  behind.classList.add("causes");
  return [
    make("div", "head", title, steps()),
    gist(place),
    make(
      "div",
      "numbers",
      panel(
        "Activations",
        "· tokens, log",
        Math.max(0, ...card.counts) ? make("div", "plot") : note("It was never on."),
      ),
      panel("Promotes", "· logits", logits(card.promoted, "raises")),
      panel("Suppresses", "· logits", logits(card.suppressed, "lowers")),
      panel("Nearest", "· cosine", nearest(card.nearest)),
    ),
    make("div", "evidence", where, behind),
  ];
}

async function choose(place) {
  chosen = place;
  scrollTo(place);
  drawRows();
  listed.setAttribute("aria-activedescendant", `row${place}`);
  const card = await cardOf(place);
  if (chosen !== place) return; // another was chosen meanwhile
  const part = at("card");
  part.replaceChildren(...face(card, place));
  part.scrollTop = 0;
  at("tip").hidden = true;
  document.title = document.title.replace(/^(#\d+ · )?/, `#${card.index} · `);
  plot(part.querySelector(".plot"), card);
  offerMore(part);
}

function step(by) {
  const spot = shown.indexOf(chosen);
  const next = shown[spot < 0 ? 0 : spot + by];
  if (next === undefined) return;
  // Steps leave no trail: going back returns to where the walk began.
  history.replaceState(null, "", `#${listing.index[next]}`);
  choose(next);
}

function follow() {
  const place = places.get(Number(location.hash.slice(1) || NaN));
  if (place !== undefined && place !== chosen) choose(place);
  return place !== undefined;
}

// ---- Events ----------------------------------------------------------------

function sortBy(key) {
  // What is large is what is looked for; numbers are counted up.
  sort = { key, down: sort.key === key ? !sort.down : key !== "index" };
  for (const button of at("columns").querySelectorAll("button")) {
    const mine = button.dataset.key === key;
    button.setAttribute("aria-pressed", String(mine));
    button.textContent =
      button.textContent.replace(/ [↑↓]$/, "") +
      (mine ? (sort.down ? " ↓" : " ↑") : "");
  }
  refresh();
}

function listen() {
  listed.addEventListener("scroll", drawSoon, { passive: true });
  addEventListener("resize", drawSoon);
  addEventListener("hashchange", follow);
  at("filter").addEventListener("submit", (event) => event.preventDefault());
  at("filter").addEventListener("input", refresh);
  at("columns").addEventListener("click", (event) => {
    if (event.target.dataset.key) sortBy(event.target.dataset.key);
  });
  at("rows").addEventListener("click", (event) => {
    const line = pool.find((x) => x.element.contains(event.target));
    if (line) location.hash = listing.index[line.place];
  });
  addEventListener("keydown", (event) => {
    const typing =
      ["SELECT", "TEXTAREA"].includes(event.target.tagName) ||
      event.target.type === "radio";
    const by = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    if (by && !typing && !event.altKey && !event.ctrlKey && !event.metaKey) {
      event.preventDefault();
      step(by);
    } else if (event.key === "/" && event.target.tagName !== "INPUT") {
      event.preventDefault();
      at("query").select();
    }
  });
  document.addEventListener("mouseover", (event) => {
    const tip = at("tip");
    const over = event.target.closest("[data-tip]");
    tip.hidden = !over;
    if (!over) return;
    tip.textContent = over.dataset.tip;
    const box = over.getClientRects()[0];
    const x = Math.min(
      innerWidth - tip.offsetWidth - 6,
      Math.max(6, box.left + box.width / 2 - tip.offsetWidth / 2),
    );
    const y = box.top - tip.offsetHeight - 5;
    tip.style.transform = `translate(${x}px, ${y < 4 ? box.bottom + 5 : y}px)`;
  });
}

async function open() {
  if (typeof DecompressionStream === "undefined") {
    at("card").textContent =
      "This browser cannot unpack the page. Open it in one of 2023 or later.";
    return;
  }
  listing = await unpacked("listing");
  places = new Map(listing.index.map((x, i) => [x, i]));
  const joined = (tokens) => tokens.join("\u0000").toLowerCase();
  hay = { fires: listing.fires.map(joined), promoted: listing.promoted.map(joined) };
  document.body.classList.toggle(
    "plain",
    listing.cause.every((x) => x === null),
  );
  listen();
  sortBy(document.body.classList.contains("plain") ? "density" : "cause");
  if (!follow()) {
    if (shown.length) choose(shown[0]);
    else
      at("card").replaceChildren(
        make("p", "soft empty", "There are no features here."),
      );
  }
}

open();
