// The last hour: tiles, charts, and requests by pod and model.

import { $, bar, h, setText } from "./dom.js";
import { Chart } from "./charts.js";
import { axisMilliseconds, compact, count, duration, milliseconds, plural, quotient, roundShare, share, UNKNOWN } from "./format.js";

const ESTIMATE = "Estimate; how it is computed stands below the charts";
const SHOWN = 8;
const HITS = "Share of prompt tokens that engines report to have found in their caches";
const UNREPORTED = "No answer reports cached tokens: start vLLM with --enable-prompt-tokens-details; for streams, let clients ask for usage, or set drift.injectUsage";

const rates = (sum) => ({
  reported: quotient(sum.reported_tokens, sum.reported_of),
  predicted: quotient(sum.predicted_tokens, sum.predicted_of),
  robin: quotient(sum.round_robin_tokens, sum.round_robin_of),
});

const tile = (title, hint) => {
  const big = h("p", { class: "big" }, "–");
  const lines = [h("p", {}, " "), h("p", {}, " ")];
  return { big, lines, element: h("div", { class: "panel tile", title: hint }, h("h3", {}, title), big, ...lines) };
};

export class Traffic {
  constructor() {
    this.tiles = {
      hits: tile("Hit rate", HITS),
      ttft: tile("Time to first token", "From the request to the first byte of its answer, as the gateway measures it; within 10 %"),
      tokens: tile("Tokens saved", "Prompt tokens that engines report to have found in their caches"),
      prefill: tile("Prefill saved", "Estimate: tokens saved, divided by the speed at which each pod computes prompts"),
      requests: tile("Requests", "Requests whose answer has ended"),
    };
    $("tiles").replaceChildren(...Object.values(this.tiles).map((each) => each.element));
    this.hits = new Chart(
      "Hit rate",
      [
        { name: "reported", kind: "first", hint: "By the engines, of the prompts on which they report" },
        { name: "predicted", kind: "second", hint: "By the gateway, when it chose the pods" },
        { name: "had it been round robin", kind: "third", hint: ESTIMATE },
      ],
      { format: roundShare, top: 1 },
    );
    this.ttft = new Chart("Time to first token", [{ name: "p50", kind: "first" }, { name: "p90", kind: "second" }], { format: milliseconds, axis: axisMilliseconds });
    this.rate = new Chart("Requests per second", [{ name: "ended", kind: "first" }, { name: "failed", kind: "bad" }], { format: (value) => compactRate(value) });
    $("charts").replaceChildren(this.hits.element, this.ttft.element, this.rate.element);
    this.pods = shares("By pod");
    this.models = shares("By model");
    $("shares").replaceChildren(this.pods.element, this.models.element);
  }

  show(state) {
    const { hour, about, at } = state;
    const spent = Math.min(state.up_s, about.buckets * about.bucket_seconds);
    const part = about.workers > 1 ? `, at worker ${about.worker} of ${about.workers}` : "";
    setText($("span"), `the last ${duration(Math.round(spent))}${part}`);
    this.#tiles(hour, state);
    const points = [...state.points.values()].sort((a, b) => a.number - b.number);
    const range = [at - Math.max(120, spent), at];
    const bins = merged(points, spent > 1200 ? 4 : 1, about.bucket_seconds, at - state.up_s, range);
    this.#charts(bins, range, rates(hour), hour);
    const byPod = [...state.rows.values()].filter((row) => row.requests).map((row) => [row.name, row.requests]);
    this.pods.show(byPod, "No requests yet.");
    this.models.show(Object.entries(state.models), "No requests yet.");
    const idle = !hour.requests && !hour.round_robin_of;
    $("no-traffic").hidden = !idle;
    $("charts").hidden = idle;
    if (idle) setText($("no-traffic"), `No request in the last ${duration(Math.round(spent))}. Clients send them to ${about.api}/v1/chat/completions, as they would to an engine.`);
  }

