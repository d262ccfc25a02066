// Live tracing: a prompt and a target, or the model's own completion; passages from the store.

import { fill, h, number, percent, tell } from "./dom.js";
import { queryOf } from "./data.js";
import { find } from "./highlight.js";
import { column } from "./passages.js";
import { heading, highlightBar, sides } from "./query.js";
import * as state from "./state.js";

/** The page on which live questions are asked. It keeps its answers while others are looked at. */
export class Live {
  constructor(data) {
    this.data = data;
    this.abilities = null;
    this.answer = null;
    this.steps = null;
    this.running = null;
    this.checked = null;
  }

  async show(element, rows, isCurrent) {
    this.rows = rows;
    const now = rows.state;
    // What was typed stays when the page is drawn anew, unless a link asks something else.
    const asks = JSON.stringify([now.prompt, now.target]);
    const isSame = this.asks === asks && this.box;
    const [promptText, targetText] = isSame ? [this.box.prompt.value, this.box.target.value] : [now.prompt, now.target];
    if (isSame) this.checked = [...this.choice.querySelectorAll("input:checked")].map((i) => i.value);
    this.asks = asks;
    const prompt = h("textarea", { id: "prompt", rows: 2, value: promptText, spellcheck: "false" });
    const target = h("input", { id: "target", value: targetText, autocomplete: "off", spellcheck: "false" });
    this.box = { prompt, target };
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
        h("div.row", {}, h("button", { type: "button", onclick: () => this.complete() }, "Let the model complete it")),
        this.completed,
        h("label", { for: "target" }, "Target"), target,
        this.choice,
        h("div.row", {}, this.go, h("button", { type: "button", onclick: () => this.cancel() }, "Stop"))),
        h("div.answer", {}, this.progress, this.results))));
    if (this.steps) this.showSteps();
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
    const completion = await this.ask("complete", { prompt: this.box.prompt.value, tokens: 8 });
    if (!completion) return;
    this.steps = completion;
    this.showSteps();
    if (!this.box.target.value) this.box.target.value = completion.answers[0]?.target ?? "";
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
      h("button.chip", { type: "button", onclick: () => (Object.assign(this.box.prompt, { value: prompt[row] }), Object.assign(this.box.target, { value: "" }), this.complete()) }, prompt[row])));
  }

  showSteps() {
    const { answers, steps, ended } = this.steps;
    const take = (target, ...inside) =>
      h("button", { type: "button", title: `Take “${target}” as the target`, onclick: () => (this.box.target.value = target) }, inside);
    fill(this.completed,
      h("div.row", { role: "group", "aria-label": "What the model may say" }, answers.filter((a, i) => !i || a.probability > 0.001).map((a) => take(a.target, h("b", {}, a.target.trim()), ` ${percent(a.probability)}`))),
      h("details", {}, h("summary", {}, "token by token: ", h("q", {}, steps.map((s) => s.token).join("").trim())),
        h("ol.steps", { "aria-label": "The model's completion" }, steps.map((step) =>
          h("li", {}, take(step.target, h("b", {}, step.token.trim() || "␣"), " ", percent(step.probability)),
            h("ul", { "aria-label": "Other candidates" }, step.others.map((o) => h("li", {}, `${o.token.trim() || "␣"} ${percent(o.probability)}`)))))),
        ended && h("p.quiet", {}, "The model ends the passage there.")));
  }

  async trace() {
    const methods = [...this.choice.querySelectorAll("input:checked")].map((i) => i.value);
    const [prompt, target] = [this.box.prompt.value, this.box.target.value];
    if (!target.trim()) return tell("Give a target, or let the model complete the prompt.", "wrong");
    if (!methods.length) return tell("Choose a method.", "wrong");
    this.checked = methods;
    this.asks = JSON.stringify([prompt, target]);
    state.set({ prompt, target, methods: methods.join(",") }, { replace: true });
    const answer = await this.ask("trace", { prompt, target, methods, k: 10 });
    if (!answer) return;
    this.answer = answer;
    this.showAnswer();
  }

  showAnswer() {
    const { data, answer } = this;
    const methods = answer.methods.map((m, i) => ({
      label: m.name, title: m.title, record: m.record, marks: m.record.proponent_correct ?? null, first: i === 0,
    }));
    const record = methods[0].record;
    const context = { data, query: queryOf(record), side: this.rows.state.side, heat: heatFor(data, record), onNote: () => {} };
    fill(this.results, heading(record),
      h("dl.facts", {},
        h("div", {}, h("dt", {}, "p(target | prompt)"), h("dd", {}, percent(answer.probability))),
        h("div", {}, h("dt", {}, "target's rank"), h("dd", {}, String(answer.rank)))),
      h("div.actions", {}, sides(this.rows.state.side)),
      highlightBar(),
      h("div.columns", { "data-count": methods.length }, methods.map((m) => column(m, methods.filter((o) => o !== m), context))));
  }
}

/** Shows which tokens carry a score; missing where there is no model to ask. */
export function heatFor(data, record) {
  if (!data.index.live) return null;
  return {
    can: (label) => (data.index.heat_methods ?? []).includes(label),
    async show(method, passage, sought, box, onShown) {
      fill(box, h("p.quiet", {}, "Asking the model…"));
      const question = { prompt: record.inputs_plaintext, target: record.targets_plaintext, method, passage: passage.id };
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
