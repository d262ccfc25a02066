// Scatter plots: points with axes, their titles, and intervals.

import { h } from "./dom.js";

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

/** Where names stand beside their points, [{x, y, anchor}], so that none covers another. */
function placesOfNames(points, width) {
  const taken = [];
  return points.map(({ x, y, name }) => {
    if (!name) return null;
    // About the width of letters of 12 pixels. Names on the right half stand left of their points.
    const [wide, isLeft] = [6.8 * name.length, x > width / 2];
    const places = [-7, 16, -21, 30].map((by) => ({ x: x + (isLeft ? -8 : 8), y: y + by, anchor: isLeft ? "end" : "start" }));
    const left = (p) => (isLeft ? p.x - wide : p.x);
    const isFree = (p) => !taken.some((t) => Math.abs(t.y - p.y) < 13 && t.left < left(p) + wide && left(p) < t.left + t.wide);
    const place = places.find(isFree) ?? places[0];
    taken.push({ y: place.y, left: left(place), wide });
    return place;
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
  const height = Math.round(shape * width);
  const box = { left: 64, right: width - 12, top: 12, bottom: height - 52 };
  const xRange = range(points.flatMap((p) => [p.x, ...(p.xs ?? [])]));
  const yRange = range(points.flatMap((p) => [p.y, ...(p.ys ?? [])]));
  const across = (v) => box.left + ((v - xRange[0]) / (xRange[1] - xRange[0])) * (box.right - box.left);
  const up = (v) => box.bottom - ((v - yRange[0]) / (yRange[1] - yRange[0])) * (box.bottom - box.top);
  const axis = (name, bounds, draw) => {
    const { numbers, digits } = ticks(...bounds);
    const format = percent.includes(name) ? { digits: Math.max(0, digits - 2), scale: 100, unit: "%" } : { digits };
    return numbers.map((v) => draw(v, written(v, format)));
  };
  const line = (x1, y1, x2, y2, kind) => s("line", { x1, y1, x2, y2, class: kind });
  const text = (x, y, content, anchor = "middle") => s("text", { x, y, "text-anchor": anchor }, content);
  const middle = (box.top + box.bottom) / 2;
  const title = text(0, 0, y);
  title.setAttribute("transform", `translate(14 ${middle}) rotate(-90)`);
  const names = placesOfNames(points.map((p) => ({ x: across(p.x), y: up(p.y), name: p.name })), width);
  return h("div.scatter", {}, s("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": description },
    axis("x", xRange, (v, name) => [line(across(v), box.top, across(v), box.bottom, v ? "grid" : "zero"), text(across(v), box.bottom + 18, name)]),
    axis("y", yRange, (v, name) => [line(box.left, up(v), box.right, up(v), v ? "grid" : "zero"), text(box.left - 6, up(v) + 4, name, "end")]),
    text((box.left + box.right) / 2, height - 10, x), title,
    points.map((p, i) => [
      p.xs && line(across(p.xs[0]), up(p.y), across(p.xs[1]), up(p.y), "interval"),
      p.ys && line(across(p.x), up(p.ys[0]), across(p.x), up(p.ys[1]), "interval"),
      s("circle", { cx: across(p.x), cy: up(p.y), r: 4 }, s("title", {}, p.title)),
      names[i] && text(names[i].x, names[i].y, p.name, names[i].anchor),
    ])));
}
