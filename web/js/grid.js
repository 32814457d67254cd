// A grid of one garment and three digits, 56x56 bytes, as data.py's composites; no DOM in here.

export const CELL = 28,
  SIDE = 2 * CELL;

// Where the digits lie when the garment's home is `cell`: the one whose place it takes moves into
// the first cell. Cells are numbered by rows; returns the digit (0-2) of each cell, -1 for the
// garment.
export function layout(cell) {
  const cells = [-1, 0, 1, 2];
  [cells[0], cells[cell]] = [cells[cell], cells[0]];
  return cells;
}

// The cell that holds most of a garment whose corner is at (x, y).
export const homeOf = (x, y) => (x >= CELL / 2 ? 1 : 0) + (y >= CELL / 2 ? 2 : 0);

// A garment at (x, y) in [0, 28] over its digits; where two meet the lighter pixel is seen, so
// that nothing is cut. Then the whole grid is rolled by `roll` = [right, down] around its borders.
export function compose(garment, digits, x, y, roll = [0, 0]) {
  const grid = new Uint8Array(SIDE * SIDE);
  const paste = (tile, left, top) => {
    for (let row = 0; row < CELL; row++) {
      for (let column = 0; column < CELL; column++) {
        const to = (top + row) * SIDE + left + column;
        grid[to] = Math.max(grid[to], tile[row * CELL + column]);
      }
    }
  };
  layout(homeOf(x, y)).forEach((digit, cell) => {
    if (digit >= 0) paste(digits[digit], (cell % 2) * CELL, (cell >> 1) * CELL);
  });
  paste(garment, x, y);
  return rolled(grid, ...roll);
}

// A position on the grid, whose borders meet.
export const wrap = (value) => ((value % SIDE) + SIDE) % SIDE;

export function rolled(grid, right, down) {
  const result = new Uint8Array(grid.length);
  for (let row = 0; row < SIDE; row++) {
    for (let column = 0; column < SIDE; column++) {
      result[wrap(row + down) * SIDE + wrap(column + right)] = grid[row * SIDE + column];
    }
  }
  return result;
}

// Both halvings keep one position in two: moves by a multiple of this move features by whole ones.
const STRIDE = 4;
export const isWhole = (x, y, roll) =>
  (x + roll[0]) % STRIDE === 0 && (y + roll[1]) % STRIDE === 0;

export function softmax(logits) {
  const most = Math.max(...logits);
  const odds = Array.from(logits, (value) => Math.exp(value - most));
  const sum = odds.reduce((a, b) => a + b, 0);
  return odds.map((value) => value / sum);
}
