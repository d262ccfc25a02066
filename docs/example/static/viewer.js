"use strict";
const modules = {};
modules.dom = (() => {
// Making elements. Text is only ever set as text: nothing here parses markup.

/** An element: `h("p.quiet", {id: "x", onclick: f}, "text", child, [more])`. */
function h(name, props, ...children) {
  const [tag, ...classes] = name.split(".");
  const element = document.createElement(tag);
  if (classes.length) element.className = classes.join(" ");
  for (const [key, value] of Object.entries(props ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key === "value" || key === "checked" || key === "selected") element[key] = value;
    else element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...present(children));
  return element;
}

function present(children) {
  const flat = children.flat(Infinity);
  return flat.filter((c) => c !== null && c !== undefined && c !== false).map((c) =>
    c instanceof Node ? c : String(c)
  );
}

/** Puts children in the place of all that an element holds. */
function fill(element, ...children) {
  element.replaceChildren(...present(children));
  return element;
}

const CONTROLS = "a[href], button, input, select, textarea, summary";
const named = (e) => `${e.tagName} ${e.id || e.getAttribute("aria-label") || e.textContent}`;

/** As `fill`; the keyboard's focus stays on the control of the same name, if there is one. */
function refill(element, ...children) {
  const focused = document.activeElement;
  const name = element.contains(focused) && focused !== element ? named(focused) : null;
  fill(element, ...children);
  if (name === null) return element;
  [...element.querySelectorAll(CONTROLS)].find((e) => named(e) === name)?.focus({ preventScroll: true });
  return element;
}

/** A number for people: 0.174, 1,601, −0.02. */
function number(x, digits = 3) {
  if (x === null || x === undefined || Number.isNaN(x)) return "–";
  const large = Math.abs(x) >= 100;
  const text = x.toLocaleString("en-US", {
    minimumFractionDigits: large ? 0 : digits,
    maximumFractionDigits: large ? 1 : digits,
  });
  return text.replace("-", "−");
}

/** A count for people: 5,415. */
const count = (n) => n.toLocaleString("en-US");

/** A share for people: 34.5%. */
const percent = (x) => (x === null || x === undefined ? "–" : `${number(100 * x, 1)}%`);

/** Runs `work` once calls have stopped for some milliseconds. */
function calm(work, milliseconds) {
  let waiting = 0;
  return (...values) => {
    clearTimeout(waiting);
    waiting = setTimeout(() => work(...values), milliseconds);
  };
}

/** Tells something in the corner for some seconds; read out by screen readers. */
function tell(text, kind = "") {
  const box = document.getElementById("status");
  fill(box, h("p", { class: kind }, text));
  clearTimeout(tell.waiting);
  tell.waiting = setTimeout(() => fill(box), kind === "wrong" ? 12000 : 4000);
}

return { h, fill, refill, number, count, percent, calm, tell };
})();

modules.chart = (() => {
// Scatter plots: points with axes, their titles, and intervals.

const { fill, h } = modules.dom;

const NS = "http://www.w3.org/2000/svg";

/** An SVG element, as `h` makes HTML ones. */
function s(name, properties, ...children) {
  const element = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(properties)) element.setAttribute(key, value);
  element.append(...children.flat(Infinity).filter(Boolean));
  return element;
}

/** Round numbers from low to high, four to nine of them, and the digits that tell them apart. */
function ticks(low, high) {
  const power = 10 ** Math.floor(Math.log10((high - low) / 4));
  const step = [5, 2, 1].map((f) => f * power).find((x) => (high - low) / x >= 4) ?? power;
  const numbers = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) numbers.push(i * step);
  return { numbers, digits: Math.max(0, -Math.floor(Math.log10(step) + 1e-9)) };
}

/** The range of numbers with some room on both sides. */
function range(numbers) {
  const [low, high] = [Math.min(...numbers), Math.max(...numbers)];
  const room = 0.06 * (high - low || Math.abs(high) || 1);
  return [low - room, high + room];
}

const written = (x, { digits, scale = 1, unit = "" }) => `${(scale * x).toFixed(digits)}${unit}`.replace("-", "−");

// Letters of 12 pixels, about; a box is [left, top, right, bottom].
const LETTER = 6.8;
const boxOf = (text, { x, y, anchor }) => {
  const left = anchor === "end" ? x - LETTER * text.length : x;
  return [left - 2, y - 10, left + LETTER * text.length + 2, y + 3];
};
const crosses = (a, b) => a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3];

/**
 * What stands beside each point: its name, or where that would cover something, a number.
 *
 * @param points [{x, y, name}] in pixels; `lines` are the boxes of their intervals.
 * @param bounds the box that all names stand in.
 * @returns [{text, x, y, anchor}], null for a point without a name or without any room.
 */
function labelsOf(points, lines, bounds) {
  const taken = points.map(({ x, y }) => [x - 6, y - 6, x + 6, y + 6]);
  const place = (point, text, obstacles, far) => {
    const sides = point.x > (bounds[0] + bounds[2]) / 2 ? ["end", "start"] : ["start", "end"];
    const places = [-7, 16, ...far].flatMap((by) => sides.map((anchor) => ({ text, x: point.x + (anchor === "end" ? -8 : 8), y: point.y + by, anchor })));
    const free = places.find((p) => {
      const box = boxOf(text, p);
      const isInside = box[0] >= bounds[0] && box[1] >= bounds[1] && box[2] <= bounds[2] && box[3] <= bounds[3];
      return isInside && ![...taken, ...obstacles].some((o) => crosses(box, o));
    });
    if (free) taken.push(boxOf(text, free));
    return free ?? null;
  };
  const labels = points.map((p) => (p.name ? place(p, p.name, lines, []) : null));
  // Numbers are short: beside a crowd of points they find room, if need be over an interval.
  let next = 1;
  return points.map((p, i) => {
    if (labels[i] || !p.name) return labels[i];
    const label = place(p, String(next), lines, []) ?? place(p, String(next), [], [-21, 30]);
    if (label) next++;
    return label;
  });
}

/**
 * A scatter plot.
 *
 * @param points [{x, y, title, name, xs, ys}]: `name` is written beside the point; `xs` and `ys`
 *     are the ends of its intervals.
 * @param axes {x, y, description}: titles with units, and what the plot is, for who cannot see it;
 *     {percent: ["y"]} names the axes that are written in percent; {shape} is height by width.
 */
function scatter(points, { x, y, description, percent = [], shape = 0.8 }) {
  // Letters keep their size: a narrow page gets a smaller drawing and not a shrunken one.
  const width = Math.min(520, document.documentElement.clientWidth - 40);
  const height = Math.max(260, Math.round(shape * width));
  const xRange = range(points.flatMap((p) => [p.x, ...(p.xs ?? [])]));
  const yRange = range(points.flatMap((p) => [p.y, ...(p.ys ?? [])]));
  const axis = (name, bounds) => {
    const { numbers, digits } = ticks(...bounds);
    const format = percent.includes(name) ? { digits: Math.max(0, digits - 2), scale: 100, unit: "%" } : { digits };
    const marks = numbers.map((v) => ({ v, text: written(v, format) }));
    return { marks, wide: LETTER * Math.max(...marks.map((m) => m.text.length)) };
  };
  const [xAxis, yAxis] = [axis("x", xRange), axis("y", yRange)];
  const box = { left: 14 + yAxis.wide, right: width - 12, top: 28, bottom: height - 52 };
  // Long numbers below a narrow drawing would run into each other.
  const every = Math.ceil((xAxis.marks.length * (xAxis.wide + 10)) / (box.right - box.left));
  const across = (v) => box.left + ((v - xRange[0]) / (xRange[1] - xRange[0])) * (box.right - box.left);
  const up = (v) => box.bottom - ((v - yRange[0]) / (yRange[1] - yRange[0])) * (box.bottom - box.top);
  const line = (x1, y1, x2, y2, kind) => s("line", { x1, y1, x2, y2, class: kind });
  const text = (x, y, content, anchor = "middle") => s("text", { x, y, "text-anchor": anchor }, content);
  const placed = points.map((p) => ({ x: across(p.x), y: up(p.y), name: p.name, xs: p.xs?.map(across), ys: p.ys?.map(up) }));
  const lines = placed.flatMap((p) => [
    p.xs && [p.xs[0], p.y - 1, p.xs[1], p.y + 1],
    p.ys && [p.x - 1, p.ys[1], p.x + 1, p.ys[0]],
  ].filter(Boolean));
  const labels = labelsOf(placed, lines, [box.left, 16, width, box.bottom]);
  const numbered = points.map((p, i) => [labels[i]?.text, p.name]).filter(([label, name]) => label && label !== name);
  const pointed = h("p.pointed", {}, h("span.quiet", {}, "Hover over a point or touch it to read it."));
  const tell = (e) => {
    const { left, top, width: shown } = drawing.getBoundingClientRect();
    const [x, y] = [e.clientX - left, e.clientY - top].map((d) => (d * width) / shown);
    const far = placed.map((p) => Math.hypot(p.x - x, p.y - y));
    const nearest = far.indexOf(Math.min(...far));
    // About a finger's width.
    if (far[nearest] < 24) fill(pointed, points[nearest].title);
  };
  const drawing = s("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": description },
    xAxis.marks.map(({ v, text: name }, i) => [line(across(v), box.top, across(v), box.bottom, v ? "grid" : "zero"), i % every === 0 && text(across(v), box.bottom + 18, name)]),
    yAxis.marks.map(({ v, text: name }) => [line(box.left, up(v), box.right, up(v), v ? "grid" : "zero"), text(box.left - 6, up(v) + 4, name, "end")]),
    text((box.left + box.right) / 2, height - 10, x), text(0, 12, y, "start"),
    placed.map((p, i) => [
      p.xs && line(p.xs[0], p.y, p.xs[1], p.y, "interval"),
      p.ys && line(p.x, p.ys[0], p.x, p.ys[1], "interval"),
      s("circle", { cx: p.x, cy: p.y, r: 4 }, s("title", {}, points[i].title)),
    ]),
    labels.map((l) => l && text(l.x, l.y, l.text, l.anchor)));
  for (const event of ["click", "pointermove"]) drawing.addEventListener(event, tell);
  return h("div.scatter", {}, drawing,
    numbered.length > 0 && h("p.numbered", {}, numbered.map(([label, name], i) => [i > 0 && " · ", h("b", {}, label), ` ${name}`])),
    pointed);
}

return { ticks, scatter };
})();

modules.data = (() => {
// The pieces of data, by name: from the server as JSON, or in an export as script files.

const isExport = document.documentElement.hasAttribute("data-export");
const waiting = new Map();
const MOST_CHUNKS = 60;

// An export's files call this; JSON alone could not be read from file://.
globalThis.viewerData = (name, value) => {
  waiting.get(name)?.(value);
  waiting.delete(name);
};

function fromScript(name) {
  return new Promise((resolve, reject) => {
    const script = document.createElement("script");
    waiting.set(name, (value) => {
      script.remove();
      resolve(value);
    });
    script.onerror = () => reject(new Error(`data/${name}.js is missing from this export`));
    script.src = `data/${name}.js`;
    document.head.append(script);
  });
}

async function fromServer(name, digests) {
  // The server refuses pieces of a file that has changed since the index was read.
  const parameters = new URLSearchParams(digests.map((digest) => ["digest", digest]));
  return readBody(await request(`data/${name}.json?${parameters}`, {}));
}

async function request(address, options) {
  try {
    return await fetch(address, options);
  } catch {
    throw new Error("the viewer's server does not answer; is it still running?");
  }
}

async function readBody(response) {
  const body = await response.json().catch(() => ({ error: `status ${response.status}` }));
  if (!response.ok) throw new Error(body.error);
  return body;
}

/** A piece of the data; `digests` are those, in the index, of the files that it is of. */
const piece = (name, ...digests) => (isExport ? fromScript(name) : fromServer(name, digests));

/** Asks the server to do something; `body` is sent as JSON, a File as it is. */
async function ask(address, body, method = "POST") {
  const headers = { "x-viewer-token": document.documentElement.dataset.token };
  if (!(body instanceof Blob) && body !== undefined) {
    headers["content-type"] = "application/json";
    body = JSON.stringify(body);
  }
  return readBody(await request(`api/${address}`, { method, headers, body }));
}

/** Everything that is shown. */
class Data {
  /** Reads the index; rows follow with `load`. */
  async open() {
    this.index = await piece("index");
    this.index.live &&= !isExport;
    this.index.upload &&= !isExport;
    this.canNote = this.index.notes && !isExport;
    this.files = this.index.files.map((described, number) => ({
      ...described,
      number,
      columns: Object.fromEntries(described.fields.map((f) => [f, []])),
      loaded: 0,
      byId: new Map(),
      byQuery: new Map(),
      overlaps: new Map(),
    }));
    this.records = new Map();
    this.loading = new Map();
    this.grouped = new Map();
    this.figures = undefined; // of the board
    await this.readNotes();
  }

  file(label) {
    return this.files.find((f) => f.label === label);
  }

  /** Loads a file's rows; `onRows` is called after each chunk. Called again, it waits for them. */
  load(file, onRows) {
    if (!this.loading.has(file.label)) {
      const loaded = this.#load(file, onRows);
      this.loading.set(file.label, loaded);
      // What failed is asked for again from where it stopped.
      loaded.catch(() => this.loading.delete(file.label));
    }
    return this.loading.get(file.label);
  }

  async #load(file, onRows) {
    const size = this.index.summary_rows;
    for (let chunk = file.loaded / size; chunk * size < file.rows; chunk++) {
      const part = await piece(`${file.number}/summaries-${chunk}`, file.digest);
      const rows = Math.min(size, file.rows - chunk * size);
      for (const field of file.fields) {
        const values = part[field] ?? new Array(rows).fill(null);
        for (const value of values) file.columns[field].push(value);
      }
      for (let row = file.loaded; row < file.loaded + rows; row++) {
        first(file.byId, file.columns.id?.[row], row);
        first(file.byQuery, file.columns.query?.[row], row);
      }
      file.loaded += rows;
      onRows?.(file);
    }
  }

  /** A record of a file; the chunks asked for last are kept. */
  async record(file, row) {
    const size = this.index.record_rows;
    const name = `${file.number}/records-${Math.floor(row / size)}`;
    const chunk = this.records.get(name) ?? piece(name, file.digest);
    this.records.delete(name);
    this.records.set(name, chunk);
    if (this.records.size > MOST_CHUNKS) this.records.delete(this.records.keys().next().value);
    try {
      return (await chunk)[row % size];
    } catch (error) {
      this.records.delete(name);
      throw error;
    }
  }

  /** The board's figures; read once. */
  board() {
    return (this.figures ??= piece("board", this.index.board));
  }

  /** The changes of loss of a query of the board. */
  changes(query) {
    return piece(`board-${query}`, this.index.board);
  }

  /** How many proponents each row of a file shares with another file; fills `file.overlaps`. */
  async overlap(file, other) {
    if (!file.overlaps.has(other.label)) {
      file.overlaps.set(other.label, await piece(`overlap-${file.number}-${other.number}`, file.digest, other.digest));
    }
    return file.overlaps.get(other.label);
  }

  /** The figures of a file's passages by a key, of the query in a row or of all; read once. */
  groups(file, key, row) {
    const name = `${file.number}/by-${key}${row === undefined ? "" : `-${row}`}`;
    if (!this.grouped.has(name)) {
      this.grouped.set(name, piece(name, file.digest));
      this.grouped.get(name).catch(() => this.grouped.delete(name));
    }
    return this.grouped.get(name);
  }

  async readNotes() {
    this.#take(await piece("notes"));
  }

  #take({ notes, counts }) {
    this.counts = counts;
    this.notes = new Map(notes.map((n) => [noteKey(n, n.passage_id), n]));
  }

  /** The note on a passage of a query (`queryOf`). */
  note(query, passage) {
    return this.notes.get(noteKey(query, passage));
  }

  /** Saves {passage_id, type, comment, method} as the note on a passage of a query. */
  async saveNote(query, note) {
    this.#take(await ask("notes", { ...query, ...note }));
  }

  /** Runs a live question to its end; `onProgress(job)` hears of it. */
  async live(what, body, onProgress) {
    let job = await ask(`live/${what}`, body);
    let pause = 60;
    while (job.state === "waiting" || job.state === "running") {
      onProgress?.(job);
      await new Promise((resolve) => setTimeout(resolve, pause));
      pause = Math.min(400, pause * 1.3);
      job = await ask(`jobs/${job.number}`, undefined, "GET");
    }
    if (job.state === "failed") throw new Error(job.error);
    return job;
  }

  cancel(job) {
    return ask(`jobs/${job.number}`, undefined, "DELETE");
  }
}

/** What identifies a record's query: ids alone may stand for other questions in other files. */
const queryOf = (record) => ({
  example_id: String(record.example_id ?? ""),
  prompt: String(record.inputs_plaintext),
  target: String(record.targets_plaintext),
});

const noteKey = (query, passage) => JSON.stringify([query.example_id, query.prompt, query.target, passage]);

