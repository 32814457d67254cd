// The third part: both tables and the claims, out of the committed records.

import { forest } from "./forest.js";
import { load, onWidth } from "./page.js";

const byId = (id) => document.getElementById(id);
const NAMES = {
  table1: "1: Fashion-MNIST",
  table2: "2: facades",
  claims: "claims of the report",
};
const ABOUT = {
  report: "as the report, on a GPU",
  desk: "the study, on two CPU cores",
};

let all,
  sorted = { column: null, down: true },
  pinned = null; // the row whose detail stays, whatever is pointed at

const signed = (value, always = true) =>
  value === null ? "" : (always && value >= 0 ? "+" : "") + value.toFixed(2).replace("-", "−");
const cell = ({ mean, half }, always) =>
  mean === null
    ? '<span class="faint">not run</span>'
    : signed(mean, always) +
      (half === null ? "" : ` <span class="faint">± ${half.toFixed(2)}</span>`);
const mark = (holds) => ({ true: " ✓", false: " ✗" })[holds] ?? "";
const current = () => [byId("protocol").value, byId("which").value];

function inOrder(rows) {
  if (!sorted.column) return rows;
  const [column, what] = sorted.column.split(".");
  const value = (row) => (what ? row.columns[column][what] : row[column]) ?? -Infinity;
  const [base, ...others] = rows; // the base row is no difference
  others.sort((a, b) => (sorted.down ? 1 : -1) * (value(b) - value(a)));
  return [base, ...others];
}

function heading(name, key) {
  const arrow = sorted.column === key ? (sorted.down ? " ↓" : " ↑") : "";
  const order = sorted.column === key ? (sorted.down ? "descending" : "ascending") : "none";
  return `<th aria-sort="${order}"><button data-sort="${key}">${name}${arrow}</button></th>`;
}

function drawTable(protocol, name) {
  const { columns, rows, seeds, seeds_alone, records, caveat } = all[protocol][name];
  // the report has not every column
  const compared = (column) => rows.some((row) => row.columns[column].report !== null);
  const heads = Object.entries(columns)
    .map(
      ([column, text]) =>
        heading(text, `${column}.mean`) +
        (compared(column) ? heading("report", `${column}.report`) : ""),
    )
    .join("");
  const body = inOrder(rows)
    .map(
      (row) =>
        `<tr tabindex="0" data-row="${row.row}"><td>${row.label}</td>` +
        Object.keys(columns)
          .map((column) => {
            const one = row.columns[column];
            const report = `<td>${signed(one.report, !row.base)}${mark(one.holds)}</td>`;
            return `<td>${cell(one, !row.base)}</td>${compared(column) ? report : ""}`;
          })
          .join("") +
        `<td>${row.seeds}</td>
       <td>${row.parameters ? `${(row.parameters / 1e6).toFixed(2)} M` : ""}</td></tr>`,
    )
    .join("");
  const first = byId("plot").value,
    text = columns[first];
  const differences = rows
    .filter((row) => !row.base && row.columns[first].mean !== null)
    .map((row) => ({ row: row.row, label: row.row, ...row.columns[first] }));
  byId("table").innerHTML =
    (differences.length
      ? forest(
          differences,
          `points of ${text}, less the base row's`,
          "■ ours, its 95 % interval, ○ each seed, ◆ the report",
          byId("table").clientWidth,
        )
      : "") +
    `<table><thead><tr><th>row</th>${heads}${heading("seeds", "seeds")}${heading(
      "parameters",
      "parameters",
    )}</tr></thead><tbody>${body}</tbody></table>`;
  byId("table-note").textContent =
    `${records} runs, up to ${seeds} seed${seeds === 1 ? "" : "s"} a row. ` +
    "Percent; the first row is a value, the others are differences from it, paired by seed. " +
    "± is the 95 % interval over seeds and test images" +
    `${seeds_alone.length ? ` (of ${seeds_alone.join(", ")} over seeds alone)` : ""}; a row with ` +
    "one seed has none. ✓ the " +
    "report's number lies where one more such run " +
    `would, ✗ it does not. ${caveat}`;
}

function effect({ mean, half, metric, row, other }) {
  if (mean === null) return "not run";
  const interval = half === null ? "" : ` ± ${half.toFixed(2)}`;
  return `${signed(mean)}${interval} ${metric}, ${row}${other ? ` − ${other}` : ""}`;
}

const minus = (value) => String(value).replace("-", "−");
const range = ({ low, high }) =>
  low === null
    ? `at most ${minus(high)}`
    : high === null
      ? `at least ${minus(low)}`
      : `${minus(low)} to ${minus(high)}`;

function drawClaims(protocol) {
  const rows = all[protocol].claims
    .map((one) => {
      const [shown] = one.effects; // the one that decides comes first
      return `<tr tabindex="0" data-row="${one.claim}"><td>${one.claim} ${one.says}</td>
      <td class="words">${range(shown)}</td><td class="words">${effect(shown)}</td>
      <td>${one.p.toFixed(3)}</td><td class="verdict-${one.verdict}">${one.verdict}</td></tr>`;
    })
    .join("");
  byId("table").innerHTML =
    `<table><thead><tr><th>the report concludes</th><th class="words">taken as (points)</th>
    <th class="words">what decides it in our runs</th><th>p (Holm)</th>
    <th>verdict</th></tr></thead>
    <tbody>${rows}</tbody></table>`;
  byId("table-note").textContent =
    "A claim is supported if all its differences lie in their ranges, " +
    "contradicted if one does not, and undecided where seeds and test images leave it open.";
}

