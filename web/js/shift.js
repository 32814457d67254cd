// The first part: a garment is moved, and three networks say what it is.

import { CELL, SIDE, compose, isWhole, softmax, wrap } from "./grid.js";
import { drawBars, drawGrid, drawMap, tilesOf } from "./draw.js";
import { predict, prepare } from "./nets.js";
import { fail, onWidth, works } from "./page.js";
import { drawTrace, summarise } from "./trace.js";

const DOWNS = [
  { down: "maxpool", name: "max-pool", what: "keeps the largest of 2x2" },
  { down: "stride", name: "stride", what: "skips every other position" },
  { down: "blurpool", name: "blur pool", what: "the largest, then a blur" },
];
const LONGEST = 240; // moves that the trace keeps
const PAUSE = 700; // ms without a move after which the answers are told to a screen reader
const byId = (id) => document.getElementById(id);

const state = {
  garment: 2,
  digits: [2, 0, 5],
  slot: 0,
  x: 0,
  y: 0,
  roll: [0, 0],
  kind: "frozen",
  tie: "0",
  mapOf: "true",
};
const trace = [];
let files, classes, garments, digits, cards;
let found = null; // the last answers
let busy = false,
  stale = false,
  sliding = 0, // which slide goes on
  era = 0, // what the trace is of
  telling = 0; // the timer of what is to be told

const truth = () => state.garment % 10;
const compound = () =>
  compose(
    garments[state.garment],
    state.digits.map((i) => digits[i]),
    state.x,
    state.y,
    state.roll,
  );

// The file and head of a network that the page has, else null.
function networkOf(down) {
  for (const file of files) {
    for (const one of file.networks) {
      if (one.down === down && one.kind === state.kind && one.tie === state.tie) {
        return { file: file.file, head: one.head };
      }
    }
  }
  return null;
}

async function answer(i, grid) {
  const network = networkOf(DOWNS[i].down);
  if (!network) return null;
  const { outputs } = await predict(i, network.file, grid, [1, 1, SIDE, SIDE]);
  const from = network.head * classes.length,
    side = outputs.maps.dims[2];
  const part = (output, each) => output.data.slice(from * each, (from + classes.length) * each);
  return {
    probabilities: softmax(part(outputs.logits, 1)),
    maps: part(outputs.maps, side * side),
    side,
  };
}

// Asks all networks about the newest grid; what moved in the meantime is asked about afterwards.
async function update() {
  show();
  stale = true;
  if (busy) return;
  busy = true;
  while (stale) {
    stale = false;
    const { x, y, roll } = state,
      grid = compound(),
      asked = era;
    let answers;
    try {
      answers = await Promise.all(DOWNS.map((_, i) => answer(i, grid)));
    } catch (error) {
      busy = stale = false;
      fail("shift", error);
      return;
    }
    works("shift");
    if (asked !== era) continue; // of another garment, digit or network
    found = { x, y, roll: [...roll], grid, answers };
    const last = trace.at(-1);
    if (!last || last.x !== x || last.y !== y || String(last.roll) !== String(roll)) {
      trace.push({
        x,
        y,
        roll: [...roll],
        whole: isWhole(x, y, roll),
        sure: answers.map((one) => one && one.probabilities[truth()]),
        said: answers.map(
          (one) => one && one.probabilities.indexOf(Math.max(...one.probabilities)),
        ),
      });
      if (trace.length > LONGEST) trace.shift();
    }
    render();
    await new Promise(requestAnimationFrame);
  }
  busy = false;
}

function show() {
  drawGrid(byId("grid"), compound());
  const near = (value) => (value % SIDE > CELL ? (value % SIDE) - SIDE : value % SIDE);
  const [right, down] = [state.x + state.roll[0], state.y + state.roll[1]].map(near);
  const where = state.roll.some(Boolean) ? "the grid, rolled" : "the garment";
  byId("place").textContent =
    `${where}: ${right} right, ${down} down` +
    (right % CELL === 0 && down % CELL === 0
      ? ": a whole cell"
      : isWhole(state.x, state.y, state.roll)
        ? ": whole positions"
        : ": in between");
}