/** Sets a map's value unless it has one, or the key is missing. */
function first(map, key, value) {
  if (key !== null && key !== undefined && !map.has(key)) map.set(key, value);
}

return { ask, Data, queryOf };
})();

modules.highlight = (() => {
// Marking words in a text: what to mark, and where it stands.

const { h } = modules.dom;

// Words that begin with a capital for another reason than being a name.
const COMMON = new Set(
  ("the a an in on at of for to from by with who what where when which is was are were he she it " +
    "they this that these those his her its their there and or but as how why").split(" "),
);
const MOST = 40;

/** The names in a prompt: runs of words with capitals, joined by "of", "de" and the like. */
function entities(prompt) {
  const name = /[\p{Lu}\p{N}][\p{L}\p{N}\p{M}'’.-]*(?:\s+(?:(?:of|the|de|la|le|du|von|van|der|and|&)\s+){0,2}[\p{Lu}\p{N}][\p{L}\p{N}\p{M}'’.-]*)*/gu;
  const out = [];
  for (const [run] of prompt.slice(0, 2000).matchAll(name)) {
    let words = run.replace(/[.'’-]+$/u, "").split(/\s+/u);
    while (words.length && COMMON.has(words[0].toLowerCase())) words = words.slice(1);
    const text = words.join(" ");
    if (text.length > 1) out.push(text);
  }
  return [...new Set(out)];
}

/**
 * What to mark for a record: [{text, kind}], kinds "target", "prompt", "own".
 *
 * @param chosen texts that the reader chose.
 */
function terms(record, chosen) {
  const strings = (x) => (Array.isArray(x) ? x : [x]).filter((s) => typeof s === "string" && s.trim());
  const out = [];
  const add = (texts, kind) => texts.forEach((text) => out.push({ text: text.trim(), kind }));
  add(chosen, "own");
  add(strings(record.targets_plaintext), "target");
  add(strings(record.groundtruth), "target");
  add(strings(record.entity1_alias), "target");
  add(strings(record.entity0), "prompt");
  add(strings(record.entity0_alias), "prompt");
  add(entities(record.inputs_plaintext ?? ""), "prompt");
  return out.filter((t) => t.text.length < 300).slice(0, MOST);
}

/**
 * Where terms stand in a text, without overlaps: [{start, end, kind}], rising.
 *
 * Case does not matter; a term stands for itself only where no letter or digit touches it.
 */
function find(text, list) {
  const longest = [...list].sort((a, b) =>
    (b.kind === "own") - (a.kind === "own") || b.text.length - a.text.length
  );
  const spans = [];
  for (const { text: term, kind } of longest) {
    const literal = term.replace(/[\\^$.*+?()[\]{}|/]/gu, "\\$&").replace(/\s+/gu, "\\s+");
    const before = /^[\p{L}\p{N}]/u.test(term) && kind !== "own" ? "(?<![\\p{L}\\p{N}])" : "";
    const after = /[\p{L}\p{N}]$/u.test(term) && kind !== "own" ? "(?![\\p{L}\\p{N}])" : "";
    for (const match of text.matchAll(new RegExp(before + literal + after, "giu"))) {
      const [start, end] = [match.index, match.index + match[0].length];
      if (end > start && !spans.some((t) => start < t.end && t.start < end)) spans.push({ start, end, kind });
    }
  }
  return spans.sort((a, b) => a.start - b.start);
}

/** A text's nodes, with its terms in <mark>. */
function marked(text, list) {
  const out = [];
  let at = 0;
  for (const { start, end, kind } of find(text, list)) {
    if (start > at) out.push(text.slice(at, start));
    out.push(h(`mark.${kind}`, {}, text.slice(start, end)));
    at = end;
  }
  out.push(text.slice(at));
  return out;
}

return { entities, terms, find, marked };
})();

modules.state = (() => {
// What is shown, kept in the address: a link restores it, and so do back and forward.

const DEFAULTS = {
  view: "", // the home view
  q: "",
  files: "",
  filter: "",
  sort: "",
  page: "",
  side: "proponents",
  judge: "",
  threshold: "0.5",
  hl: "",
  prompt: "",
  target: "",
  rather: "", // another target, which the question subtracts
  tokens: "", // ids of prompt and target, where the model itself said the target
  methods: "",
  share: "",
  order: "",
  method: "",
  by: "lds",
  key: "",
};

let home = "query";
let current = read();
const listeners = [];

function read() {
  const parameters = new URLSearchParams(location.hash.slice(1));
  const state = Object.fromEntries(
    Object.entries(DEFAULTS).map(([key, value]) => [key, parameters.get(key) ?? value]),
  );
  state.view ||= state.q || state.filter ? "query" : home;
  return state;
}

/** The address's fragment of a state: `#view=…`, what is as always left out. */
function link(patch) {
  const state = { ...current, ...patch };
  const out = new URLSearchParams();
  for (const [key, value] of Object.entries(state)) {
    if (String(value) !== DEFAULTS[key]) out.set(key, value);
  }
  return `#${out}`;
}

/** The state: an object of strings. */
const get = () => current;

/** Changes the state; with `replace`, without a step that "back" goes over. */
function set(patch, { replace = false } = {}) {
  const address = link(patch);
  if (address === link({})) return;
  history[replace ? "replaceState" : "pushState"](null, "", address);
  moved();
}

/** Calls `listener(state, before)` whenever the state has changed. */
const onChange = (listener) => listeners.push(listener);

function moved() {
  const before = current;
  current = read();
  for (const listener of listeners) listener(current, before);
}

/** Begins to follow the address: links and the browser's buttons; `view` is shown where it names none. */
function follow(view) {
  home = view;
  current = read();
  addEventListener("popstate", moved);
}

/** Texts that are highlighted beside the query's own. */
function highlights() {
  try {
    const texts = JSON.parse(current.hl || "[]");
    return Array.isArray(texts) ? texts.filter((x) => typeof x === "string" && x.trim()) : [];
  } catch {
    return [];
  }
}

return { link, get, set, onChange, follow, highlights };
})();

modules.passages = (() => {
// A column of passages: one method's proponents or opponents for a query.

const { fill, h, number, tell } = modules.dom;
const { marked, terms } = modules.highlight;
const { highlights } = modules.state;

const CLAMPED = 700; // characters above which a passage is shown folded

/** The passages of one side of a record: [{rank, id, text, score}]. */
function passagesOf(record, side) {
  const kind = side === "opponents" ? "opponent" : "proponent";
  const texts = Array.isArray(record?.[`${kind}s`]) ? record[`${kind}s`] : [];
  return texts.map((text, i) => ({
    rank: i + 1,
    text: String(text),
    id: record[`${kind}_ids`]?.[i] ?? null,
    score: record[`${kind}_scores`]?.[i] ?? null,
    entails: kind === "proponent" ? record.proponent_ais_scores?.[i] ?? null : null,
    window: kind === "proponent" ? record.proponent_ais_best_windows?.[i] ?? null : null,
  }));
}

/**
 * A column.
 *
 * @param method {label, title, record, marks, judge} of this column.
 * @param others the other columns' methods, whose ranks are shown on each passage.
 * @param context {data, query, side, heat}: the query as `queryOf` gives it; `heat(label, passage,
 *     box)` shows heat in a box, or is missing where it cannot be had.
 */
function column(method, others, context) {
  const { record, label } = method;
  const name = `column-${label}`;
  if (!record) {
    return h("section.column", { "aria-labelledby": name }, h("h3", { id: name }, method.title),
      h("p.quiet", {}, "This file does not contain the query."));
  }
  const sides = context.side === "both" ? ["proponents", "opponents"] : [context.side];
  const right = method.marks?.map((m, i) => (m ? i + 1 : 0)).filter(Boolean) ?? [];
  const verdict = method.marks
    ? right.length ? `first correct at rank ${right[0]}; ${right.length} of ${method.marks.length} correct` : "none correct"
    : "not judged";
  return h("section.column", { "aria-labelledby": name, "data-method": label },
    h("header", {},
      h("h3", { id: name }, method.title),
      h("p.under", {}, verdict, shared(method, others),
        context.heat?.can(label) && [" · ", h("button.link", { type: "button", title: "Which tokens carry each score", onclick: heatAll }, "heat all")])),
    sides.map((side) => {
      const list = passagesOf(record, side);
      return [
        sides.length > 1 ? h("h4", {}, side === "proponents" ? "Proponents" : "Opponents") : null,
        list.length
          ? [strip(list, side, method), list.map((p) => card(p, side, method, others, context))]
          : h("p.quiet", {}, `No ${side}${side === "opponents" ? ": low scores of this method have no meaning" : ""}.`),
      ];
    }));
}

/** How many proponents a column shares with the first one. */
function shared(method, others) {
  const first = others.find((o) => o.first);
  if (!first?.record || first === method) return null;
  const ids = new Set(passagesOf(method.record, "proponents").map((p) => p.id));
  const firstIds = passagesOf(first.record, "proponents").map((p) => p.id);
  const both = firstIds.filter((id) => id !== null && ids.has(id)).length;
  return ` · shares ${both} of ${firstIds.length} with ${first.title}`;
}

/** Shows heat in every card of a column; the next click shows the texts again. */
function heatAll(e) {
  const cards = [...e.target.closest(".column").querySelectorAll("button.to-heat")];
  const turned = e.target.textContent === "heat all" ? "heat" : "text";
  e.target.textContent = turned === "heat" ? "texts" : "heat all";
  cards.filter((b) => b.textContent === turned).forEach((b) => b.click());
}

const cardId = (label, side, rank) => `${label}-${side}-${rank}`;

/** Small numbers over a column: which ranks are correct; a click leads there. */
function strip(list, side, method) {
  return h("div.strip", { role: "group", "aria-label": "Jump to a rank" },
    list.map((p) => {
      const right = side === "proponents" && method.marks?.[p.rank - 1];
      return h(right ? "button.yes" : "button", {
        type: "button",
        "aria-label": `rank ${p.rank}${right ? ", correct" : ""}`,
        onclick: () => goTo(cardId(method.label, side, p.rank)),
      }, p.rank);
    }));
}

function goTo(id) {
  const element = document.getElementById(id);
  element?.scrollIntoView({ block: "center", behavior: reducedMotion() ? "auto" : "smooth" });
  element?.focus({ preventScroll: true });
}

const reducedMotion = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

function card(passage, side, method, others, context) {
  const { record, marks } = method;
  const mark = side === "proponents" ? marks?.[passage.rank - 1] : undefined;
  const sought = terms(record, highlights());
  const words = h("p.text", { dir: "auto" }, withWindow(passage, sought));
  const long = passage.text.length > CLAMPED || passage.text.split("\n").length > 12;
  if (long) words.classList.add("folded");
  const unfold = long && h("button.link", {
    type: "button",
    "aria-expanded": "false",
    onclick: (e) => {
      const folded = words.classList.toggle("folded");
      e.target.setAttribute("aria-expanded", String(!folded));
      e.target.textContent = folded ? "show all" : "show less";
    },
  }, "show all");
  const warm = context.heat && context.heat.can(method.label) && passage.id !== null;
  const heatBox = h("div.heat", {});
  const [before, after] = [h("div.around", { dir: "auto" }), h("div.around", { dir: "auto" })];
  // A document of several passages numbers them.
  const isPart = context.data.index.live && /#\d+$/u.test(passage.id ?? "");
  return h("article.card", {
    id: cardId(method.label, side, passage.rank),
    tabindex: "-1",
    "data-passage": passage.id,
    class: mark ? "card right" : "card",
    "aria-label": `rank ${passage.rank}`,
  },
  h("div.head", {},
    h("span.rank", {}, passage.rank),
    h("span.score", { title: "score" }, number(passage.score)),
    chips(passage, side, method),
    moves(passage, side, method, others)),
  before, words, unfold, heatBox, after,
  h("div.foot", {},
    h("code.id", { title: "passage id" }, passage.id ?? "no id"),
    warm && h("button.link.to-heat", {
      type: "button",
      title: "Which tokens carry the score",
      onclick: (e) => {
        if (heatBox.hasChildNodes()) {
          fill(heatBox);
          words.hidden = false;
          e.target.textContent = "heat";
        } else {
          context.heat.show(method.label, passage, sought, heatBox, () => {
            words.hidden = true;
            e.target.textContent = "text";
          });
        }
      },
    }, "heat"),
    isPart && h("button.link", {
      type: "button",
      title: "The text before and after, in the passage's document",
      onclick: (e) => toggleContext(e.target, context.data, passage, before, after),
    }, "context"),
    noteForm(passage, method, context)));
}

/** Shows what stands around a passage in its document; the next click hides it again. */
async function toggleContext(button, data, passage, before, after) {
  const isShown = before.hasChildNodes() || after.hasChildNodes();
  [before, after].forEach((box) => fill(box));
  button.textContent = isShown ? "context" : "passage alone";
  if (isShown) return;
  try {
    fill(before, h("p.quiet", {}, "Reading the document…"));
    const { result } = await data.live("context", { passage: passage.id });
    if (!result) return fill(before);
    const edge = (word, n) => h("p.quiet", {}, n ? `${n} ${word} passage${n > 1 ? "s" : ""}` : word === "earlier" ? "The document begins here." : "The document ends here.");
    const texts = (list) => list.map((text) => h("p.text", {}, text));
    fill(before, edge("earlier", result.earlier), texts(result.before));
    fill(after, texts(result.after), edge("later", result.later));
  } catch (error) {
    fill(before, h("p.wrong", {}, error.message));
  }
}

/** A passage's nodes; the window that a judge found best stands out, unless it is the whole. */
function withWindow({ text, window }, sought) {
  const at = typeof window === "string" && window.length < text.trim().length ? text.indexOf(window) : -1;
  if (at < 0 || !window) return marked(text, sought);
  const end = at + window.length;
  return [
    ...marked(text.slice(0, at), sought),
    h("span.window", { title: "the window that the judge found best" }, marked(window, sought)),
    ...marked(text.slice(end), sought),
  ];
}

/** What a passage was judged: by the annotations, by the entailment model. */
function chips(passage, side, { marks, judge, record }) {
  if (side !== "proponents") return null;
  const isRight = marks?.[passage.rank - 1];
  const annotated = record.proponent_correct?.[passage.rank - 1];
  const out = [];
  if (annotated !== undefined && annotated !== null) {
    const counts = judge !== "entailment" && isRight;
    const title = annotated ? "a label says that this passage states the fact" : "no label says that this passage states the fact";
    out.push(h(counts ? "span.tag.yes" : "span.tag", { title }, annotated ? "✓ correct" : "not labelled"));
  }
  if (typeof passage.entails === "number") {
    const counts = judge === "entailment" && isRight;
    out.push(h(counts ? "span.tag.yes" : "span.tag", {}, `${counts ? "✓ " : ""}entails ${number(passage.entails, 2)}`));
  }
  return out;
}

/** Where the other columns rank the same passage. */
function moves(passage, side, method, others) {
  if (passage.id === null) return null;
  return others.filter((o) => o !== method && o.record).map((other) => {
    const there = passagesOf(other.record, side).find((p) => p.id === passage.id);
    if (!there) return h("span.move.absent", { title: `not among ${other.title}'s ${side}` }, `${other.label} –`);
    const by = there.rank - passage.rank;
    const arrow = by === 0 ? "=" : by > 0 ? `↓${by}` : `↑${-by}`;
    return h("button.move", {
      type: "button",
      title: `rank ${there.rank} by ${other.title}: ${by === 0 ? "the same" : by > 0 ? `${by} lower` : `${-by} higher`}`,
      onclick: () => goTo(cardId(other.label, side, there.rank)),
    }, `${other.label} #${there.rank} ${arrow}`);
  });
}

function noteForm(passage, method, { data, query, onNote }) {
  if (!data.index.notes || passage.id === null || !query.example_id) return null;
  const note = data.note(query, passage.id);
  const types = data.index.types;
  if (!data.canNote) {
    return note && h("span.note", {}, types[note.type] ?? "", note.comment ? ` “${note.comment}”` : "");
  }
  const save = async () => {
    try {
      await data.saveNote(query, {
        passage_id: passage.id,
        type: select.value || null,
        comment: comment.value,
        method: method.label,
      });
      tell("Note saved.");
      onNote?.(query, passage.id);
    } catch (error) {
      tell(error.message, "wrong");
    }
  };
  const select = h("select.note", { "aria-label": `Note on rank ${passage.rank}`, onchange: save },
    h("option", { value: "" }, "note…"),
    Object.entries(types).map(([value, name]) => h("option", { value, selected: note?.type === value }, name)));
  const comment = h("input.comment", {
    value: note?.comment ?? "",
    placeholder: "comment",
    maxlength: 4000,
    "aria-label": `Comment on rank ${passage.rank}`,
    onchange: save,
  });
  comment.hidden = !note;
  select.addEventListener("change", () => (comment.hidden = false));
  return h("span.notes", { "data-note": passage.id }, select, comment);
}

return { passagesOf, column };
})();

modules.query = (() => {
// One query: what was asked, what is known of it, and each method's passages side by side.

const { count, fill, h, number, percent, refill, tell } = modules.dom;
const { queryOf } = modules.data;
const { column } = modules.passages;
const state = modules.state;

/** The main file's row that the state names; undefined where it has none. */
function rowOf(file, name) {
  const byId = file.byId.get(name);
  if (byId !== undefined) return byId;
  const match = /^#(\d+)$/u.exec(name);
  return match && Number(match[1]) >= 1 && Number(match[1]) <= file.rows ? Number(match[1]) - 1 : undefined;
}

/** Fills `element` with a query. */
async function showQuery(element, rows, row, tools) {
  const { data, files, main } = rows;
  const records = await Promise.all(files.map((file) => {
    const match = rows.match(file, row);
    return match === undefined ? null : data.record(file, match);
  }));
  const board = data.index.board && await data.board();
  if (!tools.isCurrent()) return;
  const record = records[0];
  if (record.malformed) {
    fill(element, h("section.malformed", {},
      h("h2", {}, `Line ${row + 1} is not a record`),
      h("p.wrong", {}, record.malformed),
      h("pre", {}, record.line)));
    return;
  }
  const now = rows.state;
  const methods = files.map((file, i) => {
    const match = rows.match(file, row);
    const record = records[i]?.malformed ? null : records[i];
    return {
      label: file.label,
      title: file.title,
      record,
      marks: record ? rows.marks(file, match) : null,
      judge: rows.judge(file),
      first: i === 0,
    };
  });
  const context = {
    data,
    query: queryOf(record),
    side: now.side,
    heat: tools.heatFor(record),
    onNote: tools.onNote,
  };
  const others = (m) => methods.filter((o) => o !== m);
  refill(element,
    h("article.query", { "data-row": row },
      heading(record),
      h("div.actions", {},
        h("button", { type: "button", onclick: () => tools.step(-1), title: "Previous query (k)", "aria-label": "Previous query" }, "← ", h("span.wide", {}, "Previous")),
        h("button", { type: "button", onclick: () => tools.step(1), title: "Next query (j)", "aria-label": "Next query" }, h("span.wide", {}, "Next"), " →"),
        sides(now.side),
        h("button.wide", { type: "button", onclick: copyLink }, "Copy link"),
        data.index.live && h("a.button", {
          href: state.link({ view: "trace", prompt: record.inputs_plaintext, target: record.targets_plaintext, rather: "", tokens: "" }),
        }, "Trace live"),
        board && board.texts.some((t) => t.query === main.columns.query[row]) &&
          h("a.button", { href: state.link({ view: "board" }) }, "Against retraining")),
      highlightBar(),
      facts(record, rows, row),
      h("div.columns", { "data-count": methods.length }, methods.map((m) => column(m, others(m), context))),
      raw(methods)));
}

/** Prompt and target as the heading. */
function heading(record) {
  return h("h2.asked", { dir: "auto" },
    h("span.prompt", {}, record.inputs_plaintext), /\s$/u.test(record.inputs_plaintext) ? "" : " ",
    h("span.target", {}, record.targets_plaintext));
}

/** Which side of the ranking is shown. */
function sides(side) {
  return h("div.segments", { role: "group", "aria-label": "Side of the ranking" },
    ["proponents", "opponents", "both"].map((name) =>
      h("button", { type: "button", "aria-pressed": String(side === name), onclick: () => state.set({ side: name }) }, name)));
}

async function copyLink() {
  try {
    await navigator.clipboard.writeText(location.href);
    tell("Link copied.");
  } catch {
    tell("The browser does not allow copying; use the address bar instead.");
  }
}

/** What is highlighted: the legend, and the reader's own texts. */
function highlightBar() {
  const chosen = state.highlights();
  const put = (list) => state.set({ hl: list.length ? JSON.stringify(list) : "" });
  const input = h("input", { id: "highlight", placeholder: "highlight…", autocomplete: "off", size: 14 });
  return h("div.legend", {},
    h("mark.target", {}, "target"), h("mark.prompt", {}, "prompt's names"),
    chosen.map((text) =>
      h("button.chip", { type: "button", title: "Stop highlighting", onclick: () => put(chosen.filter((t) => t !== text)) },
        h("mark.own", {}, text), " ×")),
    h("form", {
      onsubmit: (e) => {
        e.preventDefault();
        if (input.value.trim()) put([...new Set([...chosen, input.value.trim()])]);
      },
    }, h("label.hidden", { for: "highlight" }, "Highlight a text"), input),
    h("span.quiet", {}, "or select any text"));
}

const KNOWN = [
  ["groundtruth", "ground truth"],
  ["relation", "relation"],
  ["query_set", "query set"],
];

// Left out where there is little room; the raw record has them.
const MINOR = ["ground truth", "relation", "query set", "id", "fact frequency"];
const MEANING = {
  "model states it": "greedy decoding of the prompt gives the target",
  "beyond its prior": "log p of the target less its mean after prompts about other subjects; a stated target that gains little by its own prompt is guessed by the relation",
  confidence: "share of the model's samples that state the target",
  "target's rank": "worst rank of a token of the target among the model's next tokens; 1: greedy decoding states it",
  "fact frequency": "passages of the corpus that name both the subject and the target",
};

function facts(record, rows, row) {
  const { main } = rows;
  const items = KNOWN.map(([field, name]) => [name, record[field]]);
  const value = (field) => main.columns[field]?.[row];
  if (record["8b_generations"]) items.push(["prediction", value("prediction")]);
  const states = value("model_correct");
  if (typeof states === "boolean") items.push(["model states it", states ? "yes" : "no"]);
  const beyond = value("beyond");
  if (typeof beyond === "number") {
    items.push(["beyond its prior", `${number(beyond, 1)} nats${value("knowledge") ? ` (${value("knowledge")})` : ""}`]);
  }
  if (typeof value("confidence") === "number") items.push(["confidence", percent(value("confidence"))]);
  if (typeof value("probability") === "number") items.push(["p(target | prompt)", percent(value("probability"))]);
  if (typeof value("target_rank") === "number") items.push(["target's rank", count(value("target_rank"))]);
  const frequency = value("frequency");
  if (typeof frequency === "number") items.push(["fact frequency", `${count(frequency)} passages`]);
  else if (value("bucket")) items.push(["fact frequency", value("bucket")]);
  items.push(["id", record.example_id]);
  const generations = Array.isArray(record["8b_generations"]) ? record["8b_generations"] : [];
  return [
    h("dl.facts", {}, items.filter(([, x]) => x !== null && x !== undefined && x !== "").map(([name, x]) =>
      h(MINOR.includes(name) ? "div.minor" : "div", {}, h("dt", { title: MEANING[name] }, name), h("dd", { dir: "auto" }, String(x))))),
    generations.length > 0 && h("details.generations", {},
      h("summary", {}, `${generations.length} generations of the model`),
      h("ul", {}, tally(generations).map(([text, n]) => h("li", { dir: "auto" }, text, n > 1 && h("b", {}, ` × ${n}`))))),
  ];
}

function tally(texts) {
  const out = new Map();
  for (const text of texts) out.set(String(text), (out.get(String(text)) ?? 0) + 1);
  return [...out].sort((a, b) => b[1] - a[1]);
}

function raw(methods) {
  return h("section.raw", {}, h("h3", {}, "Raw records"),
    methods.filter((m) => m.record).map((m) => {
      const box = h("pre", { tabindex: "0", "aria-label": `Record of ${m.title}` });
      return h("details", {
        ontoggle: (e) => e.target.open && fill(box, JSON.stringify(m.record, null, 2)),
      }, h("summary", {}, `${m.title} (${m.label})`), box);
    }));
}

return { rowOf, showQuery, heading, sides, highlightBar };
})();

modules.metrics = (() => {
// Metrics, from the marks of the records alone.

/**
 * Whether each proponent of a row is correct.
 *
 * @param judge "annotations", or "entailment": a score over the threshold.
 * @returns booleans in rank order, or null where the row has no such marks, or no passage at all is
 *     correct (`tda/viewer/summary.py`).
 */
function marks(file, row, judge, threshold) {
  if (judge === "entailment") {
    const scores = file.columns.entailment?.[row];
    return scores ? scores.map((s) => s !== null && s > threshold) : null;
  }
  const correct = file.columns.correct?.[row];
  return correct === null || correct === undefined ? null : Array.from(correct, (c) => c === "1");
}

/** What a file's proponents can be judged by. */
function judges(file) {
  return ["annotations", "entailment"].filter((j) =>
    file.fields.includes(j === "annotations" ? "correct" : "entailment")
  );
}

/** The rank of the first correct proponent, from 1; null where none is. */
function firstRank(marks) {
  const at = marks ? marks.indexOf(true) : -1;
  return at < 0 ? null : at + 1;
}

/**
 * MRR, recall and precision over rows.
 *
 * @param marks the marks of each row; null where a row has none, which is then left out.
 * @param k recall: share of rows with a correct one in the first k; precision: share of the first
 *     k (or of all, where there are fewer) that are correct. The rank of a row that has no correct
 *     one among its proponents is taken as infinite.
 * @returns {n, mrr, recall, precision}; the last three null where n is 0.
 */
function metrics(marks, k = 10) {
  let n = 0, reciprocal = 0, hits = 0, precise = 0;
  for (const row of marks) {
    if (!row) continue;
    n++;
    const rank = firstRank(row);
    if (rank) reciprocal += 1 / rank;
    if (rank && rank <= k) hits++;
    const first = row.slice(0, k);
    if (first.length) precise += first.filter(Boolean).length / first.length;
  }
  if (!n) return { n, mrr: null, recall: null, precision: null };
  return { n, mrr: reciprocal / n, recall: hits / n, precision: precise / n };
}

/** Rows by a key, largest group first; rows whose key is null are left out. */
function groups(rows, key) {
  const out = new Map();
  for (const row of rows) {
    const name = key(row);
    if (name === null || name === undefined) continue;
    if (!out.has(name)) out.set(name, []);
    out.get(name).push(row);
  }
  return [...out].sort((a, b) => b[1].length - a[1].length);
}

/** Bins of equal width: [{low, high, rows}], the last with its upper end. */
function histogram(rows, value, bins = 20) {
  const known = rows.filter((r) => typeof value(r) === "number");
  if (!known.length) return [];
  let low = Infinity, high = -Infinity;
  for (const row of known) {
    low = Math.min(low, value(row));
    high = Math.max(high, value(row));
  }
  if (low === high) return [{ low, high, rows: known }];
  const width = (high - low) / bins;
  const out = Array.from({ length: bins }, (_, i) => ({
    low: low + i * width,
    high: i + 1 === bins ? high : low + (i + 1) * width,
    rows: [],
  }));
  for (const row of known) {
    // The edges decide, as they do in a filter; the division may fall beside one.
    let i = Math.min(bins - 1, Math.floor((value(row) - low) / width));
    while (i > 0 && value(row) < out[i].low) i--;
    while (i + 1 < bins && value(row) >= out[i + 1].low) i++;
    out[i].rows.push(row);
  }
  return out;
}

return { marks, judges, firstRank, metrics, groups, histogram };
})();

modules.filter = (() => {
// The filter's language: a small parser that makes a test of a row. Nothing is evaluated as code.
//
//   filter  = all ("or" all)*            all = one (["and"] one)*
//   one     = "not" one | "(" filter ")" | field [op value] | text
//   op      = "=" "!=" "<" "<=" ">" ">=" "~" (contains) "!~"
//   field   = a column, or LABEL.column of another results file; text = a word or "quoted words"

const LONGEST = 2000;
const DEEPEST = 50;
const TOKEN = /\s*(?:(!=|<=|>=|!~|[=<>~()])|"((?:[^"\\]|\\.)*)"|([^\s=<>~()!"]+|!))/uy;

