// Follows the gateway's events and shows them.

import { $, setAttribute, setText } from "./dom.js";
import { time } from "./format.js";
import { Decisions } from "./decisions.js";
import { Doctor } from "./doctor.js";
import { Fleet } from "./fleet.js";
import { Ladder } from "./ladder.js";
import { Traffic } from "./traffic.js";

const RETRY_MILLISECONDS = 3000;

const state = { points: new Map(), rows: new Map(), names: [], models: {}, decisions: [] };
const parts = { traffic: new Traffic(), fleet: new Fleet(), decisions: new Decisions() };
const ladder = new Ladder();
new Doctor();
let source = null;
let retry = null;

function link(kind, text) {
  setAttribute($("link"), "data-state", kind);
  setText($("link"), text);
}

/** Takes a view: everything if it has `about`, else what has changed. */
function take(view) {
  if (view.about) {
    Object.assign(state, { about: view.about, models: {}, decisions: [] });
    state.points.clear();
    state.rows.clear();
    setText($("version"), view.about.version);
    parts.decisions.kept = view.about.decisions_kept;
  }
  Object.assign(state, { at: view.at, up_s: view.up_s, hour: view.hour });
  for (const point of view.points) state.points.set(point.number, { ...point, t: view.at - point.ago_s });
  const oldest = view.at - state.about.buckets * state.about.bucket_seconds;
  for (const [number, point] of state.points) if (point.t < oldest) state.points.delete(number);
  for (const row of view.endpoints ?? []) state.rows.set(row.name, row);
  if (view.names) {
    state.names = view.names;
    const names = new Set(view.names);
    for (const name of state.rows.keys()) if (!names.has(name)) state.rows.delete(name);
  }
  if (view.models) state.models = view.models;
  if (view.decisions) state.decisions = view.decisions;
  return view;
}

function show(view) {
  if ($("main").hidden) {
    $("waiting").hidden = true;
    $("main").hidden = false;
  }
  parts.traffic.show(state);
  if (view.endpoints || view.names) parts.fleet.show(state);
  if (view.decisions) parts.decisions.show(state);
  link("live", "Live");
}

function connect() {
  clearTimeout(retry);
  source?.close();
  source = new EventSource("debug/dashboard/events");
  source.onmessage = (event) => show(take(JSON.parse(event.data)));
  source.addEventListener("stopping", () => lost("The gateway is stopping"));
  source.onerror = () => lost("Reconnecting");
}

function lost(text) {
  source?.close();
  source = null;
  link("lost", state.at ? `${text}; shown as of ${time(state.at)}` : text);
  clearTimeout(retry);
  retry = setTimeout(connect, RETRY_MILLISECONDS);
}

/** A page that nobody sees asks for nothing. */
function follow() {
  if (document.hidden) {
    clearTimeout(retry);
    source?.close();
    source = null;
    ladder.stop();
    link("waiting", "Paused");
  } else {
    connect();
    ladder.start();
  }
}

const THEMES = ["system", "light", "dark"];

function theme(next) {
  const root = document.documentElement;
  let now = root.dataset.theme ?? "system";
  if (next) {
    now = THEMES[(THEMES.indexOf(now) + 1) % THEMES.length];
    if (now === "system") delete root.dataset.theme;
    else root.dataset.theme = now;
    try {
      localStorage.setItem("theme", now);
    } catch {
      // It lasts as long as the page, then.
    }
  }
  setAttribute($("theme"), "aria-label", `Theme: ${now}`);
  setAttribute($("theme"), "title", `Theme: ${now}`);
  setAttribute($("theme"), "data-now", now);
}

$("theme").addEventListener("click", () => theme(true));
theme(false);
document.addEventListener("visibilitychange", follow);
follow();
