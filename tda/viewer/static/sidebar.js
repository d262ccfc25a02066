// The list of queries: filter, sort, pages, jump, random.

import { calm, count, fill, h, refill } from "./dom.js";
import * as state from "./state.js";
import { sorting } from "./rows.js";

export const PAGE = 50;

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
export class Sidebar {
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
export function place(file, row) {
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