/** What is wrong with a filter, and where. */
class FilterError extends Error {
  constructor(message, at) {
    super(message);
    this.at = at;
  }
}

function tokens(text) {
  if (text.length > LONGEST) throw new FilterError(`longer than ${LONGEST} characters`, LONGEST);
  const out = [];
  TOKEN.lastIndex = 0;
  while (text.slice(TOKEN.lastIndex).trim()) {
    const at = TOKEN.lastIndex;
    const match = TOKEN.exec(text);
    if (!match) throw new FilterError("a quotation mark is not closed", at);
    const [, sign, quoted, word] = match;
    if (sign) out.push({ sign, at });
    else if (quoted !== undefined) out.push({ text: quoted.replace(/\\(.)/gsu, "$1"), at });
    else out.push({ word, text: word, at });
  }
  return out;
}

/**
 * Parses a filter.
 *
 * @param text the expression; an empty one lets all through.
 * @param knows (field) → whether there is such a field, such as "rank" or "bm25.rank".
 * @returns {test, fields}: `test(get)` tells of a row whose fields `get(name)` gives.
 * @throws FilterError
 */
function parse(text, knows) {
  const list = tokens(text);
  const fields = new Set();
  let next = 0;

  const peek = () => list[next];
  const isWord = (word) => peek()?.word?.toLowerCase() === word;
  const end = () => new FilterError("it is incomplete", text.length);

  function any(depth) {
    if (depth > DEEPEST) throw new FilterError("too deeply nested", peek()?.at ?? 0);
    const parts = [all(depth)];
    while (isWord("or")) {
      next++;
      parts.push(all(depth));
    }
    return parts.length === 1 ? parts[0] : (get) => parts.some((part) => part(get));
  }

  function all(depth) {
    const parts = [one(depth)];
    while (peek() && peek().sign !== ")" && !isWord("or")) {
      if (isWord("and")) next++;
      parts.push(one(depth));
    }
    return parts.length === 1 ? parts[0] : (get) => parts.every((part) => part(get));
  }

  function one(depth) {
    const token = peek();
    if (!token) throw end();
    if (isWord("not")) {
      if (depth > DEEPEST) throw new FilterError("too deeply nested", token.at);
      next++;
      const inner = one(depth + 1);
      return (get) => !inner(get);
    }
    next++;
    if (token.sign === "(") {
      const inner = any(depth + 1);
      if (peek()?.sign !== ")") throw peek() ? unexpected(peek()) : end();
      next++;
      return inner;
    }
    if (token.sign || isReserved(token)) throw unexpected(token);
    const operator = peek()?.sign;
    const compares = operator && operator !== "(" && operator !== ")";
    if (compares) {
      if (token.word === undefined || !knows(token.word)) {
        throw new FilterError(`there is no field "${token.text}"`, token.at);
      }
      next++;
      fields.add(token.word);
      return comparison(token.word, operator, value());
    }
    if (token.word !== undefined && knows(token.word)) {
      fields.add(token.word);
      return (get) => Boolean(get(token.word));
    }
    const folded = fold(token.text);
    return (get) => ["prompt", "target", "id"].some((f) => fold(get(f)).includes(folded));
  }

  function value() {
    const token = peek();
    if (!token) throw end();
    if (token.sign) throw unexpected(token);
    next++;
    return token;
  }

  if (!list.length) return { test: () => true, fields };
  const test = any(0);
  if (peek()) throw unexpected(peek());
  return { test, fields };
}

const isReserved = (token) => ["and", "or"].includes(token.word?.toLowerCase());
const unexpected = (token) => new FilterError(`"${token.sign ?? token.text}" is not expected`, token.at);

/** A text without case, in one Unicode form. */
const fold = (x) => (x === null || x === undefined ? "" : String(x).normalize("NFKC").toLowerCase());

/** A comparison; a row that lacks the field passes none but != and !~. */
function comparison(field, operator, { word, text }) {
  const folded = fold(text);
  if (operator === "~") return (get) => fold(get(field)).includes(folded);
  if (operator === "!~") return (get) => !fold(get(field)).includes(folded);
  const asNumber = word === undefined ? NaN : quantity(word);
  const same = (x) => {
    if (typeof x === "number" && !Number.isNaN(asNumber)) return x === asNumber;
    if (typeof x === "boolean") return String(x) === folded || (folded === "yes" && x) || (folded === "no" && !x);
    return x !== null && x !== undefined && fold(x) === folded;
  };
  if (operator === "=") return (get) => same(get(field));
  if (operator === "!=") return (get) => !same(get(field));
  const compare = { "<": (o) => o < 0, "<=": (o) => o <= 0, ">": (o) => o > 0, ">=": (o) => o >= 0 }[operator];
  return (get) => {
    const x = get(field);
    if (x === null || x === undefined) return false;
    if (typeof x === "number" && !Number.isNaN(asNumber)) return compare(x - asNumber);
    if (typeof x === "number") return false;
    return compare(fold(x).localeCompare(folded));
  };
}

/** The number that a word writes, such as -0.5, 1e3, 20%, 1_000; NaN where it is none. */
function quantity(word) {
  const match = /^([+-]?(?:\d[\d_]*\.?\d*|\.\d+)(?:e[+-]?\d+)?)(%?)$/iu.exec(word);
  if (!match) return NaN;
  return Number(match[1].replaceAll("_", "")) / (match[2] ? 100 : 1);
}

/** A text as a filter writes it: quoted. */
const quote = (text) => `"${String(text).replace(/["\\]/gu, "\\$&")}"`;

return { FilterError, parse, fold, quote };
})();

