// A column of passages: one method's proponents or opponents for a query.

import { fill, h, number, tell } from "./dom.js";
import { marked, terms } from "./highlight.js";
import { highlights } from "./state.js";

const CLAMPED = 700; // characters above which a passage is shown folded

/** The passages of one side of a record: [{rank, id, text, score}]. */
export function passagesOf(record, side) {
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
export function column(method, others, context) {
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
