// Scores by what the passages' documents have in common: for one query, and the mean of all.

import { count, fill, h, number, percent, refill } from "./dom.js";
import * as state from "./state.js";

const MANY = 40; // groups shown before "all"

/** Fills `element` with the figures of every file that is shown, by the key that the state names. */
export async function showMetadata(element, rows, row, isCurrent) {
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