modules.rows = (() => {
// The rows of the files that are shown: their fields as the filter, the sorting and the metrics see
// them.

const metrics = modules.metrics;
const { FilterError, parse } = modules.filter;

const DERIVED = ["row", "rank", "hits", "found", "malformed", "noted"];
const ALWAYS = ["id", "prompt", "target"];

/** Reads the rows of a collection by the state: which files, judged how. */
class Rows {
  constructor(data, state) {
    this.data = data;
    this.state = state;
    this.files = shown(data, state);
    this.main = this.files[0];
    this.filter = ""; // by which the list is chosen: an earlier one while the state's has an error
  }

  threshold() {
    const x = Number(this.state.threshold);
    return Number.isFinite(x) ? x : 0.5;
  }

  judge(file) {
    const possible = metrics.judges(file);
    return possible.includes(this.state.judge) ? this.state.judge : possible[0];
  }

  marks(file, row) {
    return metrics.marks(file, row, this.judge(file), this.threshold());
  }

  /** The value of a field in a row of a file. */
  value(file, row, field) {
    switch (field) {
      case "row":
        return row + 1;
      case "rank":
        return metrics.firstRank(this.marks(file, row));
      case "found": {
        const marks = this.marks(file, row);
        return marks && metrics.firstRank(marks) !== null;
      }
      case "hits":
        return this.marks(file, row)?.filter(Boolean).length ?? null;
      case "malformed":
        return (file.columns.error?.[row] ?? null) !== null;
      case "noted":
        return this.noted().has(file.columns.query?.[row]);
      default:
        return file.columns[field]?.[row] ?? null;
    }
  }

  noted() {
    this.notedQueries ??= new Set([...this.data.notes.values()].map((n) => n.query));
    return this.notedQueries;
  }

  /** The value of a field as the filter writes it, of the main file's row. */
  get(row, field) {
    const dot = field.indexOf(".");
    if (dot < 0) return this.value(this.main, row, field);
    const [label, column] = [field.slice(0, dot), field.slice(dot + 1)];
    const other = this.data.file(label);
    if (column === "overlap") return this.main.overlaps.get(label)?.[row] ?? null;
    const match = this.match(other, row);
    return match === undefined ? null : this.value(other, match, column);
  }

  /** The row of another file with the same query as a row of the main one. */
  match(file, row) {
    if (file === this.main) return row;
    return file.byQuery.get(this.main.columns.query?.[row]);
  }

  /** Whether the filter knows a field. */
  knows(field) {
    const dot = field.indexOf(".");
    if (dot < 0) return ALWAYS.includes(field) || DERIVED.includes(field) || this.main.fields.includes(field);
    const other = this.data.file(field.slice(0, dot));
    const column = field.slice(dot + 1);
    if (!other) return false;
    return DERIVED.includes(column) || other.fields.includes(column) || (column === "overlap" && other !== this.main);
  }

  /** All fields that the filter knows. */
  fields() {
    const main = [...new Set([...ALWAYS, ...DERIVED, ...this.main.fields])].filter((f) => f !== "error" && f !== "query");
    const others = this.data.files.filter((f) => f !== this.main);
    return [...main, ...others.flatMap((f) => [`${f.label}.rank`, `${f.label}.overlap`])];
  }

  /**
   * The main file's rows that pass the filter, sorted: {rows, error}; no rows for a filter with an error.
   *
   * Rows that the filter and the sorting need of other files are loaded first.
   */
  async chosen(filter = this.state.filter) {
    let test, fields;
    try {
      ({ test, fields } = parse(filter, (f) => this.knows(f)));
    } catch (error) {
      if (!(error instanceof FilterError)) throw error;
      return { rows: null, error };
    }
    const [sort, falling] = sorting(this.state.sort);
    if (sort && this.knows(sort)) fields.add(sort);
    for (const field of fields) await this.need(field);
    const rows = [];
    for (let row = 0; row < this.main.loaded; row++) if (test((f) => this.get(row, f))) rows.push(row);
    if (sort && this.knows(sort)) this.sort(rows, sort, falling);
    return { rows, error: null };
  }

  async need(field) {
    const dot = field.indexOf(".");
    const other = dot < 0 ? null : this.data.file(field.slice(0, dot));
    if (!other) return;
    await this.data.load(other);
    if (field.endsWith(".overlap")) await this.data.overlap(this.main, other);
  }

  sort(rows, field, falling) {
    const keys = new Map(rows.map((r) => [r, this.get(r, field)]));
    const sign = falling ? -1 : 1;
    rows.sort((a, b) => {
      const [x, y] = [keys.get(a), keys.get(b)];
      // What lacks the field comes last either way.
      if (x === null || y === null) return (x === null) - (y === null) || a - b;
      const order = typeof x === "string" ? x.localeCompare(y) : Number(x) - Number(y);
      return sign * order || a - b;
    });
  }
}

/** The files that the state shows, in its order; the first two where it names none. */
function shown(data, state) {
  const named = state.files.split(",").map((l) => data.file(l)).filter(Boolean);
  return named.length ? [...new Set(named)] : data.files.slice(0, 2);
}

/** The field and direction of a sorting such as "top" or "-top". */
const sorting = (text) => (text.startsWith("-") ? [text.slice(1), true] : [text, false]);

return { Rows, shown, sorting };
})();

modules.sidebar = (() => {
// The list of queries: filter, sort, pages, jump, random.

const { calm, count, fill, h, refill } = modules.dom;
const state = modules.state;
const { sorting } = modules.rows;

const PAGE = 50;

const PRESETS = [
  ["correct", "model_correct", "model_correct", "The model states the target"],
  ["wrong", "not model_correct", "model_correct", "The model does not state the target"],
  ["known", "knowledge = knows", "knowledge", "The model states the target, and it is the prompt's subject that makes it likely"],
  ["guessed", "knowledge = guesses", "knowledge", "The model states the target, but little more because of the prompt's subject"],
  ["confident", "confidence >= 0.5", "confidence", "At least half of the model's samples state it"],
  ["likely", "probability >= 0.1", "probability", "The model gives the target 10% or more"],
  ["common facts", "frequency >= 1000", "frequency", "1,000 passages or more state the fact"],
  ["rare facts", "frequency < 100", "frequency", "Fewer than 100 passages state the fact"],
  ["found first", "rank = 1", "marks", "The first proponent is correct"],
  ["not found", "found = no", "marks", "No proponent shown is correct"],
  ["with notes", "noted", "id", "Some proponent has a note"],
  ["malformed", "malformed", "error", "Lines that are not records"],
];

const SORTS = [
  ["", "file's order", "id"],
  ["prompt", "prompt", "prompt"],
  ["target", "target", "target"],
  ["relation", "relation", "relation"],
  ["rank", "first correct rank", "marks"],
  ["-hits", "most correct first", "marks"],
  ["-top", "highest score first", "top"],
  ["top", "lowest score first", "top"],
  ["-confidence", "most confident first", "confidence"],
  ["-probability", "most likely first", "probability"],
  ["-frequency", "most frequent first", "frequency"],
];

const has = (file, field) =>
  field === "marks"
    ? file.fields.includes("correct") || file.fields.includes("entailment")
    : field === "id" || file.fields.includes(field);

/** The list beside the content. It is built once and then kept up to date. */
class Sidebar {
  constructor(element, { onOpen, onHelp }) {
    this.element = element;
    this.onOpen = onOpen;
    this.input = h("input", {
      id: "filter",
      type: "search",
      placeholder: "rank <= 3 and relation = …",
      autocomplete: "off",
      spellcheck: "false",
      "aria-describedby": "filter-told",
      list: "filter-words",
      onfocus: () => this.complete(),
      oninput: () => (this.complete(), filter()),
    });
    this.words = h("datalist", { id: "filter-words" });
    const filter = calm(() => state.set({ filter: this.input.value, page: "" }, { replace: true }), 150);
    this.status = h("p.told", { id: "filter-told", role: "status" });
    this.presets = h("div.presets", { role: "group", "aria-label": "Filters to start from" });
    this.sort = h("select", { id: "sort", onchange: () => state.set({ sort: this.sort.value, page: "" }) });
    this.list = h("ol.queries", { id: "queries", tabindex: "-1" });
    this.pager = h("div.pager");
    this.jump = h("input", { id: "jump", placeholder: "number or id", size: 10, autocomplete: "off" });
    const jump = h("form", { onsubmit: (e) => (e.preventDefault(), this.jumpTo(this.jump.value)) },
      h("label.hidden", { for: "jump" }, "Jump to a query by its number or id"), this.jump,
      h("button", { type: "submit" }, "Go"));
    // Where there is no room beside the content, the list folds up over it.
    this.fold = h("button.fold", { type: "button", "aria-controls": "side-body", onclick: () => this.unfold() });
    this.unfold(false);
    const body = h("div.side-body", { id: "side-body" });
    fill(element, h("h2", {}, h("span", {}, "Queries"), this.fold), body);
    fill(body,
      h("div.row",
        {},
        h("label", { for: "filter" }, "Filter"),
        h("button.link", { type: "button", onclick: onHelp }, "how?")),
      this.input, this.words, this.status, this.presets,
      h("div.row", {}, h("label", { for: "sort" }, "Sort"), this.sort),
      h("div.row", {}, jump, h("button", { type: "button", onclick: () => this.random(), title: "Random query (r)" }, "Random")),
      this.pager, this.list);
  }

  /** Shows or folds the list on a narrow page. */
  unfold(open = this.fold.getAttribute("aria-expanded") !== "true") {
    this.fold.setAttribute("aria-expanded", String(open));
    this.fold.textContent = open ? "Hide the list ▴" : "List and filter ▾";
    this.element.classList.toggle("open", open);
  }

  /** Shows the rows that pass. */
  update(rows, chosen, error, current) {
    Object.assign(this, { rows, chosen, current });
    const { main } = rows;
    const now = rows.state;
    if (document.activeElement !== this.input) this.input.value = now.filter;
    this.input.setAttribute("aria-invalid", error ? "true" : "false");
    const all = main.rows;
    const loading = main.loaded < all ? `, ${count(main.loaded)} read so far` : "";
    fill(this.status, error
      ? h("span.wrong", {}, `filter: ${error.message} (at ${error.at + 1}); ${rows.filter ? "the list is as before" : "all queries are listed"}`)
      : `${count(chosen.length)} of ${count(all)} queries${loading}`);
    refill(this.presets, PRESETS.filter(([, , needs]) => needs && has(main, needs) && (needs !== "id" || rows.data.notes.size))
      .map(([name, filter, , title]) =>
        h("button.chip", {
          type: "button",
          title: `${title}: ${filter}`,
          "aria-pressed": String(now.filter === filter),
          onclick: () => state.set({ filter: now.filter === filter ? "" : filter, page: "" }),
        }, name)));
    this.showSorts(rows);
    this.showPage();
  }

  /** Offers the fields that the last word may become. */
  complete() {
    const [, before, word] = /^(.*?)([\w.]*)$/su.exec(this.input.value);
    const fields = this.rows.fields().filter((f) => f.startsWith(word) && f !== word);
    fill(this.words, fields.map((f) => h("option", { value: before + f }, f)));
  }

  showSorts(rows) {
    const { main, files } = rows;
    const others = files.slice(1).flatMap((f) => [
      [`${f.label}.rank`, `rank by ${f.title}`, "marks"],
      [`${f.label}.overlap`, `least shared with ${f.title}`, "id"],
    ]);
    const sorts = [...SORTS, ...others].filter(([, , needs]) => has(main, needs));
    const [field] = sorting(rows.state.sort);
    if (field && !sorts.some(([s]) => s === rows.state.sort)) sorts.push([rows.state.sort, rows.state.sort, "id"]);
    fill(this.sort, sorts.map(([value, name]) => h("option", { value, selected: value === rows.state.sort }, name)));
  }

  pages() {
    return Math.max(1, Math.ceil(this.chosen.length / PAGE));
  }

  page() {
    const requested = Number(this.rows.state.page);
    if (requested >= 1) return Math.min(this.pages(), Math.floor(requested)) - 1;
    const at = this.chosen.indexOf(this.current);
    return at < 0 ? 0 : Math.floor(at / PAGE);
  }

  showPage() {
    const page = this.page(), pages = this.pages();
    const to = (p, name, title, off) =>
      h("button", { type: "button", title, "aria-label": title, disabled: off, onclick: () => state.set({ page: p + 1 }) }, name);
    refill(this.pager,
      to(0, "«", "First page", page === 0),
      to(page - 1, "‹", "Previous page", page === 0),
      h("span", {}, `page ${count(page + 1)} of ${count(pages)}`),
      to(page + 1, "›", "Next page", page + 1 >= pages),
      to(pages - 1, "»", "Last page", page + 1 >= pages));
    const listed = this.chosen.slice(page * PAGE, (page + 1) * PAGE);
    this.list.setAttribute("start", page * PAGE + 1);
    refill(this.list, listed.map((row) => this.item(row)));
    if (!listed.length && this.rows.main.loaded === this.rows.main.rows) {
      fill(this.list, h("li.quiet", {}, "No query matches this filter."));
    }
    this.list.querySelector("[aria-current]")?.scrollIntoView({ block: "nearest" });
  }

  item(row) {
    const { main } = this.rows;
    const error = main.columns.error?.[row];
    const inside = error
      ? [h("span.wrong", {}, "malformed "), h("span.quiet", {}, error)]
      : [
        h("span.prompt", {}, main.columns.prompt[row], " ", h("b", {}, main.columns.target[row])),
        h("span.under", {}, dots(this.rows.marks(main, row)), h("span.relation", {}, main.columns.relation?.[row] ?? "")),
      ];
    const here = row === this.current;
    return h("li", {},
      h("a", {
        href: state.link(this.place(row)),
        "aria-current": here ? "true" : null,
        onclick: (e) => {
          if (e.ctrlKey || e.metaKey || e.shiftKey) return;
          e.preventDefault();
          this.onOpen(row);
        },
      }, inside));
  }

  /** The address of a row: in the view by metadata it is shown there. */
  place(row) {
    const { main, state: now } = this.rows;
    return { ...place(main, row), view: now.view === "metadata" ? "metadata" : "query" };
  }

  /** Opens the query so many places after the one that is shown. */
  step(by) {
    if (!this.chosen?.length) return;
    const at = this.chosen.indexOf(this.current);
    const next = at < 0 ? 0 : Math.min(this.chosen.length - 1, Math.max(0, at + by));
    this.onOpen(this.chosen[next]);
  }

  random() {
    if (this.chosen?.length) this.onOpen(this.chosen[Math.floor(Math.random() * this.chosen.length)]);
  }

  jumpTo(text) {
    const { main } = this.rows;
    const name = text.trim();
    const byId = main.byId.get(name);
    const number = Number(name);
    const isNumber = /^\d+$/u.test(name) && number >= 1 && number <= this.chosen.length;
    const row = byId ?? (isNumber ? this.chosen[number - 1] : undefined);
    if (row === undefined) fill(this.status, h("span.wrong", {}, `no query has the number or id ${name}`));
    else this.onOpen(row);
  }
}

/** The address of a row: by its query's id, or by number where it has none of its own. */
function place(file, row) {
  const id = file.columns.id?.[row];
  const isFirst = id !== null && id !== undefined && file.byId.get(id) === row;
  return { view: "query", q: isFirst ? id : `#${row + 1}`, page: "" };
}

/** A dot for each proponent, filled where it is correct. */
function dots(marks) {
  if (!marks) return null;
  const right = marks.map((m, i) => (m ? i + 1 : 0)).filter(Boolean);
  const description = right.length ? `correct at rank ${right.join(", ")}` : "none correct";
  return h("span.dots", { role: "img", "aria-label": description, title: description },
    marks.slice(0, 20).map((m) => h(m ? "i.yes" : "i", {})));
}

return { PAGE, Sidebar, place };
})();

