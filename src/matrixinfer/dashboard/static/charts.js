// Line charts over the last hour, as plain SVG.

import { h, setAttribute, setText } from "./dom.js";

const NS = "http://www.w3.org/2000/svg";
const HEIGHT = 150;
const RIGHT = 8;
const TOP = 8;
const BOTTOM = 20;

const svg = (tag, attributes) => {
  const element = document.createElementNS(NS, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
};

/** The next of 1, 2, 5, 10, … that is at least `value`. */
const ceiling = (value) => {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= value * 0.999);
};

export class Chart {
  /** `series`: {name, kind, hint}; `format` shows a value, `axis` one on the axis; `top` is the axis' fixed end, if any. */
  constructor(title, series, { format, axis = format, top = null }) {
    this.title = title;
    this.series = series;
    this.format = format;
    this.axis = axis;
    this.top = top;
    this.values = series.map((each) => h("b", {}, "–"));
    this.when = h("span", { class: "muted when" }, "now");
    this.picture = svg("svg", { role: "img", height: HEIGHT, width: "100%" });
    const legend = series.map((each, at) => h("li", { class: each.kind, title: each.hint }, h("i", { "aria-hidden": "true" }), `${each.name} `, this.values[at]));
    this.element = h("figure", { class: "panel chart" }, h("figcaption", {}, h("h3", {}, title), this.when), h("ul", { class: "legend" }, ...legend), this.picture);
    this.lines = [];
    this.range = [0, 1];
    this.picture.addEventListener("pointermove", (event) => this.#point(event));
    this.picture.addEventListener("pointerleave", () => {
      this.pointed = null;
      this.#draw();
    });
    new ResizeObserver(() => this.#draw()).observe(this.picture);
  }

  /** `lines`: for each series [{t, y}], y null where nothing is known. `range`: [from, to] in Unix seconds. */
  show(lines, range, summary) {
    this.lines = lines;
    this.range = range;
    setAttribute(this.picture, "aria-label", `${this.title}: ${summary}`);
    this.#draw();
  }

  #point(event) {
    const box = this.picture.getBoundingClientRect();
    const [from, to] = this.range;
    const inner = Math.max(1, box.width - this.#left() - RIGHT);
    const share = (event.clientX - box.left - this.#left()) / inner;
    this.pointed = from + Math.max(0, Math.min(1, share)) * (to - from);
    this.#draw();
  }

  #draw() {
    const width = this.picture.clientWidth;
    if (!width) return;
    const [from, to] = this.range;
    const top = this.#top();
    const left = this.#left();
    const x = (t) => left + ((t - from) / (to - from)) * (width - left - RIGHT);
    const y = (value) => TOP + (1 - value / top) * (HEIGHT - TOP - BOTTOM);
    const parts = [];
    for (const value of [0, top / 2, top]) {
      parts.push(svg("line", { class: "grid", x1: left, x2: width - RIGHT, y1: y(value), y2: y(value) }));
      parts.push(label(left - 6, y(value) + 4, this.axis(value), "end"));
    }
    parts.push(label(left, HEIGHT - 4, ago(to - from), "start"), label(width - RIGHT, HEIGHT - 4, "now", "end"));
    this.lines.forEach((points, at) => {
      const path = trace(points, x, y);
      if (path) parts.push(svg("path", { class: `line ${this.series[at].kind}`, d: path }));
    });
    if (this.pointed !== null && this.pointed !== undefined) parts.push(svg("line", { class: "pointer", x1: x(this.pointed), x2: x(this.pointed), y1: TOP, y2: HEIGHT - BOTTOM }));
    this.picture.replaceChildren(...parts);
    this.#legend();
  }

  #top() {
    const highest = Math.max(0, ...this.lines.flat().map((each) => each.y ?? 0));
    return this.top ?? (highest > 0 ? ceiling(highest) : 1);
  }

  /** Where the plot begins, so that the labels of the axis fit. */
  #left() {
    return 14 + 6 * Math.max(4, this.axis(this.#top()).length, this.axis(this.#top() / 2).length);
  }

  #legend() {
    const pointed = this.pointed ?? null;
    this.lines.forEach((points, at) => {
      const found = pointed === null ? points.findLast((each) => each.y !== null) : nearest(points, pointed);
      setText(this.values[at], found && found.y !== null ? this.format(found.y) : "–");
    });
    setText(this.when, pointed === null ? "latest" : `${ago(this.range[1] - pointed)} ago`);
  }
}

const label = (x, y, text, anchor) => {
  const element = svg("text", { x, y, "text-anchor": anchor });
  element.textContent = text;
  return element;
};

const ago = (seconds) => (seconds < 90 ? `${Math.max(0, Math.round(seconds))} s` : `${Math.round(seconds / 60)} min`);

const nearest = (points, t) => points.reduce((best, each) => (best && Math.abs(best.t - t) <= Math.abs(each.t - t) ? best : each), null);

/** A path; a point without neighbours becomes a dot. */
function trace(points, x, y) {
  let path = "";
  let open = false;
  points.forEach((point, at) => {
    if (point.y === null) {
      open = false;
      return;
    }
    const place = `${x(point.t).toFixed(1)} ${y(point.y).toFixed(1)}`;
    path += open ? `L${place}` : `M${place}`;
    if (!open && (points[at + 1]?.y ?? null) === null) path += "h0.01";
    open = true;
  });
  return path;
}
