// Pixels onto canvases: grids, class activation maps, bars.

import { SIDE } from "./grid.js";

const FOR = [230, 120, 0],
  AGAINST = [70, 160, 240]; // told apart by every kind of colour vision

// The grey tiles of a picture, row by row: bytes (side, side) each.
export async function tilesOf(path, side) {
  const picture = new Image();
  picture.src = new URL(path, document.baseURI).href;
  await picture.decode();
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [picture.naturalWidth, picture.naturalHeight];
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(picture, 0, 0);
  const tiles = [];
  for (let top = 0; top < canvas.height; top += side) {
    for (let left = 0; left < canvas.width; left += side) {
      const { data } = context.getImageData(left, top, side, side);
      tiles.push(Uint8Array.from({ length: side * side }, (_, i) => data[4 * i]));
    }
  }
  return tiles;
}

function imageOf(grid, side) {
  const image = new ImageData(side, side);
  grid.forEach((value, i) => image.data.set([value, value, value, 255], 4 * i));
  return image;
}

export function drawGrid(canvas, grid, side = SIDE) {
  canvas.getContext("2d").putImageData(imageOf(grid, side), 0, 0);
}

const small = Object.assign(document.createElement("canvas"), { width: SIDE, height: SIDE });
const patch = document.createElement("canvas");

// The grid, and over it one class's map, scaled alone; maps: float32 (classes, side, side).
export function drawMap(canvas, grid, maps, side, of) {
  const context = canvas.getContext("2d"),
    { width } = canvas;
  const positions = side * side;
  const map = maps.subarray(of * positions, (of + 1) * positions);
  const most = map.reduce((a, b) => Math.max(a, Math.abs(b)), 1e-12);
  drawGrid(small, grid);
  context.imageSmoothingEnabled = false;
  context.globalAlpha = 1;
  context.drawImage(small, 0, 0, width, width);
  patch.width = patch.height = side;
  const image = new ImageData(side, side);
  map.forEach((value, i) =>
    image.data.set(
      [...(value > 0 ? FOR : AGAINST), 215 * Math.min(1, Math.abs(value) / most)],
      4 * i,
    ),
  );
  patch.getContext("2d").putImageData(image, 0, 0);
  context.imageSmoothingEnabled = true;
  context.drawImage(patch, 0, 0, width, width);
}

// Ten rows of <li><i></i><span>label</span><b>number</b></li>.
export function drawBars(list, probabilities, truth) {
  const said = probabilities.indexOf(Math.max(...probabilities));
  [...list.children].forEach((row, i) => {
    row.firstChild.style.width = `${100 * probabilities[i]}%`;
    row.lastChild.textContent = (100 * probabilities[i]).toFixed(0);
    row.className = (i === truth ? "truth" : "") + (i === said ? " said" : "");
  });
}