modules.board = (() => {
// Methods held against retraining: LDS of each, and for a query what they predicted and what came.

const { scatter } = modules.chart;
const { count, h, number, refill } = modules.dom;
const { rowOf } = modules.query;
const { place } = modules.sidebar;
const state = modules.state;

/** A number with as many decimals as `board.md` gives it. */
const fixed = (x, digits = 3) => (x === null || x === undefined ? "" : x.toFixed(digits).replace("-", "−"));
// A small model's steps move a target by thousandths of a per cent.
const DIGITS = { cost: 1, "tail-patch": 4 };
const withInterval = (i) => (i ? `${fixed(i.mean)} [${fixed(i.low)}, ${fixed(i.high)}]` : "");
const share = (fraction) => `${Number((100 * fraction).toPrecision(3))}%`;

/** Fills `element` with the board. */
async function showBoard(element, rows, isCurrent) {
  const { data } = rows;
  const board = await data.board();
  const named = placeOf(board, rows);
  const at = board.texts.length ? Math.max(0, named) : -1;
  const changes = at < 0 ? null : await data.changes(at);
  if (!isCurrent()) return;
  const now = rows.state;
  const fractions = Object.keys(board.labels);
  const fraction = fractions.includes(now.share) ? now.share : fractions[0];
  const labels = board.labels[fraction];
  const label = labels.includes(now.order) ? now.order : labels[0];
  const view = { board, at, named, changes, fraction, label, now };
  view.methods = sorted(view);
  view.method = board.methods[now.method] ? now.method : best(view);
  // The passages of this method, if there are any.
  view.file = data.file(view.method) ?? rows.main;
  if (view.file) await data.load(view.file);
  if (!isCurrent()) return;
  refill(element, h("article.board", {},
    h("h2", {}, "Held against retraining"),
    h("p", {}, explained(view)),
    h("div.actions", {},
      choice("Share of the corpus that is removed", fractions.map((f) => [f, `without ${share(f)}`]), fraction, "share"),
      labels.length > 1 && choice("Order of the data", labels.map((l) => [l, l]), label, "order")),
    h("p.quiet", {}, ceiling(view)),
    table(view),
    at < 0
      ? h("p.quiet", {}, "This board has figures of methods only. Run the same command again for those of single queries.")
      : plot(view, rows)));
}

/** The number of the state's query on the board; −1 where it is not on it. */
function placeOf(board, { main, state: { q } }) {
  const key = main && q ? main.columns.query?.[rowOf(main, q)] : undefined;
  const at = board.texts.findIndex((t) => t.query === key);
  return at < 0 ? board.texts.findIndex((t) => t.id === q) : at;
}

function explained({ board, fraction, label }) {
  const bank = board.banks?.[fraction];
  return [
    h("b", {}, "LDS"), ` tells how well a method's scores predict what retraining does. The model was trained again ${bank ? count(bank.subsets) : "many"} times, ` +
    `each time without a random ${share(fraction)} of ${count(board.units)} ${board.unit ?? "unit"}s of the corpus` +
    (label === "mean of orders" ? `, in ${count(bank?.orders ?? 2)} orders of the data` : "") +
    `. The more a method's scores of what was removed add up to, the more a query's loss should have risen. LDS is the rank correlation (Spearman) ` +
    `of the two over the retrainings, as the mean over ${count(board.queries)} queries: 1 is a perfect prediction, 0 is chance.`,
  ];
}

/** The most that scores can reach that know nothing of the order of the data. */
const most = ({ board, fraction, label }) => board.ceilings?.[fraction]?.[label === "same order" ? "one" : "mean"];

function ceiling(view) {
  const { board, fraction } = view;
  const cost = `Bars run from 0 (line) to 1. Cost: in trainings of ${fixed(board["seconds of a training"], 1)} s, for all queries. Metasmoothness ${fixed(board.metasmoothness)}.`;
  if (most(view) === undefined) return cost;
  return `Ceiling ${fixed(most(view))} (dashed): retrainings in another order of the data agree to ${fixed(board.ceilings[fraction].agreement)} ` +
    `only, so a method that does not know the order cannot be expected to have more. ${cost}`;
}

const choice = (name, options, current, key) =>
  h("div.segments", { role: "group", "aria-label": name }, options.map(([value, title]) =>
    h("button", { type: "button", "aria-pressed": String(value === current), onclick: () => state.set({ [key]: value }) }, title)));

// Columns: key, title, what it means, and a method's value, which the highest first.
const COLUMNS = [
  ["method", "method", "", ({ board }, name) => board.methods[name].title],
  ["lds", "LDS [95% interval]", "rank correlation with retraining, mean over queries", (v, name) => interval(v, name)?.mean],
  ["query", "this query", "rank correlation for the query below", (v, name) => v.board.lds[`${v.fraction}/${v.label}/${name}`]?.[v.at]],
  ["qld", "QLD", "how much more a query's loss rises without its own top 1% than without a random 1%, nats", ({ board }, name) => board.methods[name].own_top?.mean],
  ["tail-patch", "tail-patch, %", "how much a training step on one of its first 10 passages raises the target's probability", ({ board }, name) => board.methods[name].tail_patch && 100 * board.methods[name].tail_patch.mean],
  ["mrr", "MRR", "mean reciprocal rank of the first correct passage", ({ board }, name) => board.methods[name].mrr?.mean],
  ["cost", "cost", "in trainings", ({ board }, name) => board.methods[name].cost],
];
const interval = ({ board, fraction, label }, name) => board.methods[name].lds[fraction]?.[label];

/** The columns that this board has. */
const columns = (view) => COLUMNS.filter(([key, , , value]) =>
  key === "method" || Object.keys(view.board.methods).some((m) => typeof value(view, m) === "number"));

const best = ({ methods, ...view }) => [...methods].sort((a, b) => interval(view, b).mean - interval(view, a).mean)[0];

function sorted(view) {
  const [key, isReversed] = view.now.by.startsWith("-") ? [view.now.by.slice(1), true] : [view.now.by, false];
  const value = (COLUMNS.find((c) => c[0] === key) ?? COLUMNS[1])[3];
  const sign = isReversed ? -1 : 1;
  return Object.keys(view.board.methods).sort((a, b) => {
    const [x, y] = [value(view, a), value(view, b)];
    if (typeof x === "string") return sign * x.localeCompare(y);
    // What lacks the figure comes last either way.
    if (typeof x !== "number" || typeof y !== "number") return (typeof x !== "number") - (typeof y !== "number");
    return sign * (y - x);
  });
}

function table(view) {
  const { board, now, methods } = view;
  const lows = methods.map((m) => interval(view, m)?.low ?? 0);
  const low = Math.min(0, Math.floor(10 * Math.min(...lows)) / 10);
  const at = (x) => `${(100 * (x - low)) / (1 - low)}%`;
  const head = columns(view).map(([key, title, meaning]) => {
    const by = now.by.replace("-", "");
    const order = by !== key ? null : now.by.startsWith("-") === (key === "method") ? "descending" : "ascending";
    const next = now.by === key ? `-${key}` : key;
    return h("th", { scope: "col", "aria-sort": order, title: meaning || null },
      h("button.link", { id: `by-${key}`, type: "button", onclick: () => state.set({ by: next }) }, title, order && (order === "ascending" ? " ▲" : " ▼")));
  });
  const line = (m) => {
    const i = interval(view, m);
    const figures = columns(view).slice(2).map(([key, , , value]) =>
      h("td.figure", { title: key === "qld" ? withInterval(board.methods[m].own_top) || null : null }, fixed(value(view, m), DIGITS[key])));
    return h("tr", { class: m === view.method ? "chosen" : null },
      h("th", { scope: "row" }, view.at < 0 ? board.methods[m].title : h("button.link", {
        type: "button", "aria-pressed": String(m === view.method), onclick: () => state.set({ method: m }),
      }, board.methods[m].title)),
      h("td", {}, i && ranged(i, at, most(view)), h("span.numbers", {}, withInterval(i))),
      figures);
  };
  return h("div.scrolling", { tabindex: "0", role: "region", "aria-label": "Methods by LDS" },
    h("table", {}, h("thead", {}, h("tr", {}, head)), h("tbody", {}, methods.map(line))));
}

/** An interval as a line with its mean, above a track from the lowest to 1, and the ceiling. */
function ranged({ mean, low, high }, at, most) {
  const put = (element, left, right) => {
    element.style.left = at(left);
    if (right !== undefined) element.style.width = `calc(${at(right)} - ${at(left)})`;
    return element;
  };
  return h("span.ranged", { "aria-hidden": "true" }, put(h("i.zero", {}), 0),
    most !== undefined && put(h("i.most", {}), most), put(h("i.between", {}), low, high), put(h("i.mean", {}), mean));
}

function plot(view, rows) {
  const { board, at, named, now, changes, fraction, label, method } = view;
  const { title } = board.methods[method];
  const text = board.texts[at];
  const [predicted, real] = [changes[`${fraction}/${method}`], changes[`${fraction}/${label}`]];
  const points = real.map((y, i) => ({
    x: predicted[i], y, title: `retraining ${i + 1}: predicted ${number(predicted[i], 4)}, loss rose by ${number(y, 4)} nats`,
  })).filter((p) => Number.isFinite(p.x) && Number.isFinite(p.y));
  const lds = board.lds[`${fraction}/${label}/${method}`][at];
  const told = `${title}: rank correlation ${fixed(lds) || "none"} over ${count(points.length)} retrainings.`;
  const to = (i) => state.set({ q: board.texts[(i + board.texts.length) % board.texts.length].id });
  const row = view.file?.byQuery.get(text.query);
  const files = [...new Set([view.file, ...rows.files])].slice(0, 3).map((f) => f?.label).join(",");
  return h("section", {},
    h("h3", {}, "One query: predicted and real change of loss"),
    h("div.actions", {},
      h("button", { type: "button", onclick: () => to(at - 1), id: "board-previous", "aria-label": "Previous query of the board", title: "Previous query (k)" }, "←"),
      h("label.hidden", { for: "board-query" }, "Query"),
      h("select", { id: "board-query", onchange: (e) => to(Number(e.target.value)) },
        board.texts.map((t, i) => h("option", { value: i, selected: i === at }, `${t.prompt} ${t.target}`))),
      h("button", { type: "button", onclick: () => to(at + 1), id: "board-next", "aria-label": "Next query of the board", title: "Next query (j)" }, "→"),
      row !== undefined && h("a.button", { href: state.link({ ...place(view.file, row), files }) }, "Its passages")),
    now.q && named < 0 && h("p.wrong", {}, `The query ${now.q} is not on the board: this is the board's first.`),
    h("p.quiet", { role: "status" }, told, " Each point is one retraining."),
    points.length > 0 && scatter(points, {
      x: "predicted: sum of the removed units’ scores",
      y: "real: rise of the query’s loss (nats)",
      description: told,
    }));
}

return { showBoard };
})();

modules.said = (() => {
// What the model says after a prompt, in words: a span of whole ones is traced by a click.

const { h, percent } = modules.dom;

/**
 * A completion as words, of which a click chooses one, and dragging or a click with Shift several.
 *
 * @param completion {text, prompt, steps, continues, ended}: the prompt's text, its tokens, what
 *     follows it, whether that begins inside of a word, and whether the model ended it.
 * @param span the span that is chosen, as `onChoose` gets it, or null.
 * @param onChoose hears of {prompt, target, tokens}: the texts before and in the span, and the ids
 *     of their tokens as they were generated.
 */
function said(completion, span, onChoose) {
  const words = wordsOf(completion.steps);
  // The prompt's last word may go on, and the last word of all may be cut: neither is a target.
  const isPart = (i) => (i === 0 && completion.continues) || (i > 0 && i === words.length - 1 && !completion.ended && /[\p{L}\p{N}\p{M}]$/u.test(words[i].text));
  const buttons = words.map((word, i) => h("button.word", {
    type: "button", disabled: isPart(i), title: isPart(i) ? "part of a word" : percent(likelihood(completion.steps, word)),
  }, word.text.trim()));
  const box = h("p.said", { role: "group", "aria-label": "What the model says", dir: "auto" },
    h("span.quiet", {}, completion.text.trimEnd()),
    words.map(({ text }, i) => {
      const start = text.length - text.trimStart().length;
      return text.trim() ? [text.slice(0, start), buttons[i], text.slice(text.trimEnd().length)] : text;
    }));
  const mark = (first, last) => buttons.forEach((b, i) => b.setAttribute("aria-pressed", String(first <= i && i <= last)));
  const choose = (first, last) => {
    mark(first, last);
    onChoose(spanOf(completion, words[first].first, words[last].stop));
  };
  // The words that are chosen already: [first, last].
  let chosen = words.reduce(([first, last], word, i) => {
    const inside = span && word.first >= span.first && word.stop <= span.stop;
    return inside ? [Math.min(first, i), i] : [first, last];
  }, [Infinity, -1]);
  if (span) mark(...chosen);
  let from = -1, to = -1, dragged = false;
  const under = (e) => buttons.indexOf(document.elementFromPoint(e.clientX, e.clientY)?.closest(".word:enabled"));
  box.addEventListener("pointerdown", (e) => ([from, to, dragged] = [under(e), -1, false]));
  box.addEventListener("pointermove", (e) => {
    const at = from < 0 || !e.buttons ? -1 : under(e);
    if (at < 0 || (at === from && to < 0)) return;
    to = at;
    mark(Math.min(from, to), Math.max(from, to));
  });
  box.addEventListener("pointerup", () => {
    dragged = to >= 0;
    if (dragged) choose(...(chosen = [Math.min(from, to), Math.max(from, to)]));
    from = to = -1;
  });
  box.addEventListener("click", (e) => {
    const at = buttons.indexOf(e.target.closest(".word"));
    if (at < 0 || dragged) return (dragged = false);
    chosen = e.shiftKey && chosen[1] >= 0 ? [Math.min(at, chosen[0]), Math.max(at, chosen[1])] : [at, at];
    choose(...chosen);
  });
  return box;
}

/** Tokens grouped into words: [{text, first, stop}], by the numbers of their steps. */
function wordsOf(steps) {
  const words = [];
  for (const [i, { token }] of steps.entries()) {
    const word = words.at(-1);
    // A token without text is the beginning of the next one's character.
    const next = steps.slice(i).find((s) => s.token)?.token ?? "";
    const joins = /[\p{L}\p{N}\p{M}]$/u.test(word?.text) && /^[\p{L}\p{N}\p{M}]/u.test(next);
    if (word && (joins || !word.text.trim())) Object.assign(word, { text: word.text + token, stop: i + 1 });
    else words.push({ text: token, first: i, stop: i + 1 });
  }
  return words;
}

/** A span of a completion's steps as a question. */
function spanOf({ text, prompt, steps }, first, stop) {
  const textOf = (from, to) => steps.slice(from, to).map((s) => s.token).join("");
  const target = textOf(first, stop);
  const ids = steps.map((s) => s.id);
  return {
    first,
    stop,
    // Space before the target is shown as the prompt's; the tokens stay as they are.
    prompt: text.trimEnd() + textOf(0, first) + /^\s*/u.exec(target)[0],
    target: target.trim(),
    tokens: [[...prompt, ...ids.slice(0, first)], ids.slice(first, stop)],
  };
}

/** The probability of a word. */
const likelihood = (steps, { first, stop }) => steps.slice(first, stop).reduce((p, s) => p * s.probability, 1);

return { said, wordsOf, spanOf };
})();

