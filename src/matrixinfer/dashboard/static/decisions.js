// Live decisions; a click opens one: the table of `matrixinfer explain`, drawn.

import { $, bar, h, setAttribute, setText, Table } from "./dom.js";
import { details, open } from "./dialog.js";
import { count, milliseconds, plural, time, UNKNOWN } from "./format.js";

const COLUMNS = [
  { key: "id", title: "request", cell: idCell },
  { key: "pod", title: "pod", class: "long", cell: (row, td) => { setText(td, row.pod); setAttribute(td, "title", row.pod); } },
  { key: "reason", title: "reason", wide: true, class: "reason", cell: reasonCell },
  { key: "tokens", title: "tokens", number: true, cell: (row, td) => setText(td, count(row.tokens)) },
  { key: "predicted_hit_tokens", title: "predicted", hint: "Predicted hit, in tokens", number: true, wide: true, cell: (row, td) => setText(td, count(row.predicted_hit_tokens)) },
  { key: "cached_tokens", title: "reported", hint: "Hit that the engine reported, in tokens", number: true, cell: (row, td) => setText(td, count(row.cached_tokens)) },
  { key: "ttft_ms", title: "first token", number: true, wide: true, cell: (row, td) => setText(td, milliseconds(row.ttft_ms)) },
  { key: "status", title: "status", number: true, cell: statusCell },
];

function idCell(row, td) {
  let button = td.firstElementChild;
  if (!button) td.append((button = h("button", { type: "button", class: "link-button", onclick: () => find(button.row.id, button.row.at) }, h("span"), h("small"))));
  button.row = row;
  setText(button.firstElementChild, time(row.at));
  setText(button.lastElementChild, row.id);
  setAttribute(button, "title", row.id);
}

function reasonCell(row, td) {
  setText(td, row.reason + (row.degraded ? " (degraded)" : ""));
  setAttribute(td, "title", `${row.model}: ${row.reason}`);
}

function statusCell(row, td) {
  const failed = row.is_over && (row.status === null || row.status >= 500);
  setText(td, row.status === null ? (row.is_over ? "none" : "…") : String(row.status) + (row.is_over ? "" : " …"));
  td.classList.toggle("bad", failed);
}

