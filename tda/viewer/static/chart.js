// Scatter plots: points with axes, their titles, and intervals.

import { fill, h } from "./dom.js";

const NS = "http://www.w3.org/2000/svg";

/** An SVG element, as `h` makes HTML ones. */
function s(name, properties, ...children) {
  const element = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(properties)) element.setAttribute(key, value);
  element.append(...children.flat(Infinity).filter(Boolean));
  return element;
}

/** Round numbers from low to high, four to nine of them, and the digits that tell them apart. */
export function ticks(low, high) {
  const power = 10 ** Math.floor(Math.log10((high - low) / 4));
  const step = [5, 2, 1].map((f) => f * power).find((x) => (high - low) / x >= 4) ?? power;
  const numbers = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) numbers.push(i * step);
  return { numbers, digits: Math.max(0, -Math.floor(Math.log10(step) + 1e-9)) };
}

/** The range of numbers with some room on both sides. */
function range(numbers) {
  const [low, high] = [Math.min(...numbers), Math.max(...numbers)];
  const room = 0.06 * (high - low || Math.abs(high) || 1);
  return [low - room, high + room];
}

const written = (x, { digits, scale = 1, unit = "" }) => `${(scale * x).toFixed(digits)}${unit}`.replace("-", "−");

// Letters of 12 pixels, about; a box is [left, top, right, bottom].
const LETTER = 6.8;
const boxOf = (text, { x, y, anchor }) => {
  const left = anchor === "end" ? x - LETTER * text.length : x;
  return [left - 2, y - 10, left + LETTER * text.length + 2, y + 3];
};
const crosses = (a, b) => a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3];

/**
 * What stands beside each point: its name, or where that would cover something, a number.
 *
 * @param points [{x, y, name}] in pixels; `lines` are the boxes of their intervals.
 * @param bounds the box that all names stand in.
 * @returns [{text, x, y, anchor}], null for a point without a name or without any room.
 */
function labelsOf(points, lines, bounds) {
  const taken = points.map(({ x, y }) => [x - 6, y - 6, x + 6, y + 6]);
  const place = (point, text, obstacles, far) => {
    const sides = point.x > (bounds[0] + bounds[2]) / 2 ? ["end", "start"] : ["start", "end"];
    const places = [-7, 16, ...far].flatMap((by) => sides.map((anchor) => ({ text, x: point.x + (anchor === "end" ? -8 : 8), y: point.y + by, anchor })));
    const free = places.find((p) => {
      const box = boxOf(text, p);
      const isInside = box[0] >= bounds[0] && box[1] >= bounds[1] && box[2] <= bounds[2] && box[3] <= bounds[3];
      return isInside && ![...taken, ...obstacles].some((o) => crosses(box, o));
    });
    if (free) taken.push(boxOf(text, free));
    return free ?? null;
  };
  const labels = points.map((p) => (p.name ? place(p, p.name, lines, []) : null));
  // Numbers are short: beside a crowd of points they find room, if need be over an interval.
  let next = 1;
  return points.map((p, i) => {
    if (labels[i] || !p.name) return labels[i];
    const label = place(p, String(next), lines, []) ?? place(p, String(next), [], [-21, 30]);
    if (label) next++;
    return label;
  });
}

/**
 * A scatter plot.
 *
 * @param points [{x, y, title, name, xs, ys}]: `name` is written beside the point; `xs` and `ys`
 *     are the ends of its intervals.
 * @param axes {x, y, description}: titles with units, and what the plot is, for who cannot see it;
 *     {percent: ["y"]} names the axes that are written in percent; {shape} is height by width.
 */