function render() {
  cards.forEach((card, i) => {
    const one = found.answers[i];
    card.root.classList.toggle("missing", !one);
    if (!one) {
      card.verdict.textContent = "not on this page: only max-pool was trained so";
      card.verdict.className = "verdict faint";
      return;
    }
    const said = one.probabilities.indexOf(Math.max(...one.probabilities));
    const right = said === truth();
    card.verdict.textContent =
      `${right ? "✓" : "✗"} ${classes[said]} ` +
      `${(100 * one.probabilities[said]).toFixed(0)}\u202f%`;
    card.verdict.className = right ? "verdict right" : "verdict wrong";
    const of = state.mapOf === "true" ? truth() : state.mapOf === "said" ? said : +state.mapOf;
    drawMap(card.canvas, found.grid, one.maps, one.side, of);
    drawBars(card.bars, one.probabilities, truth());
  });
  drawTrace(byId("trace"), trace, DOWNS);
  summarise(byId("summary"), trace, DOWNS, classes);
  byId("trace-title").textContent =
    `How sure each one was that it is a ${classes[truth()]}, ` + "move by move";
  clearTimeout(telling);
  telling = setTimeout(tell, PAUSE);
}

// Where the garment is and what the networks say, for who cannot see it.
function tell() {
  const said = cards.map(({ verdict }, i) => `${DOWNS[i].name} ${verdict.textContent}`);
  byId("spoken").textContent = `${byId("place").textContent}. ${said.join(", ")}`;
}

// ---- what the reader does ----

function restart() {
  trace.length = 0;
  sliding++;
  era++;
  update();
}

const rolls = () => document.querySelector("input[name=mode]:checked").value === "grid";

// Moves by so many pixels from where it was; false at a border, where that is no move.
function move(right, down, from = state) {
  const before = [state.x, state.y, ...state.roll].join();
  if (rolls()) {
    state.roll = [wrap(from.roll[0] + right), wrap(from.roll[1] + down)];
  } else {
    state.x = Math.min(Math.max(from.x + right, 0), CELL);
    state.y = Math.min(Math.max(from.y + down, 0), CELL);
  }
  if ([state.x, state.y, ...state.roll].join() === before) return false;
  update();
  return true;
}

function home() {
  Object.assign(state, { x: 0, y: 0, roll: [0, 0] });
  restart();
}

// By a cell or to the farther border, pixel by pixel, as long as nothing else is done.
async function slide() {
  const mine = ++sliding;
  const step = !rolls() && state.x > CELL / 2 ? -1 : 1;
  for (let i = 0; i < CELL; i++) {
    while (busy && sliding === mine) await new Promise(requestAnimationFrame);
    if (sliding !== mine || !move(step, 0)) return;
  }
}

function listenToGrid() {
  const canvas = byId("grid");
  let grip = null; // where the garment and the pointer were when it was taken
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    sliding++;
    canvas.setPointerCapture(event.pointerId);
    const { x, y, roll } = state;
    grip = { x, y, roll, pointer: [event.clientX, event.clientY] };
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!grip) return;
    const pixel = canvas.getBoundingClientRect().width / SIDE;
    const by = [event.clientX, event.clientY].map((at, i) =>
      Math.trunc((at - grip.pointer[i]) / pixel),
    );
    move(...by, grip);
  });
  const end = () => {
    grip = null;
  };
  canvas.addEventListener("pointerup", end);
  canvas.addEventListener("pointercancel", end);
  canvas.addEventListener("keydown", (event) => {
    const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[
      event.key
    ];
    if (!way) return;
    event.preventDefault();
    sliding++;
    move(...way.map((d) => d * (event.shiftKey ? CELL : 1)));
  });
}