  #tiles(hour, state) {
    const { hits, ttft, tokens, prefill, requests } = this.tiles;
    const rate = rates(hour);
    const all = Math.max(hour.predicted_of, hour.reported_of + hour.silent_tokens);
    const unreported = !hour.reported_of && hour.predicted_of > 0; // streams without usage, or engines that do not say
    write(hits, share(unreported ? rate.predicted : rate.reported), unreported ? "predicted; no answer reports" : `predicted ${share(rate.predicted)}`, `estimate: round robin ${roundShare(rate.robin)}`);
    hits.element.title = unreported ? UNREPORTED : HITS;
    write(ttft, milliseconds(hour.ttft_p50_ms), "half of all answers", `90 %: ${milliseconds(hour.ttft_p90_ms)}`);
    const covered = quotient(hour.reported_of, all);
    if (unreported) write(tokens, compact(hour.predicted_tokens), `of ${compact(hour.predicted_of)} prompt tokens`, "predicted; no answer reports");
    else write(tokens, compact(hour.reported_tokens), `of ${compact(hour.reported_of)} prompt tokens`, covered !== null && covered < 0.995 ? `answers report on ${roundShare(covered)}` : "as engines report");
    write(prefill, hour.reported_of ? duration(hour.saved_seconds) : UNKNOWN, "of computing prompts", unreported ? "no answer reports" : "an estimate");
    const last = [...state.points.values()].filter((each) => each.t > state.at - 60);
    const lately = last.reduce((sum, each) => sum + each.requests, 0) / Math.max(1, Math.min(60, state.up_s));
    write(requests, count(hour.requests), `${compactRate(lately)} per second now`, hour.errors ? `${count(hour.errors)} failed` : "none failed");
    requests.element.classList.toggle("troubled", hour.errors > 0);
  }

  #charts(bins, range, rate, hour) {
    const line = (value) => bins.map((bin) => ({ t: bin.middle, y: value(bin) }));
    this.hits.show(
      [line((bin) => rates(bin).reported), line((bin) => rates(bin).predicted), line((bin) => rates(bin).robin)],
      range,
      `reported ${share(rate.reported)}, predicted ${share(rate.predicted)}, had it been round robin about ${share(rate.robin)}`,
    );
    const times = (key) => line((bin) => (bin.weight ? bin[key] / bin.weight : null));
    this.ttft.show([times("ttft_p50_ms"), times("ttft_p90_ms")], range, `p50 ${milliseconds(hour.ttft_p50_ms)}, p90 ${milliseconds(hour.ttft_p90_ms)}`);
    const perSecond = (key) => line((bin) => (bin.covered > 0 ? bin[key] / bin.covered : null));
    this.rate.show([perSecond("requests"), perSecond("errors")], range, `${plural(hour.requests, "request")}, ${count(hour.errors)} failed`);
  }
}

const compactRate = (value) => (value >= 0.05 && value < 10 ? value.toFixed(1) : count(value));

const write = (tile, big, ...lines) => {
  setText(tile.big, big);
  lines.forEach((line, at) => setText(tile.lines[at], line));
};

const SUMMED = ["requests", "errors", "predicted_of", "predicted_tokens", "reported_of", "reported_tokens", "round_robin_of", "round_robin_tokens"];

const AVERAGED = ["ttft_p50_ms", "ttft_p90_ms"];

/** Sums of the points in bins of `per` buckets; an empty bin has no rates. `began`: before that nothing was counted. */
function merged(points, per, seconds, began, [from, to]) {
  if (!points.length) return [];
  const last = points.at(-1);
  const bins = new Map();
  const keys = [...SUMMED, ...AVERAGED, "weight"];
  for (let group = Math.floor(points[0].number / per); group <= Math.floor(last.number / per); group++) {
    const start = last.t + (group * per - last.number) * seconds;
    const end = Math.min(start + per * seconds, to);
    const begin = Math.max(start, began, from);
    if (end > begin) bins.set(group, { middle: (begin + end) / 2, covered: end - begin, ...Object.fromEntries(keys.map((key) => [key, 0])) });
  }
  for (const point of points) {
    const bin = bins.get(Math.floor(point.number / per));
    if (!bin) continue;
    for (const key of SUMMED) bin[key] += point[key];
    if (point.ttft_p50_ms === null) continue;
    bin.weight += point.requests;
    for (const key of AVERAGED) bin[key] += point[key] * point.requests;
  }
  return [...bins.values()];
}

/** A list of names with bars, the largest first. */
function shares(title) {
  const list = h("ol", { class: "bars" });
  const element = h("div", {}, h("h3", {}, title), list);
  const show = (entries, nothing) => {
    const sorted = entries.sort((a, b) => b[1] - a[1]);
    const rest = sorted.slice(SHOWN);
    const shown = sorted.slice(0, SHOWN);
    if (rest.length) shown.push([`${count(rest.length)} more`, rest.reduce((sum, each) => sum + each[1], 0)]);
    const most = Math.max(1, ...shown.slice(0, SHOWN).map((each) => each[1]));
    const rows = shown.map(([name, requests]) => h("li", {}, h("span", { class: "name", title: name }, name), bar(requests / most), h("b", {}, count(requests))));
    list.replaceChildren(...(rows.length ? rows : [h("li", { class: "muted" }, nothing)]));
  };
  return { element, show };
}
