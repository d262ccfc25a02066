// What the model says after a prompt, in words: a span of whole ones is traced by a click.

import { h, percent } from "./dom.js";

/**
 * A completion as words, of which a click chooses one, and dragging or a click with Shift several.
 *
 * @param completion {text, prompt, steps, continues, ended}: the prompt's text, its tokens, what
 *     follows it, whether that begins inside of a word, and whether the model ended it.
 * @param span the span that is chosen, as `onChoose` gets it, or null.
 * @param onChoose hears of {prompt, target, tokens}: the texts before and in the span, and the ids
 *     of their tokens as they were generated.
 */
export function said(completion, span, onChoose) {
  const words = wordsOf(completion.steps);
  // The prompt's last word may go on, and the last word of all may be cut: neither is a target.
  const isPart = (i) => (i === 0 && completion.continues) || (i > 0 && i === words.length - 1 && !completion.ended && /[\p{L}\p{N}\p{M}]$/u.test(words[i].text));
  const buttons = words.map((word, i) => h("button.word", {
    type: "button", disabled: isPart(i), title: isPart(i) ? "part of a word" : percent(likelihood(completion.steps, word)),
  }, word.text.trim()));
  const box = h("p.said", { role: "group", "aria-label": "What the model says", dir: "auto" },
    h("span.quiet", {}, completion.text.trimEnd()),
    words.map(({ text }, i) => {
      const start = text.length - text.trimStart().length;
      return text.trim() ? [text.slice(0, start), buttons[i], text.slice(text.trimEnd().length)] : text;
    }));
  const mark = (first, last) => buttons.forEach((b, i) => b.setAttribute("aria-pressed", String(first <= i && i <= last)));
  const choose = (first, last) => {
    mark(first, last);
    onChoose(spanOf(completion, words[first].first, words[last].stop));
  };
  // The words that are chosen already: [first, last].
  let chosen = words.reduce(([first, last], word, i) => {
    const inside = span && word.first >= span.first && word.stop <= span.stop;
    return inside ? [Math.min(first, i), i] : [first, last];
  }, [Infinity, -1]);
  if (span) mark(...chosen);
  let from = -1, to = -1, dragged = false;
  const under = (e) => buttons.indexOf(document.elementFromPoint(e.clientX, e.clientY)?.closest(".word:enabled"));
  box.addEventListener("pointerdown", (e) => ([from, to, dragged] = [under(e), -1, false]));
  box.addEventListener("pointermove", (e) => {
    const at = from < 0 || !e.buttons ? -1 : under(e);
    if (at < 0 || (at === from && to < 0)) return;
    to = at;
    mark(Math.min(from, to), Math.max(from, to));
  });
  box.addEventListener("pointerup", () => {
    dragged = to >= 0;
    if (dragged) choose(...(chosen = [Math.min(from, to), Math.max(from, to)]));
    from = to = -1;
  });
  box.addEventListener("click", (e) => {
    const at = buttons.indexOf(e.target.closest(".word"));
    if (at < 0 || dragged) return (dragged = false);
    chosen = e.shiftKey && chosen[1] >= 0 ? [Math.min(at, chosen[0]), Math.max(at, chosen[1])] : [at, at];
    choose(...chosen);
  });
  return box;
}

/** Tokens grouped into words: [{text, first, stop}], by the numbers of their steps. */
export function wordsOf(steps) {
  const words = [];
  for (const [i, { token }] of steps.entries()) {
    const word = words.at(-1);
    // A token without text is the beginning of the next one's character.
    const next = steps.slice(i).find((s) => s.token)?.token ?? "";
    const joins = /[\p{L}\p{N}\p{M}]$/u.test(word?.text) && /^[\p{L}\p{N}\p{M}]/u.test(next);
    if (word && (joins || !word.text.trim())) Object.assign(word, { text: word.text + token, stop: i + 1 });
    else words.push({ text: token, first: i, stop: i + 1 });
  }
  return words;
}

/** A span of a completion's steps as a question. */
export function spanOf({ text, prompt, steps }, first, stop) {
  const textOf = (from, to) => steps.slice(from, to).map((s) => s.token).join("");
  const target = textOf(first, stop);
  const ids = steps.map((s) => s.id);
  return {
    first,
    stop,
    // Space before the target is shown as the prompt's; the tokens stay as they are.
    prompt: text.trimEnd() + textOf(0, first) + /^\s*/u.exec(target)[0],
    target: target.trim(),
    tokens: [[...prompt, ...ids.slice(0, first)], ids.slice(first, stop)],
  };
}

/** The probability of a word. */
const likelihood = (steps, { first, stop }) => steps.slice(first, stop).reduce((p, s) => p * s.probability, 1);