// One of the tiles is a tab stop, the arrow keys go from it to the others.
function tileButtons(box, tiles, names, choose) {
  const inRow = 10; // as in style.css
  box.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -inRow, ArrowDown: inRow }[event.key];
    const next = box.children[[...box.children].indexOf(event.target) + step];
    if (!step || !next) return;
    event.preventDefault();
    next.focus();
  });
  tiles.forEach((tile, i) => {
    const button = document.createElement("button");
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = CELL;
    drawGrid(canvas, tile, CELL);
    button.append(canvas);
    button.setAttribute("aria-label", names(i));
    button.title = names(i);
    button.addEventListener("click", () => choose(i));
    box.append(button);
  });
}

function mark(box, chosen, stop = chosen[0]) {
  [...box.children].forEach((button, i) => {
    button.setAttribute("aria-pressed", chosen.includes(i));
    button.tabIndex = i === stop ? 0 : -1;
  });
}

function choose(change) {
  Object.assign(state, change);
  mark(byId("garments"), [state.garment]);
  mark(byId("digits"), state.digits, state.digits[state.slot]);
  mark(byId("slots"), [state.slot]);
  [...byId("slots").children].forEach((button, i) =>
    drawGrid(button.firstChild, digits[state.digits[i]], CELL),
  );
  byId("tied").hidden = state.tie === "0";
  restart();
}

function makeCards() {
  return DOWNS.map(({ name, what }, i) => {
    const root = document.createElement("article");
    root.className = `card line-${i}`;
    root.innerHTML = `<h2>${name}</h2><p class="what">${what}</p>
      <p class="verdict">loading</p><canvas width="224" height="224"></canvas>
      <ol class="bars"></ol>`;
    byId("cards").append(root);
    const bars = root.querySelector("ol");
    for (const label of classes) {
      bars.insertAdjacentHTML("beforeend", `<li><i></i><span>${label}</span><b></b></li>`);
    }
    const canvas = root.querySelector("canvas");
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `where ${name} looks`);
    return { root, canvas, bars, verdict: root.querySelector(".verdict") };
  });
}

export async function startShift(index) {
  files = index.files;
  classes = files[0].classes;
  [garments, digits] = await Promise.all(
    ["garments", "digits"].map((name) => tilesOf(`images/${name}.png`, CELL)),
  );
  cards = makeCards();
  tileButtons(
    byId("garments"),
    garments,
    (i) => classes[i % 10],
    (garment) => choose({ garment }),
  );
  tileButtons(
    byId("digits"),
    digits,
    (i) => `digit ${i % 10}`,
    (i) => {
      const chosen = [...state.digits];
      chosen[state.slot] = i;
      choose({ digits: chosen });
    },
  );
  tileButtons(
    byId("slots"),
    state.digits.map((i) => digits[i]),
    (i) => `digit ${i + 1} of the grid`,
    (slot) => choose({ slot }),
  );
  byId("three").addEventListener("click", () =>
    choose({ digits: [3, ...state.digits.slice(1)], slot: 0 }),
  );
  const trained = files.flatMap((file) => file.networks.map(({ kind, tie }) => `${kind}-${tie}`));
  for (const option of [...byId("surrogate").options]) {
    if (!trained.includes(option.value)) option.remove();
  }
  byId("surrogate").addEventListener("change", (event) => {
    const [kind, tie] = event.target.value.split("-");
    choose({ kind, tie });
  });
  const maps = [
    ["true", "the true class"],
    ["said", "the answer"],
    ...classes.map((name, i) => [i, name]),
  ];
  for (const [value, name] of maps) byId("map-of").add(new Option(name, value));
  byId("map-of").addEventListener("change", (event) => {
    state.mapOf = event.target.value;
    if (found) render();
  });
  byId("slide").addEventListener("click", slide);
  byId("back").addEventListener("click", home);
  byId("hints").open = innerWidth > 760;
  onWidth(byId("trace"), () => found && drawTrace(byId("trace"), trace, DOWNS));
  listenToGrid();
  // for the console, and for tests
  globalThis.probe = {
    ...globalThis.probe,
    shift: { state, trace, found: () => (busy || stale ? null : found) },
  };
  show();
  await Promise.all(DOWNS.map(({ down }, i) => prepare(i, networkOf(down).file)));
  choose({});
  if (!matchMedia("(prefers-reduced-motion: reduce)").matches) slide();
}
