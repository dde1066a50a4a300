// What `matrixinfer doctor` finds.

import { $, h, setText } from "./dom.js";
import { plural } from "./format.js";

const ORDER = { blind: 0, warning: 1, ok: 2 };

export class Doctor {
  constructor() {
    $("examine").addEventListener("click", () => this.#examine());
  }

  async #examine() {
    const button = $("examine");
    const began = Date.now();
    button.disabled = true;
    const say = () => setText($("doctor-status"), `Examining the engines: ${Math.round((Date.now() - began) / 1000)} s`);
    say();
    const timer = setInterval(say, 1000);
    try {
      const response = await fetch("debug/doctor", { method: "POST" });
      const answer = await response.json();
      if (!response.ok) throw new Error(answer.error?.message ?? `HTTP ${response.status}`);
      this.#show(answer);
    } catch (error) {
      setText($("doctor-status"), error instanceof TypeError ? "The gateway did not answer." : error.message);
    } finally {
      clearInterval(timer);
      button.disabled = false;
      setText(button, "Examine again");
    }
  }

  #show({ findings, summary }) {
    const { pods, blind, warning } = summary;
    setText($("doctor-status"), blind || warning ? `${plural(pods, "pod")}: ${blind} blind, ${plural(warning, "warning")}.` : `${plural(pods, "pod")}: no problems found.`);
    const groups = new Map();
    for (const finding of findings) {
      const name = finding.pod ?? "fleet";
      if (!groups.has(name)) groups.set(name, []);
      groups.get(name).push(finding);
    }
    const worst = (group) => Math.min(...group.map((finding) => ORDER[finding.level]));
    const sorted = [...groups].sort((a, b) => worst(a[1]) - worst(b[1]));
    $("findings").replaceChildren(...sorted.map(([name, group]) => section(name, group)));
  }
}

function section(name, group) {
  const bad = group.filter((finding) => finding.level !== "ok");
  const summary = bad.length ? plural(bad.length, "finding") : "no problems";
  const items = [...group].sort((a, b) => ORDER[a.level] - ORDER[b.level]).map((finding) =>
    h("li", {}, h("span", { class: `badge level-${finding.level}` }, finding.level), " ", finding.message, finding.fix ? h("p", { class: "muted" }, `Fix: ${finding.fix}`) : null),
  );
  return h("details", { open: bad.length > 0 }, h("summary", {}, h("b", {}, name), ` ${summary}`), h("ul", { class: "findings" }, ...items));
}
