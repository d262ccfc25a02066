// The filter's language: a small parser that makes a test of a row. Nothing is evaluated as code.
//
//   filter  = all ("or" all)*            all = one (["and"] one)*
//   one     = "not" one | "(" filter ")" | field [op value] | text
//   op      = "=" "!=" "<" "<=" ">" ">=" "~" (contains) "!~"
//   field   = a column, or LABEL.column of another results file; text = a word or "quoted words"

const LONGEST = 2000;
const DEEPEST = 50;
const TOKEN = /\s*(?:(!=|<=|>=|!~|[=<>~()])|"((?:[^"\\]|\\.)*)"|([^\s=<>~()!"]+|!))/uy;

/** What is wrong with a filter, and where. */
export class FilterError extends Error {
  constructor(message, at) {
    super(message);
    this.at = at;
  }
}

function tokens(text) {
  if (text.length > LONGEST) throw new FilterError(`longer than ${LONGEST} characters`, LONGEST);
  const out = [];
  TOKEN.lastIndex = 0;
  while (text.slice(TOKEN.lastIndex).trim()) {
    const at = TOKEN.lastIndex;
    const match = TOKEN.exec(text);
    if (!match) throw new FilterError("a quotation mark is not closed", at);
    const [, sign, quoted, word] = match;
    if (sign) out.push({ sign, at });
    else if (quoted !== undefined) out.push({ text: quoted.replace(/\\(.)/gsu, "$1"), at });
    else out.push({ word, text: word, at });
  }
  return out;
}

/**
 * Parses a filter.
 *
 * @param text the expression; an empty one lets all through.
 * @param knows (field) → whether there is such a field, such as "rank" or "bm25.rank".
 * @returns {test, fields}: `test(get)` tells of a row whose fields `get(name)` gives.
 * @throws FilterError
 */
export function parse(text, knows) {
  const list = tokens(text);
  const fields = new Set();
  let next = 0;

  const peek = () => list[next];
  const isWord = (word) => peek()?.word?.toLowerCase() === word;
  const end = () => new FilterError("it is incomplete", text.length);

  function any(depth) {
    if (depth > DEEPEST) throw new FilterError("too deeply nested", peek()?.at ?? 0);
    const parts = [all(depth)];
    while (isWord("or")) {
      next++;
      parts.push(all(depth));
    }
    return parts.length === 1 ? parts[0] : (get) => parts.some((part) => part(get));
  }

  function all(depth) {
    const parts = [one(depth)];
    while (peek() && peek().sign !== ")" && !isWord("or")) {
      if (isWord("and")) next++;
      parts.push(one(depth));
    }
    return parts.length === 1 ? parts[0] : (get) => parts.every((part) => part(get));
  }

  function one(depth) {
    const token = peek();
    if (!token) throw end();
    if (isWord("not")) {
      if (depth > DEEPEST) throw new FilterError("too deeply nested", token.at);
      next++;
      const inner = one(depth + 1);
      return (get) => !inner(get);
    }
    next++;
    if (token.sign === "(") {
      const inner = any(depth + 1);
      if (peek()?.sign !== ")") throw peek() ? unexpected(peek()) : end();
      next++;
      return inner;
    }
    if (token.sign || isReserved(token)) throw unexpected(token);
    const operator = peek()?.sign;
    const compares = operator && operator !== "(" && operator !== ")";
    if (compares) {
      if (token.word === undefined || !knows(token.word)) {
        throw new FilterError(`there is no field "${token.text}"`, token.at);
      }
      next++;
      fields.add(token.word);
      return comparison(token.word, operator, value());
    }
    if (token.word !== undefined && knows(token.word)) {
      fields.add(token.word);
      return (get) => Boolean(get(token.word));
    }
    const folded = fold(token.text);
    return (get) => ["prompt", "target", "id"].some((f) => fold(get(f)).includes(folded));
  }

  function value() {
    const token = peek();
    if (!token) throw end();
    if (token.sign) throw unexpected(token);
    next++;
    return token;
  }

  if (!list.length) return { test: () => true, fields };
  const test = any(0);
  if (peek()) throw unexpected(peek());
  return { test, fields };
}

const isReserved = (token) => ["and", "or"].includes(token.word?.toLowerCase());
const unexpected = (token) => new FilterError(`"${token.sign ?? token.text}" is not expected`, token.at);

/** A text without case, in one Unicode form. */
export const fold = (x) => (x === null || x === undefined ? "" : String(x).normalize("NFKC").toLowerCase());

/** A comparison; a row that lacks the field passes none but != and !~. */
function comparison(field, operator, { word, text }) {
  const folded = fold(text);
  if (operator === "~") return (get) => fold(get(field)).includes(folded);
  if (operator === "!~") return (get) => !fold(get(field)).includes(folded);
  const asNumber = word === undefined ? NaN : quantity(word);
  const same = (x) => {
    if (typeof x === "number" && !Number.isNaN(asNumber)) return x === asNumber;
    if (typeof x === "boolean") return String(x) === folded || (folded === "yes" && x) || (folded === "no" && !x);
    return x !== null && x !== undefined && fold(x) === folded;
  };
  if (operator === "=") return (get) => same(get(field));
  if (operator === "!=") return (get) => !same(get(field));
  const compare = { "<": (o) => o < 0, "<=": (o) => o <= 0, ">": (o) => o > 0, ">=": (o) => o >= 0 }[operator];
  return (get) => {
    const x = get(field);
    if (x === null || x === undefined) return false;
    if (typeof x === "number" && !Number.isNaN(asNumber)) return compare(x - asNumber);
    if (typeof x === "number") return false;
    return compare(fold(x).localeCompare(folded));
  };
}

/** The number that a word writes, such as -0.5, 1e3, 20%, 1_000; NaN where it is none. */
function quantity(word) {
  const match = /^([+-]?(?:\d[\d_]*\.?\d*|\.\d+)(?:e[+-]?\d+)?)(%?)$/iu.exec(word);
  if (!match) return NaN;
  return Number(match[1].replaceAll("_", "")) / (match[2] ? 100 : 1);
}

/** A text as a filter writes it: quoted. */
export const quote = (text) => `"${String(text).replace(/["\\]/gu, "\\$&")}"`;
