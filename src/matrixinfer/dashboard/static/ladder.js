// The "why no hit" ladder: what is lost on each rung, why, and what helps.

import { $, bar, h, setText } from "./dom.js";
import { compact, duration, share } from "./format.js";

const SINCE_SECONDS = 3600;
const EVERY_MILLISECONDS = 10_000;

export class Ladder {
  /** Asks again from time to time while the page is seen. */
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
      if (response.ok) this.show(await response.json());
    } catch {
      // The gateway is away; the page says so, and this asks again.
    }
  }

  show(ladder) {
    const rungs = ladder.rungs ?? [];
    $("ladder").hidden = !rungs.length;
    setText($("ladder-span"), `of the prompt tokens of the last ${duration(ladder.seconds ?? SINCE_SECONDS)}`);
    $("rungs").replaceChildren(...rungs.map(rung));
  }
}

const rung = (each) =>
  h(
    "li",
    {},
    h("span", { class: "name" }, each.name),
    bar(each.share ?? 0),
    h("b", {}, share(each.share)),
    h("small", {}, each.tokens === null ? "unknown" : `${compact(each.tokens)} tokens`),
    each.cause ? h("p", {}, each.cause) : null,
    each.remedy ? h("p", { class: "muted" }, each.remedy) : null,
  );
