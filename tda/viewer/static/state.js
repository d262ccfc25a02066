// What is shown, kept in the address: a link restores it, and so do back and forward.

const DEFAULTS = {
  view: "", // the home view
  q: "",
  files: "",
  filter: "",
  sort: "",
  page: "",
  side: "proponents",
  judge: "",
  threshold: "0.5",
  hl: "",
  prompt: "",
  target: "",
  rather: "", // another target, which the question subtracts
  tokens: "", // ids of prompt and target, where the model itself said the target
  methods: "",
  share: "",
  order: "",
  method: "",
  by: "lds",
  key: "",
};

let home = "query";
let current = read();
const listeners = [];

function read() {
  const parameters = new URLSearchParams(location.hash.slice(1));
  const state = Object.fromEntries(
    Object.entries(DEFAULTS).map(([key, value]) => [key, parameters.get(key) ?? value]),
  );
  state.view ||= state.q || state.filter ? "query" : home;
  return state;
}

/** The address's fragment of a state: `#view=…`, what is as always left out. */
export function link(patch) {
  const state = { ...current, ...patch };
  const out = new URLSearchParams();
  for (const [key, value] of Object.entries(state)) {
    if (String(value) !== DEFAULTS[key]) out.set(key, value);
  }
  return `#${out}`;
}

/** The state: an object of strings. */
export const get = () => current;

/** Changes the state; with `replace`, without a step that "back" goes over. */
export function set(patch, { replace = false } = {}) {
  const address = link(patch);
  if (address === link({})) return;
  history[replace ? "replaceState" : "pushState"](null, "", address);
  moved();
}

/** Calls `listener(state, before)` whenever the state has changed. */
export const onChange = (listener) => listeners.push(listener);

function moved() {
  const before = current;
  current = read();
  for (const listener of listeners) listener(current, before);
}

/** Begins to follow the address: links and the browser's buttons; `view` is shown where it names none. */
export function follow(view) {
  home = view;
  current = read();
  addEventListener("popstate", moved);
}

/** Texts that are highlighted beside the query's own. */
export function highlights() {
  try {
    const texts = JSON.parse(current.hl || "[]");
    return Array.isArray(texts) ? texts.filter((x) => typeof x === "string" && x.trim()) : [];
  } catch {
    return [];
  }
}
