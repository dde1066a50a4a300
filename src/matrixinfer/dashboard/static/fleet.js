// The fleet: a map of many endpoints at a glance, and a table to filter and sort.

import { $, bar, h, setAttribute, setText, Table } from "./dom.js";
import { compact, count, milliseconds, plural, quotient, roundShare, share, UNKNOWN } from "./format.js";
import { details, open } from "./dialog.js";

const WORST = { down: 0, ejected: 1, probing: 2, busy: 3, draining: 4, asleep: 5, slow_start: 6, up: 7 };
const TRUST = { none: 0, stale: 1, partial: 2, exact: 3 };
const WORDS = { up: "up", slow_start: "slow start", busy: "busy", probing: "probing", asleep: "asleep", draining: "draining", ejected: "ejected", down: "down" };
const MAP_FROM = 12;
/** Endpoints from which on the map is shown. */

const SHORT = { slow_start: "slow", draining: "drains" };
/** What narrow screens show instead. */

/** The state in a few words: with the share that it gets, or the seconds that are left to it. */
const stateWords = (row) => {
  if (row.share !== null) return `slow start ${roundShare(row.share)}`;
  return row.leaves_in_s !== null ? `draining ${count(row.leaves_in_s)} s` : WORDS[row.state];
};

const badge = (td, kind, text, title) => {
  let element = td.firstElementChild;
  if (!element) td.append((element = h("span")));
  setAttribute(element, "class", `badge ${kind}`);
  setAttribute(element, "title", title);
  setText(element, text);
};

const numberCell = (value) => (row, td) => setText(td, value(row));

const withBar = (part, text) => (row, td) => {
  const value = part(row);
  td.replaceChildren(...(value === null ? [UNKNOWN] : [h("span", {}, text(row)), bar(value)]));
};

const held = (row) => (row.held_tokens !== null && row.cache_tokens ? row.held_tokens / row.cache_tokens : row.cache_usage);
const heldHint = (row) => (row.held_tokens !== null ? `${count(row.held_tokens)} of ${count(row.cache_tokens)} tokens held` : null);

const COLUMNS = [
  { key: "name", title: "endpoint", value: (row) => row.name, cell: nameCell },
  { key: "state", title: "state", value: (row) => WORST[row.state], cell: stateCell },
  { key: "trust", title: "trust", hint: "How far its events are believed", value: (row) => TRUST[row.trust], cell: (row, td) => badge(td, `trust-${row.trust}`, row.trust, row.limits.join("; ") || null) },
  { key: "in_flight", title: "in flight", hint: "Requests that the gateways have there", number: true, value: (row) => row.in_flight, cell: numberCell((row) => count(row.in_flight)) },
  { key: "waiting", title: "waiting", hint: "Requests in the engine's queue", number: true, wide: true, value: (row) => row.waiting ?? -1, cell: numberCell((row) => count(row.waiting)) },
  { key: "queue_ms", title: "queue", hint: "Time until the prompts that wait there are computed, estimated", number: true, wide: true, value: (row) => row.queue_ms, cell: numberCell((row) => (row.queue_ms ? milliseconds(row.queue_ms) : "0")) },
  { key: "cache", title: "cache", hint: "Share of the cache that holds blocks, in use or not; where events do not say it, the share in use", number: true, wide: true, value: (row) => held(row) ?? -1, cell: (row, td) => { withBar(held, (each) => roundShare(held(each)))(row, td); setAttribute(td, "title", heldHint(row)); } },
  { key: "hit_rate", title: "hit rate", hint: "Of the prompt tokens in the last hour, as the engine reports", number: true, value: (row) => row.hit_rate ?? -1, cell: withBar((row) => row.hit_rate, (row) => roundShare(row.hit_rate)) },
  { key: "requests", title: "requests", hint: "In the last hour", number: true, wide: true, value: (row) => row.requests, cell: numberCell((row) => count(row.requests)) },
  { key: "model", title: "model", wide: true, class: "long", value: (row) => row.model ?? "", cell: (row, td) => { setText(td, row.model ?? UNKNOWN); setAttribute(td, "title", row.model); } },
  { key: "engine_block", title: "block", hint: "Tokens per block of the engine's cache", number: true, wide: true, value: (row) => row.engine_block ?? -1, cell: numberCell((row) => count(row.engine_block)) },
  { key: "engine", title: "engine", wide: true, value: (row) => `${row.engine ?? ""} ${row.version ?? ""}`, cell: (row, td) => setText(td, engine(row)) },
];

const engine = (row) => [row.engine, row.version].filter(Boolean).join(" ") || UNKNOWN;

function stateCell(row, td) {
  let element = td.firstElementChild;
  if (!element) td.append((element = h("span", {}, h("span"), h("span", { class: "narrow" }))));
  const [words, short] = element.children;
  setAttribute(element, "class", `badge state-${row.state}`);
  setAttribute(element, "title", row.state_reason);
  setAttribute(words, "class", SHORT[row.state] ? "wide" : null);
  setText(words, stateWords(row));
  setText(short, SHORT[row.state] ?? "");
}

function nameCell(row, td) {
  let button = td.firstElementChild;
  if (!button) td.append((button = h("button", { type: "button", class: "link-button", onclick: () => openEndpoint(button.row) })));
  button.row = row;
  setAttribute(button, "title", row.name);
  setText(button, row.name);
}

export const isTroubled = (row) => row.state !== "up" || row.trust !== "exact";