modules.live = (() => {
// Live tracing: a prompt and a target, or the model's own completion; passages from the store.

const { fill, h, number, percent, tell } = modules.dom;
const { queryOf } = modules.data;
const { find } = modules.highlight;
const { column } = modules.passages;
const { heading, highlightBar, sides } = modules.query;
const { said } = modules.said;
const state = modules.state;

const LONGEST = 24; // tokens of a completion

/** The page on which live questions are asked. It keeps its answers while others are looked at. */
class Live {
  constructor(data) {
    this.data = data;
    this.abilities = null;
    this.answer = null;
    this.completion = null;
    this.span = null; // the question whose tokens are known: what the model itself said
    this.running = null;
    this.checked = null;
  }

  async show(element, rows, isCurrent) {
    this.rows = rows;
    const now = rows.state;
    // What was typed stays when the page is drawn anew, unless a link asks something else.
    const asks = JSON.stringify([now.prompt, now.target, now.rather]);
    const isSame = this.asks === asks && this.box;
    const typed = isSame ? this.written() : [now.prompt, now.target, now.rather];
    if (isSame) this.checked = [...this.choice.querySelectorAll("input:checked")].map((i) => i.value);
    this.asks = asks;
    if (!isSame) Object.assign(this, { span: tokensOf(now), completion: null, answer: null });
    const prompt = h("textarea", { id: "prompt", rows: 2, value: typed[0], spellcheck: "false" });
    const input = (id, value) => h("input", { id, value, autocomplete: "off", spellcheck: "false" });
    const [target, rather] = [input("target", typed[1]), input("rather", typed[2])];
    this.box = { prompt, target, rather };
    this.progress = h("div.progress", { role: "status" });
    this.completed = h("div.completed", {});
    this.results = h("div.results", {});
    this.choice = h("div.methods", { role: "group", "aria-label": "Methods" }, h("p.quiet", {}, "Opening the model and its store…"));
    this.go = h("button.main-action", { type: "submit", disabled: true }, "Trace");
    fill(element, h("article.live", {},
      h("h2", {}, "Trace a question"),
      h("p.quiet", {}, "Which training passages make the model say the target after the prompt?"),
      h("div.asking", {},
      h("form.ask", { onsubmit: (e) => (e.preventDefault(), this.trace()) },
        h("label", { for: "prompt" }, "Prompt"), prompt, this.examples(),
        h("div.row", {}, h("button", { type: "button", onclick: () => this.complete() }, "Let the model go on")),
        this.completed,
        h("label", { for: "target" }, "Target"), target,
        h("label", { for: "rather" }, "Rather than ", h("span.quiet", {}, "(another target, or nothing)")), rather,
        this.choice,
        h("div.row", {}, this.go, h("button", { type: "button", onclick: () => this.cancel() }, "Stop"))),
        h("div.answer", {}, this.progress, this.results))));
    if (this.completion) this.showCompletion();
    if (this.answer) this.showAnswer();
    try {
      this.abilities ??= (await this.data.live("describe", {}, (job) => this.showProgress(job))).result;
    } catch (error) {
      fill(this.progress);
      fill(this.choice, h("p.wrong", {}, error.message));
      return;
    }
    if (!isCurrent()) return;
    this.showChoice();
    if (!this.running) fill(this.progress);
  }

  /** The prompt, the target and the other target in the form. */
  written() {
    return Object.values(this.box).map((box) => box.value);
  }

  write(...texts) {
    Object.values(this.box).forEach((box, i) => (box.value = texts[i] ?? ""));
  }

  showChoice() {
    const names = this.checked?.length ? this.checked : this.rows.state.methods.split(",").filter(Boolean);
    const { methods } = this.abilities;
    const usual = methods.filter((m) => m.usual).map((m) => m.name);
    const on = names.length ? names : usual.length ? usual : methods.slice(0, 2).map((m) => m.name);
    const check = (m) => h("label.check", {},
      h("input", { type: "checkbox", name: "method", value: m.name, checked: on.includes(m.name) }), m.title);
    const here = methods.filter((m) => !m.lacks);
    const [first, further] = [here.filter((m) => m.usual || on.includes(m.name)), here.filter((m) => !m.usual && !on.includes(m.name))];
    const lacking = methods.filter((m) => m.lacks);
    fill(this.choice, h("span.label", {}, "Methods"), first.map(check),
      further.length > 0 && h("details", {}, h("summary", {}, `${further.length} more methods`), further.map(check)),
      lacking.length > 0 && h("details", {}, h("summary", {}, `${lacking.length} not available in this run`),
        h("ul", {}, lacking.map((m) => h("li.quiet", {}, h("b", {}, m.title), `: ${m.lacks}`)))));
    const { passages, parameters } = this.abilities;
    this.choice.append(h("p.quiet", {}, `${passages.toLocaleString("en-US")} passages, a model of ${parameters.toLocaleString("en-US")} parameters`));
    this.go.disabled = false;
  }

  showProgress(job) {
    const share = job.total ? job.done / job.total : null;
    const meter = h("progress", { max: 1, value: share ?? undefined, "aria-label": job.what || "working" });
    fill(this.progress, meter, h("span", {}, `${job.what || "waiting"}${share === null ? "" : ` ${Math.floor(100 * share)}%`}`));
  }

  async ask(what, body) {
    this.cancel(); // the answer to an earlier question is no longer needed
    try {
      const job = await this.data.live(what, body, (j) => {
        this.running = j;
        this.showProgress(j);
      });
      fill(this.progress, job.state === "cancelled" ? "Stopped." : h("span.quiet", {}, `${number(job.seconds, 1)} s`));
      return job.state === "done" ? job.result : null;
    } catch (error) {
      fill(this.progress, h("span.wrong", {}, error.message));
      return null;
    } finally {
      this.running = null;
    }
  }

  cancel() {
    if (this.running) this.data.cancel(this.running).catch((e) => tell(e.message, "wrong"));
  }

  async complete() {
    const text = this.box.prompt.value;
    const completion = await this.ask("complete", { prompt: text, tokens: LONGEST });
    if (!completion) return;
    this.completion = { ...completion, text };
    this.showCompletion();
  }

  /** Prompts of the results, of several relations, whose target the model states. */
  examples() {
    const { main } = this.rows;
    const { prompt, relation, model_correct: states } = main?.columns ?? {};
    const firsts = new Map();
    const count = main?.loaded ?? 0;
    // From three parts of the list, which may be in the order of subjects.
    for (let part = 0; part < 3; part++) {
      for (let row = Math.floor((part * count) / 3); row < count && firsts.size <= part; row++) {
        if (prompt?.[row] && states?.[row] !== false && !firsts.has(relation?.[row])) firsts.set(relation?.[row], row);
      }
    }
    return firsts.size > 0 && h("div.row", {}, h("span.quiet", {}, "For example"), [...firsts.values()].map((row) =>
      h("button.chip", { type: "button", onclick: () => (this.write(prompt[row]), this.complete()) }, prompt[row])));
  }

  /** What the model says, and whole answers that it may give: each is traced by a click. */
  showCompletion() {
    const { answers, steps, ended, prompt, text } = this.completion;
    const choose = (span) => {
      this.span = span;
      this.write(span.prompt, span.target);
      return this.trace();
    };
    const answer = (a) => h("button", { type: "button", title: `Trace “${a.target.trim()}”`,
      onclick: () => choose({ prompt: text, target: a.target, tokens: [prompt, a.ids] }) }, h("b", {}, a.target.trim()), ` ${percent(a.probability)}`);
    fill(this.completed,
      said(this.completion, this.span?.stop && this.span, choose),
      h("p.quiet", {}, ended && "The model ends the passage there. ", "Click a word, or drag over several, to trace it."),
      answers.length > 0 && h("div.row", { role: "group", "aria-label": "Answers that the model may give" },
        h("span.quiet", {}, "Answers"), answers.filter((a, i) => !i || a.probability > 0.001).map(answer)),
      h("details", {}, h("summary", {}, "token by token"),
        h("ol.steps", { "aria-label": "The tokens of the completion" }, steps.map((step) =>
          h("li", {}, h("b", {}, step.token.trim() || "␣"), " ", percent(step.probability),
            h("ul", { "aria-label": "Other candidates" }, step.others.map((o) => h("li", {}, `${o.token.trim() || "␣"} ${percent(o.probability)}`))))))));
  }

  async trace() {
    const checked = [...this.choice.querySelectorAll("input:checked")].map((i) => i.value);
    const [prompt, target, rather] = this.written();
    const able = this.abilities.methods.filter((m) => m.contrasts || !rather.trim()).map((m) => m.name);
    const methods = checked.filter((name) => able.includes(name));
    if (!target.trim()) return tell("Give a target, or let the model go on and click a word of its answer.", "wrong");
    if (!checked.length) return tell("Choose a method.", "wrong");
    if (!methods.length) return tell("These methods rank for one target: choose one that compares gradients.", "wrong");
    this.checked = checked;
    this.asks = JSON.stringify([prompt, target, rather]);
    // Tokens stand for a text only as long as nobody changes it.
    const isSaid = this.span?.prompt === prompt && this.span.target === target;
    const query = { prompt, target, tokens: isSaid ? this.span.tokens : null, contrast: rather };
    const tokens = isSaid ? query.tokens.map((ids) => ids.join(".")).join("-") : "";
    state.set({ prompt, target, rather, tokens, methods: checked.join(",") }, { replace: true });
    const answer = await this.ask("trace", { query, methods, k: 10 });
    if (!answer) return;
    const left = checked.filter((name) => !able.includes(name)).map((name) => this.abilities.methods.find((m) => m.name === name).title);
    this.answer = { ...answer, query, left };
    this.showAnswer();
    // On a narrow page the passages are below the form.
    if (this.results.getBoundingClientRect().top > innerHeight - 100) this.results.scrollIntoView();
  }

  showAnswer() {
    const { data, answer } = this;
    const rather = answer.query.contrast.trim();
    const methods = answer.methods.map((m, i) => ({
      label: m.name, title: m.title, record: m.record, marks: m.record.proponent_correct ?? null, first: i === 0,
    }));
    const record = methods[0].record;
    const context = { data, query: queryOf(record), side: this.rows.state.side, heat: heatFor(data, answer.query), onNote: () => {} };
    fill(this.results, heading(record),
      h("dl.facts", {},
        h("div", {}, h("dt", {}, "p(target | prompt)"), h("dd", {}, percent(answer.probability))),
        h("div", {}, h("dt", {}, "target's rank"), h("dd", {}, String(answer.rank))),
        rather !== "" && h("div", {}, h("dt", {}, `p(${rather} | prompt)`), h("dd", {}, percent(answer.contrast_probability)))),
      rather !== "" && h("p.quiet", {}, "Proponents make the model say ", h("b", {}, answer.query.target.trim()), " rather than ",
        h("b", {}, rather), ", opponents the contrary.", answer.left.length > 0 && ` Left out, since they rank for one target: ${answer.left.join(", ")}.`),
      h("div.actions", {}, sides(this.rows.state.side)),
      highlightBar(),
      h("div.columns", { "data-count": methods.length }, methods.map((m) => column(m, methods.filter((o) => o !== m), context))));
  }
}

/** The question that a link asks by its tokens, or null. */
function tokensOf({ prompt, target, tokens }) {
  if (!/^[\d.]+-[\d.]+$/u.test(tokens)) return null;
  return { prompt, target, tokens: tokens.split("-").map((ids) => ids.split(".").map(Number)) };
}

/** Shows which tokens carry a score of {prompt, target}; missing where there is no model to ask. */
function heatFor(data, query) {
  if (!data.index.live) return null;
  return {
    can: (label) => (data.index.heat_methods ?? []).includes(label),
    async show(method, passage, sought, box, onShown) {
      fill(box, h("p.quiet", {}, "Asking the model…"));
      const question = { query, method, passage: passage.id };
      try {
        const job = await data.live("heat", question, (j) => fill(box, h("p.quiet", {}, j.what || "waiting…")));
        if (!job.result) return fill(box);
        fill(box, drawn(job.result, sought));
        onShown();
      } catch (error) {
        fill(box, h("p.wrong", {}, error.message));
      }
    },
  };
}

/** The passage's tokens by their parts of the score; what is sought stays underlined. */
function drawn({ tokens, score, sum, faithful }, sought) {
  const spans = find(tokens.map((t) => (t.special ? "" : t.text)).join(""), sought);
  let at = 0;
  const most = Math.max(...tokens.map((t) => Math.abs(t.part)), 1e-30);
  const words = tokens.map((t, i) => {
    const next = tokens[i + 1]?.text.trim() ?? "the end";
    const word = h(t.special ? "span.token.special" : "span.token", {
      title: `${number(t.part, 4)} at “${t.text.trim()}”, predicting “${next}”`,
    }, t.text);
    const strength = Math.round((Math.abs(t.part) / most) * 100);
    word.style.setProperty("--strength", `${strength}%`);
    word.classList.add(t.part < 0 ? "cold" : "warm");
    const start = at;
    at += t.special ? 0 : t.text.length;
    const span = spans.find((s) => s.start < at && s.end > start);
    if (span) word.classList.add("sought", span.kind);
    return word;
  });
  const top = [...tokens].sort((a, b) => Math.abs(b.part) - Math.abs(a.part)).slice(0, 3);
  return [
    h("p.text.tokens", { dir: "auto" }, words),
    h("p.quiet", {}, "Most: ", top.map((t, i) => [i ? ", " : "", h("b", {}, t.text.trim() || "␣"), ` ${number(t.part, 4)}`]),
      `. The parts sum to ${number(sum, 4)}; the score is ${number(score, 4)}.`),
    !faithful && h("p.wrong", {}, "They differ because the passage's text, tokenised again, gives other tokens than those it was encoded with."),
  ];
}

return { Live, heatFor };
})();

modules.metadata = (() => {
// Scores by what the passages' documents have in common: for one query, and the mean of all.

const { count, fill, h, number, percent, refill } = modules.dom;
const state = modules.state;

const MANY = 40; // groups shown before "all"

/** Fills `element` with the figures of every file that is shown, by the key that the state names. */
async function showMetadata(element, rows, row, isCurrent) {
  const { data, files, main } = rows;
  const { keys } = data.index;
  const key = Math.max(0, keys.indexOf(rows.state.key));
  const parts = await Promise.all(files.map(async (file) => {
    const match = row === undefined ? undefined : rows.match(file, row);
    return { file, all: await data.groups(file, key), query: match === undefined ? null : await data.groups(file, key, match) };
  }));
  if (!isCurrent()) return;
  const column = (name) => (row === undefined ? "" : main.columns[name]?.[row] ?? "");
  refill(element, h("article.overview.metadata", {},
    h("h2", {}, "By metadata"),
    h("p", {}, "Single passages are noisy evidence; together, those of a ", h("b", {}, keys[key]), " say more."),
    keys.length > 1 && h("div.segments", { role: "group", "aria-label": "Added up by" }, keys.map((name, i) =>
      h("button", { type: "button", "aria-pressed": String(i === key), onclick: () => state.set({ key: name }) }, name))),
    row !== undefined && h("p.quiet", {}, "This query: ", h("a", { href: state.link({ view: "query" }) }, column("prompt"), " ", h("b", {}, column("target")))),
    rows.filter && h("p.quiet", {}, "Means are over all queries of a file, whatever the filter."),
    parts.map((part) => section(keys[key], part))));
}

function section(key, { file, all, query }) {
  const ofQuery = new Map((query?.groups ?? []).map((g) => [g.label, g]));
  const n = `${count(all.queries)} ${all.queries === 1 ? "query" : "queries"}`;
  const figures = all.complete ? sums(n) : shares(n, query);
  const columns = figures.flatMap(([, ...listed]) => listed);
  const table = (groups) => h("table", {},
    h("thead", {},
      h("tr", {}, h("td", {}), figures.map(([title, ...listed]) => h(title ? "th" : "td", { scope: title ? "colgroup" : null, colspan: listed.length }, title))),
      h("tr", {}, [key, ...columns.map(([name]) => name)].map((name) => h("th", { scope: "col" }, name)))),
    h("tbody", {}, groups.map((g) => h("tr", {}, h("th", { scope: "row" }, g.label),
      columns.map(([, write]) => h("td", {}, write(g, ofQuery.get(g.label))))))));
  const box = h("div.scrolling", { tabindex: "0", role: "region", "aria-label": `${file.title} by ${key}` }, table(all.groups.slice(0, MANY)));
  return h("section", {}, h("h3", {}, file.title), h("p.quiet", {}, explained(key, all)), box,
    all.groups.length > MANY && h("button", { type: "button", onclick: (e) => (fill(box, table(all.groups)), e.target.remove()) }, `all ${count(all.groups.length)}`));
}

function explained(key, { complete, passages }) {
  if (!complete) {
    return `This file has each query's first ${count(passages)} passages only, so these are no sums over the corpus, but ` +
      `shares of the first ${count(passages)} by ${key}: counts, without scores. In brackets: 95% intervals over queries.`;
  }
  return `Sums of the scores of all ${count(passages)} passages. Expected: what as many passages have on average, whatever their ${key}. ` +
    "p: how often passages that are drawn at random lie as far from it (two-sided, of each group by itself). In brackets: 95% intervals over queries.";
}

const interval = (g, write) => [write(g.mean), g.low !== null && h("span.quiet", {}, ` [${write(g.low)}, ${write(g.high)}]`)];
const chance = (g) => (g ? number(g.p, 4) : "–");

/** The columns of a table in their groups: [title, [name, (group of all queries, of this query) → cell]…]. */
const sums = (n) => [
  ["", ["passages", (g) => count(g.size)]],
  ["this query", ["sum", (g, q) => number(q?.mean)], ["expected", (g, q) => number(q?.expected)], ["p", (g, q) => chance(q)]],
  [`mean of ${n}`, ["sum", (g) => interval(g, (x) => number(x))], ["expected", (g) => number(g.expected)], ["p", chance]],
];
const shares = (n, query) => [
  ["", ["proponents", (g) => count(g.size)]],
  ["this query", ["share", (g, q) => (query ? percent(q?.mean ?? 0) : "–")]],
  [`mean of ${n}`, ["share", (g) => interval(g, percent)]],
];

return { showMetadata };
})();

modules.noteview = (() => {
// All notes: counts of each type for each method, and the notes themselves.

const { count, fill, h } = modules.dom;
const { place } = modules.sidebar;
const state = modules.state;

/** Fills `element` with the notes. */
async function showNotes(element, rows, isCurrent) {
  const { data } = rows;
  await Promise.all(data.files.map((f) => data.load(f)));
  if (!isCurrent()) return;
  const { types } = data.index;
  const notes = [...data.notes.values()].reverse();
  const used = data.files.filter((f) => data.counts[f.label]);
  fill(element, h("article.notes-page", {},
    h("h2", {}, "Notes"),
    h("p.quiet", {}, data.index.notes
      ? "How each proponent relates to its query, as judged by a reader. A note belongs to a passage of a query and counts for every method that retrieved the passage."
      : "Notes need a file: start the viewer with --workdir or --notes."),
    h("div.scrolling", { tabindex: "0", role: "region", "aria-label": "Counts by type" }, h("table", {},
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "type"), used.map((f) => h("th", { scope: "col" }, f.title)))),
      h("tbody", {}, Object.entries(types).map(([type, name]) =>
        h("tr", {}, h("th", { scope: "row" }, name), used.map((f) => h("td", {}, counted(data.counts[f.label], type)))))))),
    h("h3", {}, `${count(notes.length)} notes`),
    h("ul.note-list", {}, notes.map((note) => {
      const having = data.files.filter((f) => f.byQuery.has(note.query));
      const file = having.find((f) => f.label === note.method) ?? having[0];
      const row = file?.byQuery.get(note.query);
      const title = `${note.prompt} ${note.target}`.slice(0, 2000);
      return h("li", {},
        h("span.tag", {}, types[note.type] ?? "comment"), " ",
        row === undefined ? title : h("a", { href: state.link({ ...place(file, row), filter: "", files: others(rows, file) }) }, title),
        " ", h("code.id", {}, note.passage_id.slice(0, 200)), note.comment && h("q", {}, note.comment));
    }))));
}

