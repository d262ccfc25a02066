// Live tracing: a prompt and a target, or the model's own completion; passages from the store.

import { fill, h, number, percent, tell } from "./dom.js";
import { queryOf } from "./data.js";
import { find } from "./highlight.js";
import { column } from "./passages.js";
import { heading, highlightBar, sides } from "./query.js";
import { said } from "./said.js";
import * as state from "./state.js";

const LONGEST = 24; // tokens of a completion

/** The page on which live questions are asked. It keeps its answers while others are looked at. */
export class Live {
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
export function heatFor(data, query) {
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
