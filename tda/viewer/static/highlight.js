// Marking words in a text: what to mark, and where it stands.

import { h } from "./dom.js";

// Words that begin with a capital for another reason than being a name.
const COMMON = new Set(
  ("the a an in on at of for to from by with who what where when which is was are were he she it " +
    "they this that these those his her its their there and or but as how why").split(" "),
);
const MOST = 40;

/** The names in a prompt: runs of words with capitals, joined by "of", "de" and the like. */
export function entities(prompt) {
  const name = /[\p{Lu}\p{N}][\p{L}\p{N}\p{M}'’.-]*(?:\s+(?:(?:of|the|de|la|le|du|von|van|der|and|&)\s+){0,2}[\p{Lu}\p{N}][\p{L}\p{N}\p{M}'’.-]*)*/gu;
  const out = [];
  for (const [run] of prompt.slice(0, 2000).matchAll(name)) {
    let words = run.replace(/[.'’-]+$/u, "").split(/\s+/u);
    while (words.length && COMMON.has(words[0].toLowerCase())) words = words.slice(1);
    const text = words.join(" ");
    if (text.length > 1) out.push(text);
  }
  return [...new Set(out)];
}

/**
 * What to mark for a record: [{text, kind}], kinds "target", "prompt", "own".
 *
 * @param chosen texts that the reader chose.
 */
export function terms(record, chosen) {
  const strings = (x) => (Array.isArray(x) ? x : [x]).filter((s) => typeof s === "string" && s.trim());
  const out = [];
  const add = (texts, kind) => texts.forEach((text) => out.push({ text: text.trim(), kind }));
  add(chosen, "own");
  add(strings(record.targets_plaintext), "target");
  add(strings(record.groundtruth), "target");
  add(strings(record.entity1_alias), "target");
  add(strings(record.entity0), "prompt");
  add(strings(record.entity0_alias), "prompt");
  add(entities(record.inputs_plaintext ?? ""), "prompt");
  return out.filter((t) => t.text.length < 300).slice(0, MOST);
}

/**
 * Where terms stand in a text, without overlaps: [{start, end, kind}], rising.
 *
 * Case does not matter; a term stands for itself only where no letter or digit touches it.
 */
export function find(text, list) {
  const longest = [...list].sort((a, b) =>
    (b.kind === "own") - (a.kind === "own") || b.text.length - a.text.length
  );
  const spans = [];
  for (const { text: term, kind } of longest) {
    const literal = term.replace(/[\\^$.*+?()[\]{}|/]/gu, "\\$&").replace(/\s+/gu, "\\s+");
    const before = /^[\p{L}\p{N}]/u.test(term) && kind !== "own" ? "(?<![\\p{L}\\p{N}])" : "";
    const after = /[\p{L}\p{N}]$/u.test(term) && kind !== "own" ? "(?![\\p{L}\\p{N}])" : "";
    for (const match of text.matchAll(new RegExp(before + literal + after, "giu"))) {
      const [start, end] = [match.index, match.index + match[0].length];
      if (end > start && !spans.some((t) => start < t.end && t.start < end)) spans.push({ start, end, kind });
    }
  }
  return spans.sort((a, b) => a.start - b.start);
}

/** A text's nodes, with its terms in <mark>. */
export function marked(text, list) {
  const out = [];
  let at = 0;
  for (const { start, end, kind } of find(text, list)) {
    if (start > at) out.push(text.slice(at, start));
    out.push(h(`mark.${kind}`, {}, text.slice(start, end)));
    at = end;
  }
  out.push(text.slice(at));
  return out;
}
