// The dialog that shows one thing: an endpoint or a decision.

import { $, h, setText } from "./dom.js";

export function open(title, content) {
  const dialog = $("dialog");
  setText($("dialog-title"), title);
  $("dialog-body").replaceChildren(...content.filter(Boolean));
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
  $("dialog-title").focus();
}

/** Pairs of names and values. A pair without a name goes on with the one before. */
export function details(pairs) {
  const list = h("dl", { class: "details" });
  let last = null;
  for (const [name, value] of pairs) {
    if (name || !last) list.append(h("dt", {}, name));
    last = h("dd", {}, value);
    list.append(last);
  }
  return list;
}

$("dialog").addEventListener("click", (event) => {
  if (event.target === event.currentTarget) event.currentTarget.close(); // the backdrop
});
