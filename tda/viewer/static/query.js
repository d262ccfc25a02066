// One query: what was asked, what is known of it, and each method's passages side by side.

import { count, fill, h, number, percent, refill, tell } from "./dom.js";
import { queryOf } from "./data.js";
import { column } from "./passages.js";
import * as state from "./state.js";

/** The main file's row that the state names; undefined where it has none. */
export function rowOf(file, name) {
  const byId = file.byId.get(name);
  if (byId !== undefined) return byId;
  const match = /^#(\d+)$/u.exec(name);
  return match && Number(match[1]) >= 1 && Number(match[1]) <= file.rows ? Number(match[1]) - 1 : undefined;
}

/** Fills `element` with a query. */
export async function showQuery(element, rows, row, tools) {
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
export function heading(record) {
  return h("h2.asked", { dir: "auto" },
    h("span.prompt", {}, record.inputs_plaintext), /\s$/u.test(record.inputs_plaintext) ? "" : " ",
    h("span.target", {}, record.targets_plaintext));
}

/** Which side of the ranking is shown. */
export function sides(side) {
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
export function highlightBar() {
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
