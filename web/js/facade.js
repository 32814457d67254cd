// The second part: a photo of a facade, and over it what the network makes of each pixel.

import { predict, prepare } from "./nets.js";
import { palettePng } from "./png.js";
import { channelsFirst, likeliest, maskTo, toSize } from "./resample.js";

export const PHOTOS = ["0057", "0024", "0035", "0044", "0031", "0046"].map(
  (number) => `images/facades/eecs442_${number}.jpg`,
);
const LIMIT = 1 << 26; // pixels, as in lab/files.py
const byId = (id) => document.getElementById(id);

let about; // the network's entry in the index
let shown = null; // {name, bitmap, width, height, mask}
let newest = 0;

function fail(message) {
  byId("facade-error").textContent = message;
  byId("facade-error").hidden = !message;
}

// The pixels of a file, upright, without colour profile, as predict.py reads it.
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
    shown = { name, canvas, width, height, mask };
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
  const { canvas, width, height, mask } = shown,
    target = byId("photo");
  const alpha = 2.55 * byId("opacity").value,
    visible = seen();
  [target.width, target.height] = [width, height];
  const layer = new ImageData(width, height),
    counts = about.classes.map(() => 0);
  const values = new Uint32Array(layer.data.buffer); // little-endian: alpha, blue, green, red
  const colours = about.palette.map(
    ([r, g, b], c) => (((visible[c] ? alpha : 0) << 24) | (b << 16) | (g << 8) | r) >>> 0,
  );
  for (let i = 0; i < mask.length; i++) {
    values[i] = colours[mask[i]];
    counts[mask[i]]++;
  }
  const over = document.createElement("canvas");
  [over.width, over.height] = [width, height];
  over.getContext("2d").putImageData(layer, 0, 0);
  const context = target.getContext("2d");
  context.drawImage(canvas, 0, 0);
  context.drawImage(over, 0, 0);
  byId("legend")
    .querySelectorAll("output")
    .forEach((output, c) => {
      output.textContent = `${((100 * counts[c]) / mask.length).toFixed(1)} %`;
    });
  byId("opacity-value").textContent = `${byId("opacity").value} %`;
  byId("download").disabled = false;
}

async function download() {
  const blob = await palettePng(shown.mask, shown.width, shown.height, about.palette);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = `${shown.name.replace(/\.[^.]*$/, "")}.png`;
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
  await prepare(0, about.file);
  // for the console, and for tests
  globalThis.probe = { ...globalThis.probe, facade: { shown: () => shown } };
  if (!newest) await take(PHOTOS[0]);
}

async function take(path) {
  try {
    const answer = await fetch(new URL(path, document.baseURI));
    await open(await answer.blob(), path.split("/").at(-1));
  } catch (error) {
    fail(`${path} cannot be had: ${error.message}`);
  }
}