function counted(counts, type) {
  const all = Object.values(counts).reduce((a, b) => a + b, 0);
  return counts[type] ? `${counts[type]} (${Math.round((100 * counts[type]) / all)}%)` : "0";
}

/** The files shown, with one in front. */
const others = (rows, file) => [file, ...rows.files.filter((f) => f !== file)].map((f) => f.label).join(",");

return { showNotes };
})();

modules.overview = (() => {
// Aggregates: metrics by method, relation and frequency, distributions, overlap; each bar leads to
// the queries behind it.

const { scatter } = modules.chart;
const { count, fill, h, number, percent } = modules.dom;
const { quote } = modules.filter;
const { firstRank, groups, histogram, judges, metrics } = modules.metrics;
const { place } = modules.sidebar;
const state = modules.state;

const MANY = 40; // relations shown before "all"

/** Fills `element` with the aggregates of the main file's chosen rows. */
async function showOverview(element, rows, chosen, tools) {
  const { data, files, main } = rows;
  await Promise.all([...files, ...compared(rows)].map((f) => data.load(f)));
  const shared = await Promise.all(files.slice(1).map((f) => data.overlap(main, f)));
  if (!tools.isCurrent()) return;
  const marksOf = (file) => chosen.map((row) => {
    const match = rows.match(file, row);
    return match === undefined ? null : rows.marks(file, match);
  });
  const marksByFile = new Map(files.map((f) => [f, new Map(marksOf(f).map((m, i) => [chosen[i], m]))]));
  const filtered = rows.filter ? ` that match “${rows.filter}”` : "";
  fill(element, h("article.overview", {},
    h("h2", {}, "Overview"),
    data.index.run && story(data.index.run),
    data.index.links?.length > 0 && h("p", {}, "Download: ", data.index.links.map(([name, href], i) => [i ? " · " : "", h("a", { href }, name)])),
    suggested(rows),
    h("h3", {}, "In detail"),
    h("p.quiet", {}, `${count(chosen.length)} queries of ${main.title}${filtered}, for the methods that are shown. Click a bar to see its queries.`),
    (!data.index.run || filtered) && summaryTable(rows, chosen, marksByFile),
    byGroup("By relation", "relation", rows, chosen, marksByFile),
    byGroup("By fact frequency", "bucket", rows, chosen, marksByFile, byFrequency(rows)),
    ranks(rows, chosen, marksByFile),
    scores(rows, chosen),
    overlaps(rows, chosen, shared),
    runTables(data),
    plots(data)));
}

/** What the run was, and all of its methods by both measures. */
function story({ facts, methods }) {
  const cell = (m, metric, write) => {
    const [mean, low, high] = m[metric] ?? [];
    return h("td", {}, mean === undefined ? "–" : write(mean), low !== undefined && h("span.quiet", {}, ` [${write(low)}, ${write(high)}]`));
  };
  const step = (x) => `${x < 0 ? "−" : "+"}${Math.abs(100 * x).toFixed(2)}%`;
  // A corpus without labels has no MRR and no recall.
  const shown = [
    ["mrr", (x) => x.toFixed(3), "MRR", "does the first passage that states the fact come early? 1: always first"],
    ["recall_at_10", (x) => x.toFixed(3), "recall@10", "share of queries with such a passage among the first ten"],
    ["tail_patch", step, "tail-patch", "how much likelier the target becomes by one training step on a passage"],
  ].filter(([metric]) => methods.some((m) => m[metric]));
  const both = methods.filter((m) => m.mrr && m.tail_patch);
  const ends = (x) => (x.length > 2 ? x.slice(1) : null);
  return h("section.story", {},
    h("dl.facts", {}, facts.map(([name, text]) => h("div", {}, h("dt", {}, name), h("dd", {}, text)))),
    methods.some((m) => m.mrr) && h("p", {}, "Each method ranks the corpus for every query, and is measured twice: do the passages it finds ", h("i", {}, "state"),
      " the fact (MRR, recall), and does a training step on them ", h("i", {}, "move"), " the model (tail-patch)? The two need not agree."),
    scrolling("All methods", h("table", {},
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "method"), shown.map(([, , name, meaning]) => h("th", { scope: "col", title: meaning }, name)))),
      h("tbody", {}, methods.map((m) => h("tr", {}, h("th", { scope: "row" }, m.title),
        shown.map(([metric, write]) => cell(m, metric, write))))))),
    both.length > 1 && scatter(both.map((m) => ({
      x: m.mrr[0], y: m.tail_patch[0], xs: ends(m.mrr), ys: ends(m.tail_patch),
      title: `${m.title}: MRR ${m.mrr[0].toFixed(3)}, tail-patch ${step(m.tail_patch[0])}`, name: m.title,
    })), {
      x: "MRR: finds passages that state the fact",
      y: "tail-patch: change of p(target)",
      percent: ["y"],
      shape: 0.6,
      description: "Tail-patch against MRR, a point for each method with its 95% intervals",
    }));
}

/** The methods by which queries are suggested: as many as fit side by side, the shown ones first. */
const compared = ({ files, data }) => [...new Set([...files, ...data.files])].slice(0, 4).filter((f) => judges(f).length);

/** Three queries to begin with: the model knows the fact (states it, where no prior was measured), and the methods differ most. */
function suggested(rows) {
  const { main } = rows;
  const ranked = compared(rows);
  const labels = ranked.map((f) => f.label).join(",");
  if (ranked.length < 2 || !main.columns.model_correct?.length) return null;
  const reciprocal = (file, row) => 1 / (firstRank(rows.marks(file, rows.match(file, row)) ?? []) ?? Infinity);
  const spread = (row) => {
    const all = ranked.filter((f) => rows.match(f, row) !== undefined).map((f) => reciprocal(f, row));
    return Math.max(...all) - Math.min(...all);
  };
  const { model_correct: states, knowledge } = main.columns;
  const isMeasured = main.fields.includes("knowledge");
  const known = Array.from({ length: main.loaded }, (_, row) => row)
    .filter((r) => (isMeasured ? knowledge[r] === "knows" : states[r]) && rows.marks(main, r));
  const far = new Map(known.map((row) => [row, spread(row)]));
  const likely = (row) => main.columns.probability?.[row] ?? 0;
  const best = known.filter((r) => far.get(r) > 0).sort((a, b) => far.get(b) - far.get(a) || likely(b) - likely(a));
  // One of each relation first.
  const relation = (row) => main.columns.relation?.[row];
  const firsts = best.filter((row, i) => best.findIndex((r) => relation(r) === relation(row)) === i);
  const three = [...new Set([...firsts, ...best])].slice(0, 3);
  if (!three.length) return null;
  const firstAt = (file, row) => firstRank(rows.marks(file, rows.match(file, row)) ?? []) ?? "none";
  return h("section", {}, h("h3", {}, "Three queries to start with"),
    h("p.quiet", {}, `The model ${isMeasured ? "knows" : "states"} the fact, and the methods differ most in where they rank the first passage that states it.`),
    h("ul.suggested", {}, three.map((row) => h("li", {},
      h("a", { href: state.link({ ...place(main, row), files: labels }) }, main.columns.prompt[row], " ", h("b", {}, main.columns.target[row])),
      h("span.quiet", {}, ranked.map((f) => ` · ${f.title}: ${firstAt(f, row)}`))))));
}

const short = (text) => (text.length > 120 ? `${text.slice(0, 120)}…` : text);

/** A link to the queries that pass a filter, beside the present one. */
function narrowed(rows, extra) {
  const { filter } = rows;
  const both = filter ? `(${filter}) and ${extra}` : extra;
  return state.link({ view: "query", filter: both, page: "", q: "" });
}

function bar(value, label, href, wide = 1) {
  const inside = h("span.fill", {});
  inside.style.width = `${Math.max(0, Math.min(1, (value ?? 0) / wide)) * 100}%`;
  return h("a.bar", { href }, h("span.track", { "aria-hidden": "true" }, inside), h("span.value", {}, label));
}

const cells = (m) => [number(m.mrr), percent(m.recall), percent(m.precision)];

function summaryTable(rows, chosen, marksByFile) {
  const k = Math.max(...rows.files.map((f) => f.longest), 1);
  return h("section", {}, h("h3", {}, "Methods"), scrolling("Methods", h("table", {},
    h("thead", {}, h("tr", {}, ["method", "queries judged", `MRR@${k}`, "recall@10", "precision@10"].map((n) => h("th", { scope: "col" }, n)))),
    h("tbody", {}, rows.files.map((file) => {
      const m = metrics([...marksByFile.get(file).values()]);
      return h("tr", {}, h("th", { scope: "row" }, file.title), h("td", {}, count(m.n)), cells(m).map((c) => h("td", {}, c)));
    })))),
  h("p.quiet", {}, `Computed from the records: a correct passage beyond the first ${k} counts as not found, ` +
    "and queries without any correct passage are not judged. The run's own table below uses full ranks, where it has them."));
}

function scrolling(name, table) {
  return h("div.scrolling", { tabindex: "0", role: "region", "aria-label": name }, table);
}

function byFrequency(rows) {
  const least = new Map();
  const { bucket, frequency } = rows.main.columns;
  bucket?.forEach((name, row) => {
    const x = frequency?.[row] ?? Number.parseFloat(String(name).replaceAll(",", ""));
    if (name !== null) least.set(name, Math.min(least.get(name) ?? Infinity, x));
  });
  return (a, b) => (least.get(a[0]) ?? 0) - (least.get(b[0]) ?? 0);
}

function byGroup(title, field, rows, chosen, marksByFile, order) {
  const { main, files } = rows;
  let parts = groups(chosen, (row) => main.columns[field]?.[row]);
  if (!parts.length) return null;
  if (order) parts.sort(order);
  const table = (listed) => h("table.grouped", {},
    h("thead", {}, h("tr", {}, h("th", { scope: "col" }, field), h("th", { scope: "col" }, "queries"),
      files.map((f) => h("th", { scope: "col" }, `${f.title}: MRR`)))),
    h("tbody", {}, listed.map(([name, members]) => {
      const href = narrowed(rows, `${field} = ${quote(name)}`);
      return h("tr", {}, h("th", { scope: "row" }, h("a", { href }, short(name))), h("td", {}, count(members.length)),
        files.map((file) => {
          const m = metrics(members.map((r) => marksByFile.get(file).get(r)));
          return h("td", {}, m.n ? bar(m.mrr, number(m.mrr), href) : "–");
        }));
    })));
  const box = scrolling(title, table(parts.slice(0, MANY)));
  const more = parts.length > MANY && h("button", { type: "button", onclick: (e) => (fill(box, table(parts)), e.target.remove()) }, `all ${count(parts.length)}`);
  return h("section", {}, h("h3", {}, title), box, more);
}

function ranks(rows, chosen, marksByFile) {
  const judged = rows.files.filter((f) => [...marksByFile.get(f).values()].some(Boolean));
  if (!judged.length) return null;
  return h("section", {}, h("h3", {}, "Rank of the first correct passage"), judged.map((file) => {
    const marks = [...marksByFile.get(file).values()].filter(Boolean);
    const most = Math.max(...marks.map((m) => m.length), 1);
    const counts = new Array(most + 1).fill(0);
    for (const m of marks) counts[firstRank(m) ?? 0]++;
    const prefix = file === rows.main ? "" : `${file.label}.`;
    const bars = [...counts.slice(1).map((n, i) => [String(i + 1), n, `${prefix}rank = ${i + 1}`]), ["none", counts[0], `${prefix}found = no`]];
    return figure(file.title, "rank", bars.map(([name, n, filter]) => ({ name, n, href: narrowed(rows, filter) })));
  }));
}

function scores(rows, chosen) {
  const drawn = rows.files.map((file) => {
    const prefix = file === rows.main ? "" : `${file.label}.`;
    const value = (row) => {
      const match = rows.match(file, row);
      return match === undefined ? null : file.columns.top?.[match];
    };
    const bins = histogram(chosen, value);
    if (!bins.length) return null;
    const written = (x) => String(Number(x.toPrecision(17)));
    return figure(`${file.title}: score of the first proponent`, "score", bins.map((b, i) => ({
      name: number(b.low),
      n: b.rows.length,
      right: b.rows.filter((r) => rows.marks(file, rows.match(file, r))?.[0]).length,
      description: `${number(b.low)} to ${number(b.high)}`,
      href: narrowed(rows, `${prefix}top >= ${written(b.low)} and ${prefix}top ${i + 1 === bins.length ? "<=" : "<"} ${written(b.high)}`),
    })), "dark: the first proponent is correct");
  }).filter(Boolean);
  return drawn.length > 0 && h("section", {}, h("h3", {}, "Score distributions"), drawn);
}

/** Upright bars over an axis `x`, counting queries: [{name, n, href, right, description}]. */
function figure(title, x, bars, legend) {
  const most = Math.max(...bars.map((b) => b.n), 1);
  const every = bars.length > 12 ? 4 : 1; // names that have room
  return h("figure.chart", {}, h("figcaption", {}, title, legend && h("span.quiet", {}, ` · ${legend}`)),
    h("div.counts", { "aria-hidden": "true" }, h("span", {}, count(most)), h("i", {}, "queries"), h("span", {}, "0")),
    h("ol.bars", {}, bars.map((b, i) => {
      const column = h("span.column-bar", { "aria-hidden": "true" });
      column.style.height = `${(100 * b.n) / most}%`;
      if (b.right !== undefined) {
        const part = h("span.part", {});
        part.style.height = `${b.n ? (100 * b.right) / b.n : 0}%`;
        column.append(part);
      } else column.classList.add("part");
      const description = `${b.description ?? b.name}: ${count(b.n)} queries${b.right === undefined ? "" : `, ${count(b.right)} correct`}`;
      return h("li", {}, h("a", { href: b.href, title: description, "aria-label": description },
        h("span.room", {}, column), h("span.name", { "aria-hidden": "true" }, i % every ? "" : b.name)));
    })), h("div.axis", { "aria-hidden": "true" }, x));
}

function overlaps(rows, chosen, shared) {
  if (!shared.length) return null;
  const { files } = rows;
  const parts = shared.map((numbers, i) => {
    const file = files[i + 1];
    const known = chosen.map((r) => numbers[r]).filter((n) => n !== null);
    if (!known.length) return null;
    const most = Math.max(files[0].longest, 1);
    const counts = new Array(most + 1).fill(0);
    for (const n of known) counts[n]++;
    const mean = known.reduce((a, b) => a + b, 0) / known.length;
    return figure(`${files[0].title} and ${file.title}: ${number(mean, 2)} shared on average`, "shared proponents",
      counts.map((n, shared) => ({ name: String(shared), n, description: `${shared} shared`, href: narrowed(rows, `${file.label}.overlap = ${shared}`) })));
  }).filter(Boolean);
  return parts.length > 0 && h("section", {}, h("h3", {}, "Proponents that two methods share"), parts);
}

function runTables(data) {
  return data.index.tables.map(({ name, text }) => {
    const blocks = markdown(text);
    return h("details", {}, h("summary", {}, `All tables of the run: ${name}`), blocks);
  });
}

