// The page: what is on it by the state, its header, its keys.

import { count, fill, h, number, percent, refill, tell } from "./dom.js";
import { showBoard } from "./board.js";
import { Data } from "./data.js";
import { heatFor, Live } from "./live.js";
import { showMetadata } from "./metadata.js";
import { judges, metrics } from "./metrics.js";
import { showNotes } from "./noteview.js";
import { showOverview } from "./overview.js";
import { showHelp, showOpen } from "./panels.js";
import { rowOf, showQuery } from "./query.js";
import { Rows, shown } from "./rows.js";
import { place, Sidebar } from "./sidebar.js";
import * as state from "./state.js";

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
