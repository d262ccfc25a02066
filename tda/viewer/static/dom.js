// Making elements. Text is only ever set as text: nothing here parses markup.

/** An element: `h("p.quiet", {id: "x", onclick: f}, "text", child, [more])`. */
export function h(name, props, ...children) {
  const [tag, ...classes] = name.split(".");
  const element = document.createElement(tag);
  if (classes.length) element.className = classes.join(" ");
  for (const [key, value] of Object.entries(props ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key === "value" || key === "checked" || key === "selected") element[key] = value;
    else element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...present(children));
  return element;
}

function present(children) {
  const flat = children.flat(Infinity);
  return flat.filter((c) => c !== null && c !== undefined && c !== false).map((c) =>
    c instanceof Node ? c : String(c)
  );
}

/** Puts children in the place of all that an element holds. */
export function fill(element, ...children) {
  element.replaceChildren(...present(children));
  return element;
}

const CONTROLS = "a[href], button, input, select, textarea, summary";
const named = (e) => `${e.tagName} ${e.id || e.getAttribute("aria-label") || e.textContent}`;

/** As `fill`; the keyboard's focus stays on the control of the same name, if there is one. */
export function refill(element, ...children) {
  const focused = document.activeElement;
  const name = element.contains(focused) && focused !== element ? named(focused) : null;
  fill(element, ...children);
  if (name === null) return element;
  [...element.querySelectorAll(CONTROLS)].find((e) => named(e) === name)?.focus({ preventScroll: true });
  return element;
}

/** A number for people: 0.174, 1,601, −0.02. */
export function number(x, digits = 3) {
  if (x === null || x === undefined || Number.isNaN(x)) return "–";
  const large = Math.abs(x) >= 100;
  const text = x.toLocaleString("en-US", {
    minimumFractionDigits: large ? 0 : digits,
    maximumFractionDigits: large ? 1 : digits,
  });
  return text.replace("-", "−");
}

/** A count for people: 5,415. */
export const count = (n) => n.toLocaleString("en-US");

/** A share for people: 34.5%. */
export const percent = (x) => (x === null || x === undefined ? "–" : `${number(100 * x, 1)}%`);

/** Runs `work` once calls have stopped for some milliseconds. */
export function calm(work, milliseconds) {
  let waiting = 0;
  return (...values) => {
    clearTimeout(waiting);
    waiting = setTimeout(() => work(...values), milliseconds);
  };
}

/** Tells something in the corner for some seconds; read out by screen readers. */
export function tell(text, kind = "") {
  const box = document.getElementById("status");
  fill(box, h("p", { class: kind }, text));
  clearTimeout(tell.waiting);
  tell.waiting = setTimeout(() => fill(box), kind === "wrong" ? 12000 : 4000);
}
