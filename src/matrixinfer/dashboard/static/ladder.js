// The "why no hit" ladder: what is left of the prompt tokens on each rung, what was lost on the way, and what helps.

import { $, bar, h, setText } from "./dom.js";
import { compact, count, plural, share } from "./format.js";

const SINCE_SECONDS = 3600;
const EVERY_MILLISECONDS = 10_000;
const WORTH_NAMING = 0.001;

export class Ladder {
  /** Asks again from time to time, while the page is seen. */
  start() {
    this.stop();
    this.timer = setInterval(() => this.ask(), EVERY_MILLISECONDS);
    this.ask();
  }

  stop() {
    clearInterval(this.timer);
  }

  async ask() {
    try {
      const response = await fetch(`debug/ladder?since=${SINCE_SECONDS}`);
      if (response.ok) this.show((await response.json()).ladder);
    } catch {
      // The gateway is away; the page says so, and this asks again.
    }
  }

  show(ladder) {
    const none = !ladder.prompt_tokens;
    $("no-ladder").hidden = !none;
    $("rungs").hidden = none;
    setText($("ladder-span"), none ? "" : `what became of ${compact(ladder.prompt_tokens)} prompt tokens`);
    setText($("ladder-note"), none ? "" : note(ladder));
    $("rungs").replaceChildren(...ladder.rungs.map(rung));
  }
}

function rung(each) {
  const about = each.is_estimate && each.share !== null ? "≈ " : "";
  return h(
    "li",
    {},
    h("span", { class: "name" }, h("b", {}, each.name), ` ${each.meaning}`),
    bar(each.share ?? 0),
    h("b", {}, each.share === null ? "unknown" : about + share(each.share)),
    h("ul", { class: "losses" }, ...each.losses.filter((lost) => lost.share >= WORTH_NAMING).map(loss)),
  );
}

const loss = (lost) =>
  h(
    "li",
    {},
    h("b", {}, `${lost.is_estimate ? "≈ " : ""}−${share(lost.share)}`),
    h("span", {}, lost.cause, lost.remedy ? h("small", { class: "muted" }, lost.remedy) : null),
  );

function note(ladder) {
  const reported = `${count(ladder.reported_requests)} of ${plural(ladder.requests, "request")} report what was reused.`;
  if (ladder.error_share === null) return `${reported} What is marked ≈ is estimated.`;
  const error = ladder.error_share > 0 ? `, within ${share(ladder.error_share)}` : "";
  return `${reported} What is marked ≈ is estimated${error}.`;
}
