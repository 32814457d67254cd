"""Drawn facades with exact masks, for where no photographs are at hand, and for tests."""

import hashlib

import numpy as np
import torch
from torch import Tensor

from lab.folders import stretched

OTHERS, WALL, PILLAR, WINDOW, BALCONY = range(5)


def synthetic_facade(index: int, size: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """Draw synthetic (not photographed) facade `index`; equal arguments give equal bytes.

    Returns an RGB image, uint8 (size, size, 3), and its exact class mask, uint8 (size, size):
    0 others, 1 facade, 2 pillar, 3 window, 4 balcony.
    """
    pick = np.random.default_rng(index).integers
    # Grain has a stream of its own, so that an index has one layout at every size.
    grain = np.random.default_rng([index, size]).integers(-6, 7, (size, size))
    image, mask = np.zeros((size, size, 3), np.int16), np.zeros((size, size), np.uint8)
    # Lengths are integer thousandths of the side: no platform rounds them differently.
    down, across = (axis * 1000 // size for axis in np.ogrid[:size, :size])

    def tint(low, high, cast=12):
        return pick(low, high) + pick(-cast, cast + 1, 3)

    def paint(colour, label, *edges):  # None keeps the pixels; returns the view, its own axes
        x0, y0, x1, y1 = (min(max(int(edge), 0), 1000) * size // 1000 for edge in edges)
        where = slice(y0, max(y1, y0 + 1)), slice(x0, max(x1, x0 + 1))
        image[where], mask[where] = image[where] if colour is None else colour, label
        return image[where], down[: max(y1 - y0, 1)], across[:, : max(x1 - x0, 1)]

    # A palette per image: a class may be darker or lighter than the wall, none owns a colour.
    wall = tint(85, 205) + pick(0, 35) * np.array((1, 0, -1))
    trim, stone, slab, side = (wall + tint(-45, 50) for _ in range(4))
    glass, frame, blind, iron = tint(25, 150, 20), tint(40, 235), tint(80, 220, 30), tint(20, 110)
    top, base = pick(40, 265) * (pick(0, 9) < 5), 1000 - pick(60, 255) * (pick(0, 9) < 5)
    left, right = pick(30, 180) * (pick(0, 9) < 3), 1000 - pick(30, 180) * (pick(0, 9) < 3)
    floors, columns, panes, rim = pick(2, 7), pick(2, 7), pick(1, 4), pick(3, 14)
    wide, high = (right - left) // columns, (base - top) // floors
    w, h, sill = wide * pick(34, 56) // 100, high * pick(48, 66) // 100, high // 10
    xs = [left + wide * i + (wide - w) // 2 for i in range(columns)]
    ys = [top + high * i + (high - h) // 2 for i in range(floors)]
    image[:] = tint(150, 225, 18) + down[..., None] // 25  # sky, paler towards the ground
    paint(side, OTHERS, 0, top + 40, 1000, base)  # the neighbours' blind walls
    front, y_in, _ = paint(wall, WALL, left, top, right, base)
    front[y_in[:, 0] % pick(20, 60) < 5] -= pick(0, 25)  # joints of brick or ashlar
    for x, y in ((x, y) for y in ys for x in xs):
        paint(trim, OTHERS, x - rim, y - rim, x + w + rim, y + h)
        paint(trim, OTHERS, x - w // 6, y + h, x + w + w // 6, y + h + sill)
        paint(frame, WINDOW, x, y, x + w, y + h)
        shade, inner = pick(-20, 25), (x + 6, y + 6, x + w - 6, y + h - 6)
        pane, y_in, x_in = paint(glass + shade, WINDOW, *inner)
        pane[(x_in + y_in) % h < h // 3] += 28  # a slanting reflection
        pane[y_in[:, 0] * 10 < h * pick(-24, 9)] = blind + shade  # most blinds are up
        pane[(x_in * panes * 8 // w % 8 == 7) | (y_in * 12 // h == 3)] = frame
    if pick(0, 100) < 54:  # pilasters with a shaded side and a capital
        half = (wide - w) * pick(2, 7) // 100 + 3
        for x in range(left + half, right, (right - left - 2 * half) // columns * pick(1, 3)):
            shaft, _, x_in = paint(stone, PILLAR, x - half, top, x + half, base)
            shaft[:, x_in[0] > half] -= 30
            paint(stone, PILLAR, x - half - 6, top, x + half + 6, top + 80)
    if pick(0, 100) < 46:  # balconies: solid parapets, or bars with the front behind them
        body, deep, out = (None, slab)[pick(0, 4) // 3], h * pick(30, 50) // 100, pick(8, 50)
        for x, y in ((x, y) for y in ys[pick(0, 2) :: pick(1, 3)] for x in xs[:: pick(1, 3)]):
            rail, y_in, x_in = paint(body, BALCONY, x - out, y + h - deep, x + w + out, y + h)
            rail[(x_in % 16 < 4) | (y_in < 8)] = iron
            paint(slab, BALCONY, x - out, y + h, x + w + out, y + h + sill)
    paint(trim, OTHERS, left - 15, top, right + 15, top + pick(10, 60))  # cornice
    if base < 1000:  # shop fronts down to the ground
        shop, y_in, x_in = paint(tint(50, 170, 25), OTHERS, 0, base, 1000, 1000)
        shop[(y_in > 15) & (x_in % 160 > 40)] = glass
    for x, y in (pick(0, 1000), pick(650, 1000)) + pick(-80, 81, (20 * (pick(0, 4) == 0), 2)):
        tuft = (across - x) ** 2 + (down - y) ** 2 < pick(25, 75) ** 2  # a tree in one of four
        image[tuft], mask[tuft] = tint(55, 75, 8) + (0, 25, -15) + 4 * grain[tuft][:, None], OTHERS
    light = (across * pick(-40, 41) + down * pick(-40, 41)) // 1000 + grain * (1 + (mask == WALL))
    return np.clip(image + light[..., None], 0, 255).astype(np.uint8), mask


def drawn_splits(counts: tuple[int, int], size: int) -> tuple[list[tuple[Tensor, Tensor]], str]:
    """So many facades for training and for testing: images and masks, see `folders.stretched`.

    And the sha256 of all of them as they are drawn, before they are brought to the size.
    """
    drawn = [synthetic_facade(i) for i in range(sum(counts))]
    parts = []
    for part in (drawn[:counts[0]], drawn[counts[0]:]):
        images, masks = (torch.from_numpy(np.stack(arrays)) for arrays in zip(*part))
        parts.append((images.permute(0, 3, 1, 2), masks))
    content = hashlib.sha256()
    for array in (array for part in parts for array in part):
        content.update(array.numpy().tobytes())
    return [stretched(*part, size) for part in parts], content.hexdigest()
