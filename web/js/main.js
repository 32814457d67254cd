// The page: its three parts, each started when it is first seen.

import { startFacade } from "./facade.js";
import { fail, load } from "./page.js";
import { startShift } from "./shift.js";
import { startTables } from "./tables.js";

const parts = { shift: startShift, facade: startFacade, tables: startTables };
const started = new Set();

function show(name) {
  for (const part of Object.keys(parts)) {
    const tab = document.getElementById(`tab-${part}`);
    document.getElementById(part).hidden = part !== name;
    tab.setAttribute("aria-selected", part === name);
    tab.tabIndex = part === name ? 0 : -1;
  }
  if (!started.has(name)) {
    started.add(name);
    index.then((found) => parts[name](found)).catch((error) => fail(name, error));
  }
}

const index = load("models/index.json");
index
  .then((found) => {
    document.getElementById("bytes").textContent = `${(found.bytes / 1e6).toFixed(1)} MB`;
  })
  .catch(() => {}); // the part that is shown says so

const named = () =>
  Object.hasOwn(parts, location.hash.slice(1)) ? location.hash.slice(1) : "shift";
addEventListener("hashchange", () => show(named()));
// or the browser would leave the page for a file that is dropped on it
for (const kind of ["dragover", "drop"]) addEventListener(kind, (event) => event.preventDefault());
const tabs = Object.keys(parts).map((part) => document.getElementById(`tab-${part}`));
tabs.forEach((tab, i) => {
  tab.addEventListener("click", () => {
    location.hash = Object.keys(parts)[i];
  });
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = tabs[(i + step + tabs.length) % tabs.length];
    next.focus();
    next.click();
    event.preventDefault();
  });
});
show(named());
