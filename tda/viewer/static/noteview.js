// All notes: counts of each type for each method, and the notes themselves.

import { count, fill, h } from "./dom.js";
import { place } from "./sidebar.js";
import * as state from "./state.js";

/** Fills `element` with the notes. */
export async function showNotes(element, rows, isCurrent) {
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
