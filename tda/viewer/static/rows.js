// The rows of the files that are shown: their fields as the filter, the sorting and the metrics see
// them.

import * as metrics from "./metrics.js";
import { FilterError, parse } from "./filter.js";

const DERIVED = ["row", "rank", "hits", "found", "malformed", "noted"];
const ALWAYS = ["id", "prompt", "target"];

/** Reads the rows of a collection by the state: which files, judged how. */
export class Rows {
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
export function shown(data, state) {
  const named = state.files.split(",").map((l) => data.file(l)).filter(Boolean);
  return named.length ? [...new Set(named)] : data.files.slice(0, 2);
}

/** The field and direction of a sorting such as "top" or "-top". */
export const sorting = (text) => (text.startsWith("-") ? [text.slice(1), true] : [text, false]);
