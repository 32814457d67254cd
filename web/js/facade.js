// The second part: a photo of a facade, and over it what the network makes of each pixel.

import { predict, prepare } from "./nets.js";
import { works } from "./page.js";
import { palettePng } from "./png.js";
import { channelsFirst, likeliest, maskTo, toSize } from "./resample.js";

const PHOTOS = ["0057", "0024", "0035", "0044", "0031", "0046"].map(
  (number) => `images/facades/eecs442_${number}.jpg`,
);
const LIMIT = 1 << 26; // pixels, as in lab/files.py
const SEEN = 1280; // pixels a side that are drawn, at most: a phone's photo has ten times as many
const byId = (id) => document.getElementById(id);

let about; // the network's entry in the index
let shown = null; // {name, view, width, height, mask, small}: see open()
let newest = 0;

function fail(message) {
  byId("facade-error").textContent = message;
  byId("facade-error").hidden = !message;
}

// The pixels of a file, upright, without colour profile, as predict.py reads it; and as a canvas.
async function decoded(blob, name) {
  try {
    const bitmap = await createImageBitmap(blob, {
      imageOrientation: "from-image",
      premultiplyAlpha: "none",
      colorSpaceConversion: "none",
    });
    const { width, height } = bitmap;
    if (width * height > LIMIT) throw new Error("more than 64 million pixels");
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [width, height];
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.fillStyle = "#fff"; // under what is transparent
    context.fillRect(0, 0, width, height);
    context.drawImage(bitmap, 0, 0);
    bitmap.close();
    const pixels = context.getImageData(0, 0, width, height).data;
    // a canvas that is too large, by limits of each browser's own, stays empty without an error
    if (pixels[3] !== 255) throw new Error("more pixels a side than this browser draws");
    return { canvas, width, height, pixels };
  } catch (error) {
    const reason = /pixels|memory/.test(error.message)
      ? error.message
      : "no PNG, JPEG, WebP, GIF or BMP";
    throw new Error(`${name} cannot be read as an image (${reason}): choose a photo.`);
  }
}

// The same no larger than what is shown of it.
function reduced(canvas) {
  const scale = Math.min(1, SEEN / Math.max(canvas.width, canvas.height));
  const made = document.createElement("canvas");
  made.width = Math.max(1, Math.round(canvas.width * scale));
  made.height = Math.max(1, Math.round(canvas.height * scale));
  const context = made.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(canvas, 0, 0, made.width, made.height);
  return made;
}

// Decodes, stretches, predicts, brings the mask back, and shows it all.
async function open(blob, name) {
  const mine = ++newest,
    start = performance.now();
  fail("");
  byId("facade-time").textContent = `${name}: working`;
  try {
    const { canvas, width, height, pixels } = await decoded(blob, name);
    const { size, classes } = about,
      positions = size * size;
    const images = channelsFirst(toSize(pixels, width, height, size), positions);
    const { outputs, ms } = await predict(0, about.file, images, [1, 3, size, size]);
    const small = likeliest(outputs.logits.data, classes.length, positions);
    const mask = maskTo(small, size, width, height);
    if (mine !== newest) return; // another photo came in the meantime
    shown = { name, view: reduced(canvas), width, height, mask, small };
    works("facade");
    describe();
    draw();
    const all = performance.now() - start;
    byId("facade-time").textContent =
      `${name}, ${width}×${height}: ${all.toFixed(0)} ms in all, ` +
      `the network ${ms.toFixed(0)} ms on one thread of this machine`;
  } catch (error) {
    if (mine !== newest) return;
    fail(error.message);
    byId("facade-time").textContent = shown ? `still shown: ${shown.name}` : "no photo yet";
  }
}

// ---- what is seen ----

function seen() {
  return [...byId("legend").querySelectorAll("input")].map((box) => box.checked);
}

function draw() {
  const { view, small } = shown,
    { size, palette } = about,
    target = byId("photo"),
    visible = seen();
  const alpha = Math.round(2.55 * byId("opacity").value);
  const layer = new ImageData(size, size);
  small.forEach((c, i) => layer.data.set([...palette[c], visible[c] ? alpha : 0], 4 * i));
  const over = document.createElement("canvas");
  over.width = over.height = size;
  over.getContext("2d").putImageData(layer, 0, 0);
  [target.width, target.height] = [view.width, view.height];
  const context = target.getContext("2d");
  context.drawImage(view, 0, 0);
  context.imageSmoothingEnabled = false;
  context.drawImage(over, 0, 0, view.width, view.height);
  byId("opacity-value").textContent = `${byId("opacity").value} %`;
}

// The share of each class in the photo's pixels, beside the classes and in words.
function describe() {
  const counts = about.classes.map(() => 0);
  for (const c of shown.mask) counts[c]++;
  const shares = counts.map((count) => `${((100 * count) / shown.mask.length).toFixed(1)} %`);
  byId("legend")
    .querySelectorAll("output")
    .forEach((output, c) => {
      output.textContent = shares[c];
    });
  const words = about.classes.map((name, c) => `${name} ${shares[c]}`);
  byId("photo").setAttribute("aria-label", `${shown.name} and its mask: ${words.join(", ")}`);
  byId("download").disabled = false;
}

async function download() {
  const { name, mask, width, height } = shown;
  let blob;
  try {
    blob = await palettePng(mask, width, height, about.palette);
  } catch (error) {
    fail(`The mask cannot be written here: ${error.message}`);
    return;
  }
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = `${name.replace(/\.[^.]*$/, "")}.png`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

function listen() {
  const drop = byId("drop");
  for (const kind of ["dragover", "dragenter"]) {
    addEventListener(kind, (event) => {
      event.preventDefault();
      drop.classList.add("over");
    });
  }
  addEventListener("dragleave", () => drop.classList.remove("over"));
  addEventListener("drop", (event) => {
    event.preventDefault(); // or the browser would leave the page for the file
    drop.classList.remove("over");
    const file = event.dataTransfer.files[0];
    if (file) open(file, file.name);
  });
  byId("file").addEventListener("change", ({ target }) => {
    if (target.files[0]) open(target.files[0], target.files[0].name);
    target.value = ""; // so that the same file can be chosen again
  });
  byId("opacity").addEventListener("input", () => shown && draw());
  byId("legend").addEventListener("change", () => shown && draw());
  byId("download").addEventListener("click", download);
}

export async function startFacade(index) {
  about = index.files.find((file) => file.networks[0].kind === "facade");
  byId("side").textContent = about.size;
  byId("legend").innerHTML = about.classes
    .map(
      (name, c) => `<label><input type="checkbox" checked>
    <i style="background: rgb(${about.palette[c]})"></i> ${name} <output></output></label>`,
    )
    .join("");
  PHOTOS.forEach((path, i) => {
    const button = document.createElement("button");
    button.innerHTML = `<img src="${path}" alt="test photo ${i + 1}" width="72" height="72">`;
    button.addEventListener("click", () => take(path));
    byId("photos").append(button);
  });
  listen();
  // for the console, and for tests
  globalThis.probe = { ...globalThis.probe, facade: { shown: () => shown } };
  await prepare(0, about.file);
  if (!newest) await take(PHOTOS[0]);
}

async function take(path) {
  const mine = ++newest;
  try {
    const answer = await fetch(new URL(path, document.baseURI));
    const blob = await answer.blob();
    if (mine === newest) await open(blob, path.split("/").at(-1));
  } catch (error) {
    if (mine === newest) fail(`${path} cannot be had: ${error.message}`);
  }
}