export function scatter(points, { x, y, description, percent = [], shape = 0.8 }) {
  // Letters keep their size: a narrow page gets a smaller drawing and not a shrunken one.
  const width = Math.min(520, document.documentElement.clientWidth - 40);
  const height = Math.max(260, Math.round(shape * width));
  const xRange = range(points.flatMap((p) => [p.x, ...(p.xs ?? [])]));
  const yRange = range(points.flatMap((p) => [p.y, ...(p.ys ?? [])]));
  const axis = (name, bounds) => {
    const { numbers, digits } = ticks(...bounds);
    const format = percent.includes(name) ? { digits: Math.max(0, digits - 2), scale: 100, unit: "%" } : { digits };
    const marks = numbers.map((v) => ({ v, text: written(v, format) }));
    return { marks, wide: LETTER * Math.max(...marks.map((m) => m.text.length)) };
  };
  const [xAxis, yAxis] = [axis("x", xRange), axis("y", yRange)];
  const box = { left: 14 + yAxis.wide, right: width - 12, top: 28, bottom: height - 52 };
  // Long numbers below a narrow drawing would run into each other.
  const every = Math.ceil((xAxis.marks.length * (xAxis.wide + 10)) / (box.right - box.left));
  const across = (v) => box.left + ((v - xRange[0]) / (xRange[1] - xRange[0])) * (box.right - box.left);
  const up = (v) => box.bottom - ((v - yRange[0]) / (yRange[1] - yRange[0])) * (box.bottom - box.top);
  const line = (x1, y1, x2, y2, kind) => s("line", { x1, y1, x2, y2, class: kind });
  const text = (x, y, content, anchor = "middle") => s("text", { x, y, "text-anchor": anchor }, content);
  const placed = points.map((p) => ({ x: across(p.x), y: up(p.y), name: p.name, xs: p.xs?.map(across), ys: p.ys?.map(up) }));
  const lines = placed.flatMap((p) => [
    p.xs && [p.xs[0], p.y - 1, p.xs[1], p.y + 1],
    p.ys && [p.x - 1, p.ys[1], p.x + 1, p.ys[0]],
  ].filter(Boolean));
  const labels = labelsOf(placed, lines, [box.left, 16, width, box.bottom]);
  const numbered = points.map((p, i) => [labels[i]?.text, p.name]).filter(([label, name]) => label && label !== name);
  const pointed = h("p.pointed", {}, h("span.quiet", {}, "Hover over a point or touch it to read it."));
  const tell = (e) => {
    const { left, top, width: shown } = drawing.getBoundingClientRect();
    const [x, y] = [e.clientX - left, e.clientY - top].map((d) => (d * width) / shown);
    const far = placed.map((p) => Math.hypot(p.x - x, p.y - y));
    const nearest = far.indexOf(Math.min(...far));
    // About a finger's width.
    if (far[nearest] < 24) fill(pointed, points[nearest].title);
  };
  const drawing = s("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": description },
    xAxis.marks.map(({ v, text: name }, i) => [line(across(v), box.top, across(v), box.bottom, v ? "grid" : "zero"), i % every === 0 && text(across(v), box.bottom + 18, name)]),
    yAxis.marks.map(({ v, text: name }) => [line(box.left, up(v), box.right, up(v), v ? "grid" : "zero"), text(box.left - 6, up(v) + 4, name, "end")]),
    text((box.left + box.right) / 2, height - 10, x), text(0, 12, y, "start"),
    placed.map((p, i) => [
      p.xs && line(p.xs[0], p.y, p.xs[1], p.y, "interval"),
      p.ys && line(p.x, p.ys[0], p.x, p.ys[1], "interval"),
      s("circle", { cx: p.x, cy: p.y, r: 4 }, s("title", {}, points[i].title)),
    ]),
    labels.map((l) => l && text(l.x, l.y, l.text, l.anchor)));
  for (const event of ["click", "pointermove"]) drawing.addEventListener(event, tell);
  return h("div.scatter", {}, drawing,
    numbered.length > 0 && h("p.numbered", {}, numbered.map(([label, name], i) => [i > 0 && " · ", h("b", {}, label), ` ${name}`])),
    pointed);
}