export class Decisions {
  constructor() {
    this.table = new Table($("decision-list"), COLUMNS, { caption: "The last decisions, newest first" });
    this.paused = false;
    this.held = false;
    const scroll = $("decision-scroll");
    for (const kind of ["pointerenter", "focusin"]) scroll.addEventListener(kind, () => this.#hold(true));
    for (const kind of ["pointerleave", "focusout"]) scroll.addEventListener(kind, () => this.#hold(scroll.matches(":hover") || scroll.contains(document.activeElement)));
    $("pause").addEventListener("click", () => {
      this.paused = !this.paused;
      setAttribute($("pause"), "aria-pressed", String(this.paused));
      setText($("pause"), this.paused ? "Resume" : "Pause");
      if (!this.paused) this.show(this.state);
    });
    $("search").addEventListener("submit", (event) => {
      event.preventDefault();
      find($("request-id").value.trim());
    });
  }

  show(state) {
    this.state = state;
    const none = !state.decisions.length;
    $("no-decisions").hidden = !none;
    $("decision-scroll").hidden = none;
    if (!this.paused && !this.held) this.table.show(state.decisions, (_, at) => at); // rows stay, their texts change
  }

  /** While someone points at the list, or is in it by keyboard, it stands still: else a click could hit another row. */
  #hold(held) {
    this.held = held;
    setText($("decisions-note"), held ? "held while you are here" : "the last ones, newest first");
    if (!held && this.state) this.show(this.state);
  }

  set kept(number) {
    find.kept = number;
  }
}

/** Opens the decision on a request: the one at `at`, else the last one. */
async function find(id, at = null) {
  const nothing = (text) => open("No such decision", [h("p", {}, text)]);
  let answer;
  try {
    const response = await fetch(`debug/decisions?limit=20&id=${encodeURIComponent(id)}`);
    answer = await response.json();
    if (!response.ok) throw new Error(answer.error?.message ?? `HTTP ${response.status}`);
  } catch (error) {
    nothing(`The gateway did not answer: ${error.message}`);
    return;
  }
  const found = answer.decisions;
  const decision = found.find((each) => at !== null && Math.abs(each.at - at) < 0.01) ?? found[0];
  if (!decision) nothing(`The gateway keeps the last ${count(find.kept)} decisions (scheduler.decisionsKept), and none of them is on the request ${id}.`);
  else explain(decision);
}

function explain(decision) {
  const reported = decision.reported;
  const sent = `sent to ${reported.attempts.join(", then ")}; ${reported.status === null ? (decision.is_over ? "no answer" : "no answer yet") : `answered ${reported.status}`}`;
  const cached = reported.cached_tokens === null ? "not reported" : `${count(reported.cached_tokens)} of ${count(reported.prompt_tokens)} tokens`;
  const guessed = decision.guessed_hit_tokens ? `, and about ${count(decision.guessed_hit_tokens)} more by the bytes sent there lately` : "";
  const chosen = decision.pods[decision.chosen];
  open(`Why ${decision.chosen}?`, [
    h("p", { class: "lead" }, `${decision.reason}.`),
    details([
      ["request id", decision.id],
      ["request", `${time(decision.at)}, ${decision.path}, ${decision.model}`],
      ["prompt", `${decision.tokens === null ? "not tokenized" : plural(decision.tokens, "token")}, ${plural(decision.blocks, "full block")}${estimated(decision)}`],
      ["predicted hit", `${plural(decision.predicted_hit_tokens, "token")}${guessed}`],
      ["reported hit", cached],
      ["outcome", `${sent}${decision.ttft_ms === null ? "" : `; first byte after ${milliseconds(decision.ttft_ms)}`}`],
      ...decision.notes.map((note, at) => [at ? "" : "notes", note]),
    ]),
    h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Pods that were considered" }, candidates(decision)),
    rest(decision),
    ...limits(decision, chosen),
    h("h3", {}, "Time"),
    timings(decision),
  ]);
}

const estimated = (decision) =>
  (decision.unknown_tokens ? `, about ${count(decision.unknown_tokens)} tokens with unknown ids` : "") + (decision.other_tokens ? `, about ${count(decision.other_tokens)} tokens in other prompts` : "");

/** One row per pod: its blocks as a bar over the prompt, its load, its scores, and what became of it. */
function candidates(decision) {
  const scorers = [...new Set(Object.values(decision.pods).flatMap((pod) => Object.keys(pod.scores)))].sort();
  const best = Math.max(1e-9, ...Object.values(decision.pods).map((pod) => pod.total ?? 0));
  const head = ["pod", "blocks of the prompt", "credit", "in flight", "waiting", ...scorers, "total", ""];
  const numbers = new Set(["credit", "in flight", "waiting", ...scorers]);
  const rows = Object.entries(decision.pods).map(([name, pod]) =>
    h(
      "tr",
      { class: name === decision.chosen ? "chosen" : pod.filtered ? "filtered" : null },
      h("th", { scope: "row" }, name, h("small", { class: `badge trust-${pod.trust}` }, pod.trust)),
      h("td", { class: "blocks" }, blocks(pod, decision.blocks)),
      h("td", { class: "number" }, count(pod.credit)),
      h("td", { class: "number" }, count(pod.in_flight)),
      h("td", { class: "number" }, count(pod.waiting)),
      ...scorers.map((scorer) => h("td", { class: "number" }, count(pod.scores[scorer]))),
      h("td", { class: "number total" }, h("span", {}, count(pod.total)), bar((pod.total ?? 0) / best)),
      h("td", {}, name === decision.chosen ? "chosen" : (pod.filtered ?? "")),
    ),
  );
  const heads = head.map((title) => h("th", { scope: "col", class: numbers.has(title) ? "number" : null }, title || h("span", { class: "hidden" }, "outcome")));
  return h("table", {}, h("caption", { class: "hidden" }, "Pods, best first"), h("thead", {}, h("tr", {}, ...heads)), h("tbody", {}, ...rows));
}

function blocks(pod, all) {
  const matched = pod.matched_blocks;
  const parts = [
    ["matched", matched ?? 0],
    ["pending", pod.pending_blocks],
    ["recent", Math.max(0, pod.recent_blocks - (matched ?? 0) - pod.pending_blocks)],
  ];
  const picture = h("span", { class: "bar stacked", "aria-hidden": "true" });
  for (const [kind, number] of parts) {
    const fill = h("span", { class: `fill ${kind}` });
    fill.style.width = `${all ? Math.min(100, (number / all) * 100) : 0}%`;
    picture.append(fill);
  }
  const words = [matched === null ? "matched unknown" : `${count(matched)} matched`];
  if (pod.pending_blocks) words.push(`${count(pod.pending_blocks)} pending`);
  if (pod.recent_blocks) words.push(`${count(pod.recent_blocks)} recent`);
  if (pod.recent_chunks) words.push(`${plural(pod.recent_chunks, "chunk")} of bytes`);
  return h("div", {}, picture, h("small", {}, words.join(", ")));
}

const rest = (decision) => {
  const more = decision.candidates - Object.keys(decision.pods).length;
  return more > 0 ? h("p", { class: "muted" }, `and ${plural(more, "more pod")}`) : null;
};

function limits(decision, chosen) {
  if (!chosen || !chosen.limits.length) return [];
  return [h("h3", {}, `Why ${decision.chosen} is ${chosen.trust}`), h("ul", {}, ...chosen.limits.map((words) => h("li", {}, words)))];
}

function timings(decision) {
  const entries = Object.entries(decision.timings_ms);
  const most = Math.max(1e-6, ...entries.map((each) => each[1]));
  return h("ol", { class: "bars" }, ...entries.map(([stage, value]) => h("li", {}, h("span", { class: "name" }, stage), bar(value / most), h("b", {}, value < 0.1 ? `${Math.round(value * 1000)} µs` : milliseconds(value)))));
}

export { find, UNKNOWN };
