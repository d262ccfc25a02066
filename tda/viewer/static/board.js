// Methods held against retraining: LDS of each, and for a query what they predicted and what came.

import { scatter } from "./chart.js";
import { count, h, number, refill } from "./dom.js";
import { rowOf } from "./query.js";
import { place } from "./sidebar.js";
import * as state from "./state.js";

/** A number with as many decimals as `board.md` gives it. */
const fixed = (x, digits = 3) => (x === null || x === undefined ? "" : x.toFixed(digits).replace("-", "−"));
// A small model's steps move a target by thousandths of a per cent.
const DIGITS = { cost: 1, "tail-patch": 4 };
const withInterval = (i) => (i ? `${fixed(i.mean)} [${fixed(i.low)}, ${fixed(i.high)}]` : "");
const share = (fraction) => `${Number((100 * fraction).toPrecision(3))}%`;

/** Fills `element` with the board. */
export async function showBoard(element, rows, isCurrent) {
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