function detail(key) {
  const [protocol, name] = current();
  const box = byId("detail"),
    code = (command) => `<p>Made by <code>${command}</code>
    <button data-copy="${command}">Copy</button>
    <button data-close ${pinned ? "" : "hidden"}>Close</button></p>`;
  if (name === "claims") {
    const one = all[protocol].claims.find(({ claim }) => claim === key);
    box.innerHTML =
      `<b>${one.claim}</b> ${one.says}: <b>${one.verdict}</b>${code(one.command)}<ul>` +
      one.effects
        .map((e) => `<li>${effect(e)}; ${e.seeds} seeds; claimed: ${range(e)}</li>`)
        .join("") +
      "</ul>";
  } else {
    const { columns, rows } = all[protocol][name],
      row = rows.find((one) => one.row === key);
    box.innerHTML =
      `<b>${row.label}</b>${code(row.command)}<ul>` +
      Object.entries(columns)
        .map(([column, text]) => {
          const own = Object.entries(row.columns[column].own);
          return `<li>${text}: ${
            own.map(([seed, value]) => `seed ${seed} ${value.toFixed(2)} %`).join(", ") ||
            "not run yet"
          }</li>`;
        })
        .join("") +
      "</ul>";
  }
  document
    .querySelectorAll("#table tr[data-row]")
    .forEach((line) => line.classList.toggle("chosen", line.dataset.row === key));
}

// A row's detail stays while the pointer or the focus goes elsewhere, to the button for one.
function pin(row) {
  pinned = row;
  detail(row);
}

function unpin() {
  pinned = null;
  byId("detail").innerHTML =
    '<span class="faint">Point at a row for its seeds and its command; click it, or press ' +
    "Enter, to keep them here.</span>";
  document.querySelector("#table tr.chosen")?.classList.remove("chosen");
}

function draw() {
  const [protocol, name] = current();
  byId("plotted").hidden = name === "claims";
  if (name === "claims") drawClaims(protocol);
  else drawTable(protocol, name);
  unpin();
}

function offerPlots() {
  const [protocol, name] = current();
  byId("plot").replaceChildren(
    ...Object.entries(all[protocol][name].columns ?? {}).map(
      ([column, text]) => new Option(text, column),
    ),
  );
}

// The study at the report's level where each row has a run; else the first look.
function telling() {
  const whole = (protocol) =>
    ["table1", "table2"].every((name) =>
      all[protocol][name].rows.every((row) =>
        Object.values(row.columns).some((one) => one.mean !== null),
      ),
    );
  return Object.keys(all).find(whole) ?? Object.keys(all)[0];
}

export async function startTables() {
  all = await load("data/tables.json");
  for (const [name, text] of Object.entries(NAMES)) byId("which").add(new Option(text, name));
  for (const name of Object.keys(all)) {
    byId("protocol").add(new Option(`${name}: ${ABOUT[name]}`, name));
  }
  byId("protocol").value = telling();
  for (const id of ["which", "protocol", "plot"]) {
    byId(id).addEventListener("change", () => {
      if (id === "which") offerPlots();
      if (id !== "plot") sorted = { column: null, down: true };
      draw();
    });
  }
  offerPlots();
  const box = byId("table");
  const rowOf = (event) => event.target.closest("[data-row]")?.dataset.row;
  // not for a finger: the detail would come between it and the row before its click does
  for (const [kind, points] of [
    ["pointerover", ({ pointerType }) => pointerType !== "touch"],
    ["focusin", ({ target }) => target.matches(":focus-visible")],
  ]) {
    box.addEventListener(kind, (event) => {
      const row = rowOf(event);
      if (row && !pinned && points(event)) detail(row);
    });
  }
  box.addEventListener("click", (event) => {
    const key = event.target.closest("[data-sort]")?.dataset.sort,
      row = rowOf(event);
    if (key) {
      sorted = { column: key, down: sorted.column === key ? !sorted.down : true };
      draw();
      box.querySelector(`[data-sort="${key}"]`).focus(); // the button that was, is no more
    } else if (row) {
      if (row === pinned) unpin();
      else pin(row);
    }
  });
  box.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !event.target.dataset.row) return;
    pin(event.target.dataset.row);
    byId("detail").querySelector("[data-copy]").focus();
  });
  const close = () => {
    box.querySelector("tr.chosen")?.focus(); // while it is pinned: else that would show it again
    unpin();
  };
  byId("tables").addEventListener("keydown", (event) => {
    if (event.key === "Escape" && pinned) close();
  });
  byId("detail").addEventListener("click", ({ target }) => {
    if ("close" in target.dataset) close();
    if (target.dataset.copy) copy(target);
  });
  draw();
  onWidth(box, () => {
    const kept = pinned;
    draw();
    if (kept) pin(kept);
  });
}

// A page without https, or without leave, has no clipboard: then the command is there to be taken.
async function copy(button) {
  try {
    await navigator.clipboard.writeText(button.dataset.copy);
    button.textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(button.parentElement.querySelector("code"));
    button.textContent = "Selected: copy it with the keyboard";
  }
}
