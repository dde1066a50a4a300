// Small helpers. Text from engines is set as text, never as markup.

export const $ = (id) => document.getElementById(id);

/** A new element: attributes, `on…` listeners, and children that are elements or text. */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export function setAttribute(element, name, value) {
  if (value === null || value === undefined) element.removeAttribute(name);
  else if (element.getAttribute(name) !== value) element.setAttribute(name, value);
}

/** A bar from 0 to 1. Its number stands beside it, so it is hidden from screen readers. */
export function bar(share, kind = "") {
  const fill = h("span", { class: `fill ${kind}` });
  fill.style.width = `${Math.max(0, Math.min(1, share)) * 100}%`;
  return h("span", { class: "bar", "aria-hidden": "true" }, fill);
}

/** A table whose rows are kept and updated by key, so that focus and scroll position survive. */
export class Table {
  /** `columns`: {key, title, hint, number, value(row), cell(row, td, before), narrow}. */
  constructor(table, columns, { caption, sort = null, onSort = null, rowHeader = 0 }) {
    this.columns = columns;
    this.rows = new Map();
    this.body = h("tbody");
    this.sort = sort;
    this.rowHeader = rowHeader;
    const heads = columns.map((column) => {
      const title = onSort ? h("button", { type: "button", title: column.hint, onclick: () => onSort(column.key) }, column.title) : column.title;
      return h("th", { scope: "col", class: classOf(column), title: onSort ? null : column.hint, "data-key": column.key }, title);
    });
    this.heads = heads;
    table.replaceChildren(h("caption", { class: "hidden" }, caption), h("thead", {}, h("tr", {}, ...heads)), this.body);
    this.showSort(sort);
  }

  showSort(sort) {
    for (const head of this.heads) {
      const direction = sort && head.dataset.key === sort.key ? (sort.down ? "descending" : "ascending") : null;
      setAttribute(head, "aria-sort", direction);
    }
  }

  /** Shows `items`, in their order; `keyOf` names the row of each, by the item and its place. */
  show(items, keyOf) {
    const kept = new Set();
    const order = [];
    for (const [at, item] of items.entries()) {
      const key = keyOf(item, at);
      kept.add(key);
      let row = this.rows.get(key);
      if (!row) {
        const cells = this.columns.map((column, at) => h(at === this.rowHeader ? "th" : "td", { class: classOf(column), scope: at === this.rowHeader ? "row" : null }));
        row = { element: h("tr", {}, ...cells), cells, item: null };
        this.rows.set(key, row);
      }
      if (row.item !== item) {
        this.columns.forEach((column, at) => column.cell(item, row.cells[at], row.element));
        row.item = item;
      }
      order.push(row.element);
    }
    for (const [key, row] of this.rows) {
      if (!kept.has(key)) {
        row.element.remove();
        this.rows.delete(key);
      }
    }
    this.#arrange(order);
  }

  #arrange(order) {
    const focused = document.activeElement;
    let moved = false;
    order.forEach((element, at) => {
      const there = this.body.children[at];
      if (there !== element) {
        this.body.insertBefore(element, there ?? null);
        moved = true;
      }
    });
    if (moved && focused && this.body.contains(focused) && document.activeElement !== focused) focused.focus({ preventScroll: true });
  }
}

const classOf = (column) => [column.number ? "number" : "", column.wide ? "wide" : "", column.class ?? ""].filter(Boolean).join(" ") || null;