export class Fleet {
  constructor() {
    this.sort = { key: "name", down: false };
    this.table = new Table($("endpoints"), COLUMNS, { caption: "Endpoints: one row per cache that can be chosen", sort: this.sort, onSort: (key) => this.#sortBy(key) });
    this.squares = new Map();
    $("fleet-filter").addEventListener("input", () => this.#table());
    $("fleet-problems").addEventListener("change", () => this.#table());
  }

  show(state) {
    this.rows = state.names.map((name) => state.rows.get(name)).filter(Boolean);
    const none = !this.rows.length;
    $("no-pods").hidden = !none;
    $("fleet-scroll").hidden = none;
    $("fleet-tools").hidden = none;
    if (none) setText($("no-pods"), "There are no pods now. Name your engines under pods in the configuration, or start the gateway with --worker-urls. A pod that was drained comes back when its drain is deleted.");
    $("fleet-scroll").style.minHeight = `min(472px, ${(this.rows.length + 1) * 34 + 2}px)`; // also while few match
    this.#alert();
    this.#map();
    this.#table();
  }

  #counts() {
    const pods = new Set(this.rows.map((row) => row.pod)).size;
    const parts = [plural(pods, "pod")];
    if (this.rows.length > pods) parts.push(plural(this.rows.length, "endpoint"));
    for (const kind of Object.keys(WORST)) {
      const number = this.rows.filter((row) => row.state === kind).length;
      if (number) parts.push(`${count(number)} ${WORDS[kind]}`);
    }
    return parts.join(" · ");
  }

  #alert() {
    const out = this.rows.filter((row) => row.state === "down" || row.state === "ejected");
    $("alert").hidden = !out.length;
    const names = out.slice(0, 3).map((row) => `${row.name} is ${WORDS[row.state]}`);
    setText($("alert"), names.join(", ") + (out.length > 3 ? `, and ${count(out.length - 3)} more` : ""));
  }

  #map() {
    const map = $("map");
    map.hidden = this.rows.length < MAP_FROM;
    $("map-key").hidden = map.hidden;
    if (map.hidden) return;
    const names = new Set(this.rows.map((row) => row.name));
    for (const [name, square] of this.squares) {
      if (!names.has(name)) {
        square.remove();
        this.squares.delete(name);
      }
    }
    for (const row of this.rows) {
      let square = this.squares.get(row.name);
      if (!square) {
        square = h("button", { type: "button", tabindex: "-1", onclick: () => openEndpoint(square.row) });
        this.squares.set(row.name, square);
        map.append(square);
      }
      square.row = row;
      const load = row.in_flight + (row.waiting ?? 0);
      setAttribute(square, "class", row.state === "up" ? `square trust-${row.trust}` : `square state-${row.state}`);
      setAttribute(square, "title", `${row.name}: ${WORDS[row.state]}, trust ${row.trust}, ${count(row.in_flight)} in flight`);
      setAttribute(square, "aria-label", `${row.name}: ${WORDS[row.state]}, trust ${row.trust}`);
      square.style.setProperty("--load", String(Math.min(1, load / 16)));
    }
  }

  #table() {
    const wanted = $("fleet-filter").value.trim().toLowerCase().split(/\s+/).filter(Boolean);
    const only = $("fleet-problems").checked;
    const text = (row) => [row.name, row.model, engine(row), WORDS[row.state], row.trust, row.url].join(" ").toLowerCase();
    const found = this.rows.filter((row) => (!only || isTroubled(row)) && wanted.every((word) => text(row).includes(word)));
    const { value } = COLUMNS.find((column) => column.key === this.sort.key);
    const sign = this.sort.down ? -1 : 1;
    const collator = Fleet.collator;
    found.sort((a, b) => {
      const [one, other] = [value(a), value(b)];
      const by = typeof one === "string" ? collator.compare(one, other) : one - other;
      return by * sign || collator.compare(a.name, b.name);
    });
    this.table.show(found, (row) => row.name);
    const nothing = this.rows.length && !found.length;
    setText($("fleet-counts"), nothing ? `none of ${plural(this.rows.length, "endpoint")} matches` : this.rows.length ? this.#counts() : "");
  }

  #sortBy(key) {
    const column = COLUMNS.find((each) => each.key === key);
    this.sort = { key, down: this.sort.key === key ? !this.sort.down : Boolean(column.number) };
    this.table.showSort(this.sort);
    this.#table();
  }

  static collator = new Intl.Collator("en", { numeric: true });
}

function openEndpoint(row) {
  const held = row.held_tokens === null ? UNKNOWN : `${compact(row.held_tokens)} of ${compact(row.cache_tokens)} tokens`;
  open(row.name, [
    details([
      ["state", WORDS[row.state] + (row.state_reason ? `: ${row.state_reason}` : "")],
      ["trust", row.trust],
      ...row.limits.map((words) => ["", words]),
      ["events", row.feed ?? "not followed"],
      ["URL", row.url],
      ["model", row.model ?? UNKNOWN],
      ["engine", engine(row)],
      ["block size", row.engine_block === null ? UNKNOWN : plural(row.engine_block, "token")],
      ["restarts seen", count(row.restarts)],
      ["load", `${count(row.in_flight)} in flight; the engine says ${count(row.running)} running, ${count(row.waiting)} waiting`],
      ["queue", `${compact(row.queued_tokens)} tokens, ${milliseconds(row.queue_ms)}`],
      ["cache holds", held],
      ["cache in use", share(row.cache_usage)],
      ["hit rate", `${share(row.hit_rate)}: ${compact(row.cached_tokens)} of ${compact(row.prompt_tokens)} prompt tokens in the last hour`],
      ["reuse", `${share(row.reuse)} of what was predicted`],
      ["requests", `${count(row.requests)} in the last hour`],
    ]),
  ]);
}