/** The tables and paragraphs of a Markdown text, all as text. */
function markdown(text) {
  const out = [];
  for (const block of text.split(/\n\s*\n/u)) {
    const lines = block.split("\n").filter((l) => l.trim());
    if (!lines.length) continue;
    if (!lines[0].startsWith("|")) {
      out.push(h("p", {}, lines.join(" ").replace(/^#+\s*/u, "")));
      continue;
    }
    const split = (l) => l.replace(/^\||\|\s*$/gu, "").split("|").map((c) => c.trim());
    const [head, ...body] = lines.map(split).filter((c) => !c.every((x) => /^:?-+:?$/u.test(x)));
    out.push(scrolling("Table", h("table", {},
      h("thead", {}, h("tr", {}, head.map((c) => h("th", { scope: "col" }, c)))),
      h("tbody", {}, body.map((r) => h("tr", {}, r.map((c, i) => (i ? h("td", {}, c) : h("th", { scope: "row" }, c)))))))));
  }
  return out;
}

function plots(data) {
  if (!data.index.plots.length) return null;
  return h("section", {}, h("h3", {}, "Plots of the run"), h("div.plots", {}, data.index.plots.map((p) =>
    h("figure", {}, h("a", { href: `plots/${p.file}` }, h("img", { src: `plots/${p.file}`, alt: `plot ${p.name}`, loading: "lazy" })), h("figcaption", {}, p.name)))));
}

return { showOverview };
})();

modules.panels = (() => {
// What opens over the page: help, and opening further results.

const { fill, h, tell } = modules.dom;
const { ask } = modules.data;

/** Shows a dialog; it closes by Escape, by its button, or by a click beside it. */
function dialog(title, ...inside) {
  const box = h("dialog", { "aria-labelledby": "dialog-title" },
    h("header", {}, h("h2", { id: "dialog-title" }, title),
      h("button", { type: "button", "aria-label": "Close", onclick: () => box.close() }, "×")),
    inside);
  box.addEventListener("close", () => box.remove());
  box.addEventListener("click", (e) => e.target === box && box.close());
  document.body.append(box);
  box.showModal();
  return box;
}

const KEYS = [
  ["j  k", "next query, previous query"],
  ["r", "a random query"],
  ["/", "go to the filter"],
  ["g", "jump to a number or id"],
  ["p  o  b", "proponents, opponents, both"],
  ["1 … 9", "show or hide a method"],
  ["v  t  n  q", "overview, trace, notes, queries"],
  ["d", "dark or light"],
  ["?", "this help"],
];

const EXAMPLES = [
  ["paris", "the word is in prompt, target or id"],
  ["rank <= 3", "the first correct proponent is among the first three"],
  ["found = no and confidence >= 0.5", "the model is sure, and no proponent is correct"],
  ['relation = "place of birth"', "quote values with spaces"],
  ["prompt ~ capital or prompt ~ river", "~ contains, !~ does not"],
  ["frequency < 1000 (rank = 1 or hits > 4)", "conditions side by side are joined by and"],
  ["rank = 1 and bm25.rank > 1", "another file's field, by its label"],
  ["bm25.overlap = 0", "no proponent shared with another file"],
];

/** Explains the filter and the keys. */
function showHelp(rows) {
  dialog("Help",
    h("h3", {}, "Filter"),
    h("table.help", {}, h("tbody", {}, EXAMPLES.map(([text, meaning]) => h("tr", {}, h("th", { scope: "row" }, h("code", {}, text)), h("td", {}, meaning))))),
    h("p", {}, "Operators: ", h("code", {}, "= != < <= > >= ~ !~ and or not ( )"), ". A query that lacks a field matches only != and !~."),
    h("p", {}, "Fields: ", rows.fields().map((f, i) => [i ? ", " : "", h("code", {}, f)]), "."),
    h("h3", {}, "Keys"),
    h("table.help", {}, h("tbody", {}, KEYS.map(([key, meaning]) => h("tr", {}, h("th", { scope: "row" }, h("kbd", {}, key)), h("td", {}, meaning))))));
}

/** Opens a further file of results: from this machine, or from an address. */
function showOpen(index, onOpened) {
  const status = h("p", { role: "status" });
  const opened = async (work) => {
    fill(status, "Opening…");
    try {
      const { label } = await work();
      box.close();
      tell(`Opened ${label}.`);
      onOpened(label);
    } catch (error) {
      fill(status, h("span.wrong", {}, error.message));
    }
  };
  const file = h("input", { type: "file", id: "open-file", accept: ".jsonl,.gz,.json" });
  const url = h("input", { type: "url", id: "open-url", placeholder: "https://…/results.jsonl", disabled: !index.urls });
  const box = dialog("Open results",
    h("form", {
      onsubmit: (e) => {
        e.preventDefault();
        if (file.files.length) opened(() => ask(`upload?name=${encodeURIComponent(file.files[0].name)}`, file.files[0]));
      },
    }, h("label", { for: "open-file" }, "A file (JSON lines, may be gzipped)"), file, h("button", { type: "submit" }, "Open")),
    h("form", {
      onsubmit: (e) => {
        e.preventDefault();
        opened(() => ask("open", { url: url.value }));
      },
    }, h("label", { for: "open-url" }, "An address"), url, h("button", { type: "submit", disabled: !index.urls }, "Fetch"),
    !index.urls && h("p.quiet", {}, "The viewer fetches nothing from other sites unless it is started with --allow_urls or with a URL in --results.")),
    status);
}

return { showHelp, showOpen };
})();

modules.main = (() => {
// The page: what is on it by the state, its header, its keys.

const { count, fill, h, number, percent, refill, tell } = modules.dom;
const { showBoard } = modules.board;
const { Data } = modules.data;
const { heatFor, Live } = modules.live;
const { showMetadata } = modules.metadata;
const { judges, metrics } = modules.metrics;
const { showNotes } = modules.noteview;
const { showOverview } = modules.overview;
const { showHelp, showOpen } = modules.panels;
const { rowOf, showQuery } = modules.query;
const { Rows, shown } = modules.rows;
const { place, Sidebar } = modules.sidebar;
const state = modules.state;

const main = document.getElementById("main");
const top = document.getElementById("top");
const data = new Data();
const live = new Live(data);
const sidebar = new Sidebar(document.getElementById("side"), { onOpen: open, onHelp: () => showHelp(rows) });

let rows = null; // by the state
let chosen = [];
let listed = null; // the file whose rows are chosen
let filter = ""; // by which they are
let turn = 0; // of drawing: what was begun for an earlier state is dropped

const VIEWS = [["query", "Queries"], ["overview", "Overview"], ["trace", "Trace"], ["notes", "Notes"], ["metadata", "Metadata"], ["board", "Board"]];

async function start() {
  theme(remembered());
  await data.open();
  state.follow(data.index.run && data.files.length ? "overview" : data.index.board ? "board" : "query");
  state.onChange((now, before) => draw(now.view !== before.view));
  await draw(false);
}

/** Draws everything by the state. */
async function draw(focus) {
  const begun = ++turn;
  const isCurrent = () => begun === turn;
  delete document.documentElement.dataset.ready;
  try {
    await drawn(isCurrent, focus);
  } catch (error) {
    if (isCurrent()) fill(main, h("section.malformed", {}, h("h2", {}, "This cannot be shown"), h("p.wrong", {}, error.message)));
    console.warn(error.message);
  }
  // For whoever waits until all is drawn.
  if (isCurrent()) document.documentElement.dataset.ready = state.get().view;
}

async function drawn(isCurrent, focus) {
  const now = state.get();
  rows = new Rows(data, now);
  document.body.dataset.view = now.view;
  // Rows come in chunks: the list is shown with the first, and again with the last.
  const loading = rows.files.map((f) => data.load(f, (file) => file === rows.main && file.loaded < file.rows && early(isCurrent)));
  drawTop();
  if (!rows.main) return showBoard(main, rows, isCurrent);
  await loading[0];
  if (!isCurrent()) return;
  const result = await rows.chosen();
  await Promise.all(loading);
  if (!isCurrent()) return;
  // An error, such as a filter that is half typed, leaves the last list, and in a new page all.
  if (result.rows) [chosen, filter] = [result.rows, now.filter];
  else if (listed !== rows.main.label) [chosen, filter] = [(await rows.chosen("")).rows, ""];
  rows.filter = filter;
  listed = rows.main.label;
  // What the model does not state is no place to begin.
  const stated = filter || now.sort ? undefined : chosen.find((r) => rows.main.columns.model_correct?.[r]);
  const row = now.q ? rowOf(rows.main, now.q) : stated ?? chosen[0];
  sidebar.update(rows, chosen, result.error, row);
  drawTop();
  await drawMain(now, row, isCurrent);
  if (focus && isCurrent()) main.focus({ preventScroll: true });
}

/** Shows the first rows of a large file while the others are on their way. */
async function early(isCurrent) {
  if (!isCurrent() || rows.state.filter || rows.state.sort) return;
  sidebar.update(rows, Array.from({ length: rows.main.loaded }, (_, i) => i), null, undefined);
}

async function drawMain(now, row, isCurrent) {
  document.title = `${VIEWS.find(([view]) => view === now.view)?.[1] ?? "Queries"} · tda`;
  if (now.view === "overview") return showOverview(main, rows, chosen, { isCurrent });
  if (now.view === "board") return showBoard(main, rows, isCurrent);
  if (now.view === "metadata" && hasView("metadata")) return showMetadata(main, rows, row, isCurrent);
  if (now.view === "notes") return showNotes(main, rows, isCurrent);
  if (now.view === "trace") {
    if (data.index.live) return live.show(main, rows, isCurrent);
    return fill(main, h("p.quiet", {}, "Live tracing needs a run's model and store: python -m experiments.view --workdir=DIR"));
  }
  if (row === undefined) {
    return fill(main, h("p.quiet", {}, now.q ? `${rows.main.title} has no query ${now.q}.` : "No query matches this filter."));
  }
  await showQuery(main, rows, row, {
    isCurrent,
    step: (by) => sidebar.step(by),
    heatFor: (record) => heatFor(data, { prompt: record.inputs_plaintext, target: record.targets_plaintext }),
    onNote: renote,
  });
  document.title = `${rows.main.columns.prompt?.[row] ?? "tda viewer"} · tda`;
}

/** The note on a passage may be shown in other columns too. */
function renote(query, passage) {
  for (const box of main.querySelectorAll("[data-note]")) {
    if (box.dataset.note !== passage || box.contains(document.activeElement)) continue;
    const note = data.note(query, passage);
    box.querySelector("select").value = note?.type ?? "";
    box.querySelector("input").value = note?.comment ?? "";
    box.querySelector("input").hidden = !note;
  }
}

function open(row) {
  sidebar.unfold(false);
  scrollTo(0, 0);
  state.set(sidebar.place(row));
}

function drawTop() {
  const now = rows.state;
  refill(top,
    h("div.bar-row", {},
      h("h1", {}, h("a.brand", { href: state.link({ view: "", q: "", filter: "", page: "" }), "aria-label": "tda viewer" }, "tda")),
      h("nav.views", { "aria-label": "Views" }, VIEWS.filter(([view]) => hasView(view)).map(([view, name]) =>
        h("a", { href: state.link({ view, page: "" }), "aria-current": now.view === view ? "page" : null }, name))),
      h("div.tools", {},
        data.index.upload && h("button", { type: "button", onclick: () => showOpen(data.index, reopened) }, "Open…"),
        h("button", { type: "button", onclick: turnTheme, "aria-label": "Dark or light", title: "Dark or light (d)" }, "◐"),
        h("button", { type: "button", onclick: () => showHelp(rows), "aria-label": "Help", title: "Help (?)" }, "?"))),
    rows.main && !["board", "trace"].includes(now.view) && h("div.methods-row", {}, picker(), judging()));
}

/** Whether there is anything to show in a view. */
function hasView(view) {
  if (view === "board") return data.index.board;
  return rows.main && (view !== "metadata" || data.index.keys?.length > 0);
}

/** The methods in one line; opened, all of them with their figures. */
function picker() {
  const head = ["shown", `MRR@${Math.max(...data.files.map((f) => f.longest))}`, "R@10", "P@10", "order"];
  return h("details.picker", { open: document.querySelector(".picker")?.open },
    h("summary", {}, h("b", {}, "Methods"), " ", rows.files.map((f) => f.title).join(" · "),
      h("span.quiet", {}, ` ${rows.files.length} of ${data.files.length}`)),
    h("div.sheet", { role: "group", "aria-label": "Methods shown" }, h("table", {},
      h("thead", {}, h("tr", {}, head.map((name) => h("th", { scope: "col", title: FIGURES[name.split("@")[0]] }, name)))),
      h("tbody", {}, data.files.map(methodLine)))));
}

const FIGURES = {
  MRR: "mean reciprocal rank of the first correct proponent, among those in the file",
  R: "share of queries with a correct proponent among the first ten",
  P: "share of correct proponents among the first ten",
};

function methodLine(file, i) {
  const on = rows.files.includes(file);
  const m = file.loaded === file.rows && on ? figuresOf(file) : {};
  const figures = m.n ? [number(m.mrr), percent(m.recall), percent(m.precision)] : ["", "", ""];
  return h("tr.method", {},
    h("th", { scope: "row" }, h("button", {
      type: "button",
      "aria-pressed": String(on),
      title: `${file.name}: ${count(file.rows)} queries${i < 9 ? ` (key ${i + 1})` : ""}`,
      onclick: () => toggle(file),
    }, file.title), file.malformed > 0 && h("span.wrong", {}, ` ${count(file.malformed)} malformed`)),
    figures.map((x) => h("td", {}, x)),
    h("td", {}, on && rows.files[0] !== file && h("button.link", { type: "button", title: "Put this method in the first column, and list its queries", onclick: () => first(file) }, "first")));
}

/** A file's metrics, kept until it is judged otherwise. */
function figuresOf(file) {
  const key = `${rows.judge(file)} ${rows.threshold()}`;
  if (file.figures?.key !== key) {
    const marks = Array.from({ length: file.rows }, (_, row) => rows.marks(file, row));
    file.figures = { key, ...metrics(marks) };
  }
  return file.figures;
}

function toggle(file) {
  const on = rows.files.includes(file);
  if (on && rows.files.length === 1) return tell("At least one method must be shown.");
  return show(on ? rows.files.filter((f) => f !== file) : [...rows.files, file]);
}

const first = (file) => show([file, ...rows.files.filter((f) => f !== file)]);

/** Shows these files. The query stays: another first file may have it under another number or id. */
async function show(files) {
  const patch = { files: files.map((f) => f.label).join(",") };
  if (files[0] !== rows.main) {
    patch.page = "";
    const { q } = rows.state;
    if (q) {
      const before = rows;
      await data.load(files[0]);
      if (rows !== before) return;
      const row = rows.match(files[0], rowOf(rows.main, q));
      if (row === undefined) tell(`${files[0].title} does not contain this query.`);
      patch.q = row === undefined ? "" : place(files[0], row).q;
    }
  }
  state.set(patch);
}

function judging() {
  const possible = [...new Set(rows.files.flatMap(judges))];
  if (!possible.length) return h("p.quiet", {}, "These files do not mark correct passages, so there is nothing to measure.");
  const judge = rows.judge(rows.files.find((f) => judges(f).length));
  const threshold = h("input", {
    id: "threshold", type: "number", min: 0, max: 1, step: 0.05, value: rows.state.threshold,
    onchange: () => state.set({ threshold: threshold.value || "0.5" }),
  });
  return h("div.judging", {},
    possible.length > 1 && [h("label", { for: "judge" }, "Judged by"),
      h("select", { id: "judge", onchange: (e) => state.set({ judge: e.target.value }) },
        possible.map((j) => h("option", { value: j, selected: j === judge }, j)))],
    judge === "entailment" && [h("label", { for: "threshold" }, "correct above"), threshold]);
}

/** Reads the index again after a file was opened, and shows that file. */
async function reopened(label) {
  await data.open();
  const files = shown(data, state.get()).map((f) => f.label).filter((l) => l !== label);
  state.set({ files: [label, ...files].slice(0, 3).join(","), q: "", filter: "", page: "" });
  draw(false);
}

function theme(name) {
  if (name === "dark" || name === "light") document.documentElement.dataset.theme = name;
}

function turnTheme() {
  const isDark = getComputedStyle(document.documentElement).colorScheme.trim() === "dark";
  theme(isDark ? "light" : "dark");
  remembered(isDark ? "light" : "dark");
}

/** The theme that was chosen before; a browser may forbid to keep it. */
function remembered(chosen) {
  try {
    if (chosen) localStorage.setItem("theme", chosen);
    return localStorage.getItem("theme");
  } catch {
    return null;
  }
}

/** Goes to another query: of the board where the board is shown, else of the list. */
function step(by) {
  if (rows.state.view !== "board") return sidebar.step(by);
  document.getElementById(by > 0 ? "board-next" : "board-previous")?.click();
}

const KEYS = {
  j: () => step(1),
  ArrowRight: () => step(1),
  k: () => step(-1),
  ArrowLeft: () => step(-1),
  r: () => sidebar.random(),
  "/": () => (sidebar.unfold(true), sidebar.input.focus()),
  g: () => (sidebar.unfold(true), sidebar.jump.focus()),
  p: () => state.set({ side: "proponents" }),
  o: () => state.set({ side: "opponents" }),
  b: () => state.set({ side: "both" }),
  q: () => state.set({ view: "query" }),
  v: () => state.set({ view: "overview" }),
  t: () => state.set({ view: "trace" }),
  n: () => state.set({ view: "notes" }),
  d: turnTheme,
  "?": () => showHelp(rows),
};

const closePicker = () => document.querySelector(".picker[open]")?.removeAttribute("open");
addEventListener("click", (e) => e.target.isConnected && !e.target.closest(".picker") && closePicker());

addEventListener("keydown", (e) => {
  if (e.key === "Escape") closePicker();
  if (!rows || e.ctrlKey || e.metaKey || e.altKey || document.querySelector("dialog[open]")) return;
  if (e.target.closest("input, textarea, select")) {
    if (e.key === "Escape") e.target.blur();
    return;
  }
  const act = /^[1-9]$/u.test(e.key) ? data.files[e.key - 1] && (() => toggle(data.files[e.key - 1])) : KEYS[e.key];
  if (!act) return;
  e.preventDefault();
  act();
});

// A text that is selected in a passage is highlighted wherever it stands.
main.addEventListener("mouseup", () => {
  const selected = getSelection();
  const text = selected.toString().trim();
  const within = (node) => node?.parentElement?.closest(".text");
  if (text.length < 2 || text.length > 200 || !within(selected.anchorNode) || !within(selected.focusNode)) return;
  const texts = state.highlights();
  if (!texts.includes(text)) state.set({ hl: JSON.stringify([...texts, text].slice(-8)) });
});

start().catch((error) => fill(main, h("section.malformed", {}, h("h2", {}, "The viewer cannot start"), h("p.wrong", {}, error.message))));

return {  };
})();
