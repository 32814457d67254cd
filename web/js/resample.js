// Pillow's antialiased bilinear resampling, to the same bytes, and masks back to a photo's size:
// lab/files.py's to_size and mask_to. No DOM in here.

const BITS = 22; // of a coefficient's fraction, as in Pillow's Resample.c: 32 - 8 - 2

// For each new position: the first old one that counts, and the weights from there on, integers.
function coefficients(from, to) {
  const scale = from / to,
    support = Math.max(scale, 1);
  return Array.from({ length: to }, (_, i) => {
    const centre = (i + 0.5) * scale;
    const first = Math.max(Math.trunc(centre - support + 0.5), 0);
    const end = Math.min(Math.trunc(centre + support + 0.5), from);
    const weights = [];
    for (let k = first; k < end; k++) {
      weights.push(Math.max(0, 1 - Math.abs((k - centre + 0.5) * (1 / support))));
    }
    const sum = weights.reduce((a, b) => a + b, 0);
    return { first, weights: weights.map((w) => Math.trunc(0.5 + (w / sum) * 2 ** BITS)) };
  });
}

// pixels: bytes (height, width, 4), of which the first three of each pixel count.
// Returns RGB bytes (size, size, 3): columns first, then rows, rounded to bytes in between.
export function toSize(pixels, width, height, size) {
  let across = new Uint8ClampedArray(height * size * 3);
  const half = 2 ** (BITS - 1);
  const columns = coefficients(width, size);
  for (let row = 0; row < height; row++) {
    for (let column = 0; column < size; column++) {
      const { first, weights } = columns[column];
      for (let channel = 0; channel < 3; channel++) {
        let sum = half,
          at = (row * width + first) * 4 + channel;
        for (const weight of weights) {
          sum += pixels[at] * weight;
          at += 4;
        }
        across[(row * size + column) * 3 + channel] = sum >> BITS;
      }
    }
  }
  const result = new Uint8ClampedArray(size * size * 3),
    stride = size * 3;
  coefficients(height, size).forEach(({ first, weights }, row) => {
    for (let i = 0; i < stride; i++) {
      let sum = half,
        at = first * stride + i;
      for (const weight of weights) {
        sum += across[at] * weight;
        at += stride;
      }
      result[row * stride + i] = sum >> BITS;
    }
  });
  return result;
}

// Logits (classes, size, size) of a network as the likeliest class of each position.
export function likeliest(logits, classes, positions) {
  const mask = new Uint8Array(positions);
  for (let i = 0; i < positions; i++) {
    for (let c = 1; c < classes; c++) {
      if (logits[c * positions + i] > logits[mask[i] * positions + i]) mask[i] = c;
    }
  }
  return mask;
}

// Classes (size, size) -> (height, width): a pixel takes that of the one where its centre lies.
export function maskTo(mask, size, width, height) {
  const result = new Uint8Array(width * height);
  const nearest = (i, to) => Math.floor(((2 * i + 1) * size) / (2 * to));
  const columns = Array.from({ length: width }, (_, i) => nearest(i, width));
  for (let row = 0; row < height; row++) {
    const from = nearest(row, height) * size,
      to = row * width;
    for (let column = 0; column < width; column++)
      result[to + column] = mask[from + columns[column]];
  }
  return result;
}

// (size, size, 3) -> (3, size, size), as the networks take it.
export function channelsFirst(pixels, positions) {
  const result = new Uint8Array(3 * positions);
  for (let i = 0; i < positions; i++) {
    for (let c = 0; c < 3; c++) result[c * positions + i] = pixels[3 * i + c];
  }
  return result;
}
