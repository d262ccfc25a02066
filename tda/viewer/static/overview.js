// Aggregates: metrics by method, relation and frequency, distributions, overlap; each bar leads to
// the queries behind it.

import { scatter } from "./chart.js";
import { count, fill, h, number, percent } from "./dom.js";
import { quote } from "./filter.js";
import { firstRank, groups, histogram, judges, metrics } from "./metrics.js";
import { place } from "./sidebar.js";
import * as state from "./state.js";

const MANY = 40; // relations shown before "all"

/** Fills `element` with the aggregates of the main file's chosen rows. */
export async function showOverview(element, rows, chosen, tools) {
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
