"""Pictures in every form that programs write, with the pixels a reader should find in them."""

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

import data
from lab import files

# of rows and columns, what each orientation tag asks for
TURNED = {1: lambda p: p, 2: lambda p: p[:, ::-1],
          3: lambda p: p[::-1, ::-1], 4: lambda p: p[::-1],
          5: lambda p: p.swapaxes(0, 1), 6: lambda p: p.swapaxes(0, 1)[:, ::-1],
          7: lambda p: p.swapaxes(0, 1)[::-1, ::-1], 8: lambda p: p.swapaxes(0, 1)[::-1]}


def png(values: np.ndarray, *chunks: tuple[bytes, bytes], interlaced: bool = False) -> bytes:
    """A PNG of values uint8 or uint16 (H, W, channels), in ways that Pillow does not write."""
    height, width, channels = values.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", width, height, 8 * values.itemsize, kind, 0, 0, interlaced)
    parts = [values]
    if interlaced:
        parts = [values[top::down, left::right] for top, left, down, right in files.ADAM7]
    rows = b"".join(b"\0" + row.astype(values.dtype.newbyteorder(">")).tobytes()
                    for part in parts if part.size for row in part)

    def chunk(name, body):
        checksum = zlib.crc32(name + body)
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", checksum)

    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunk(*one) for one in chunks)
            + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def exif(orientation: int, big: bool = False) -> bytes:
    """An EXIF block of this one tag, without its name."""
    pack = lambda form, *values: struct.pack((">" if big else "<") + form, *values)
    return ((b"MM" if big else b"II") + pack("HI", 42, 8)
            + pack("HHHIHHI", 1, 0x0112, 3, 1, orientation, 0, 0))


def xmp(orientation: int) -> str:
    return f'<x:xmpmeta><rdf:Description tiff:Orientation="{orientation}"/></x:xmpmeta>'


def luma(rgb: np.ndarray) -> np.ndarray:
    """ITU-R 601, in integers, rounded as Pillow does: uint8 (..., 3) -> (...)."""
    return ((rgb.astype(int) * (19595, 38470, 7471)).sum(-1) + 0x8000 >> 16).astype(np.uint8)


def every_kind(folder: Path, height: int, width: int) -> dict[Path, np.ndarray]:
    """Files that Python and C++ both read, and their right pixels, uint8 (H, W, 3)."""
    folder.mkdir(parents=True)
    rgb = data.synthetic_facade(3, max(height, width))[0][:height, :width]
    grey = luma(rgb)
    low = np.random.default_rng(0).integers(0, 256, rgb.shape, dtype=np.uint16)  # counts nowhere
    deep = rgb.astype(np.uint16) << 8 | low
    image, found = Image.fromarray(rgb), {}

    def save(name, right, picture=image, **how):
        picture.save(folder / name, **how)
        found[folder / name] = right

    def write(name, right, content):
        (folder / name).write_bytes(content)
        found[folder / name] = right

    three = lambda plane: np.repeat(plane[..., None], 3, 2)
    # PNG: depths, palettes, transparency, colour chunks, orientation
    save("rgb.png", rgb)
    write("interlaced.png", rgb, png(rgb, interlaced=True))
    save("grey.png", three(grey), Image.fromarray(grey))
    save("one-bit.png", three((grey > 99).astype(np.uint8) * 255), Image.fromarray(grey > 99))
    few = image.quantize(16)
    right = np.asarray(few.convert("RGB"))
    save("palette.png", right, few)
    save("palette-4-bits.png", right, few, bits=4)
    save("palette-alpha.png", right, few, transparency=bytes(range(0, 256, 16)))
    save("palette-key.png", right, few, transparency=3)
    alpha = Image.linear_gradient("L").resize((width, height))
    both = np.dstack([rgb, np.asarray(alpha)])
    save("alpha.png", rgb, Image.fromarray(both))
    save("grey-alpha.png", three(grey), Image.merge("LA", [Image.fromarray(grey), alpha]))
    save("key.png", rgb, transparency=tuple(int(value) for value in rgb[0, 0]))
    save("grey-key.png", three(grey), Image.fromarray(grey), transparency=int(grey[0, 0]))
    write("rgb16.png", rgb, png(deep))
    write("rgb16-interlaced.png", rgb, png(deep, interlaced=True))
    write("grey16.png", three(rgb[..., 0]), png(deep[..., :1]))
    write("grey16-alpha.png", three(rgb[..., 0]), png(deep[..., :2]))
    write("rgb16-alpha.png", rgb, png(np.dstack([deep, low[..., 0]])))
    gamma = (b"gAMA", struct.pack(">I", 55556)), (b"cHRM", struct.pack(">8I", *[30000] * 8))
    write("gamma.png", rgb, png(rgb, *gamma))
    write("gamma16.png", rgb, png(deep, *gamma))
    write("srgb.png", rgb, png(rgb, (b"sRGB", b"\0"), (b"gAMA", struct.pack(">I", 45455))))
    write("exif-chunk6.png", TURNED[6](rgb), png(rgb, (b"eXIf", exif(6))))
    text = PngImagePlugin.PngInfo()
    text.add_itxt("XML:com.adobe.xmp", xmp(8))
    save("xmp8.png", TURNED[8](rgb), pnginfo=text)
    text = PngImagePlugin.PngInfo()
    block = b"Exif\0\0" + exif(3)
    text.add_text("Raw profile type exif", f"\nexif\n{len(block):8}\n{block.hex()}\n", zip=True)
    save("raw3.png", TURNED[3](rgb), pnginfo=text)
    # JPEG: sampling, progression, orientation, inks
    for name, picture, how in (
            ("colour", image, {}), ("sharp", image, {"subsampling": 0}),
            ("low", image, {"quality": 20}), ("progressive", image, {"progressive": True}),
            ("half", image, {"subsampling": 1}), ("grey-jpeg", image.convert("L"), {}),
            ("cmyk", image.convert("CMYK"), {})):
        path = folder / f"{name}.jpg"
        picture.save(path, **how)
        found[path] = np.asarray(Image.open(path).convert("RGB"))
    colour = found[folder / "colour.jpg"]
    for orientation in range(1, 9):
        save(f"exif{orientation}.jpg", TURNED[orientation](colour),
             exif=b"Exif\0\0" + exif(orientation, big=orientation % 2 == 0))
    save("exif-of-9.jpg", colour, exif=b"Exif\0\0" + exif(9))
    save("exif-damaged.jpg", colour, exif=b"Exif\0\0" + exif(6)[:14])
    save("exif-of-no-tiff.jpg", colour, exif=b"Exif\0\0" + exif(6).replace(b"*", b","))
    content = (folder / "colour.jpg").read_bytes()
    packet = b"http://ns.adobe.com/xap/1.0/\0" + xmp(5).encode()
    packet = b"\xff\xe1" + struct.pack(">H", 2 + len(packet)) + packet
    write("xmp5.jpg", TURNED[5](colour), content[:2] + packet + content[2:])
    # PGM and PPM: comments, and other ranges than 255
    size = b"%d %d" % (width, height)
    write("comment.ppm", rgb, b"P6\n# GIMP\n#\n" + size + b" # and here\n255\n" + rgb.tobytes())
    write("comment-grey.pgm", three(grey), b"P5 #\n" + size + b"\n#\n255\n" + grey.tobytes())
    for top in (1, 100, 254, 256, 1000, 4095, 65535):
        kind, full, shift = ("u1", 255, 0) if top < 256 else (">u2", 65535, 8)
        values = ((rgb if top < 256 else deep).astype(int) % (top + 1)).astype(kind)
        right = (np.rint(values / top * full).astype(int) >> shift).astype(np.uint8)
        header = b"%s %d\n" % (size, top)
        write(f"up-to-{top}.ppm", right, b"P6 " + header + values.tobytes())
        plane = values[..., 2].tobytes()
        write(f"up-to-{top}-grey.pgm", three(right[..., 2]), b"P5 " + header + plane)
    save("name-\udcff\udce9.png", rgb, format="PNG")  # no UTF-8
    return found


def python_alone(folder: Path, height: int, width: int) -> dict[Path, np.ndarray]:
    """Files that Python reads and C++ refuses, and their right pixels, uint8 (H, W, 3)."""
    folder.mkdir(parents=True)
    rgb = data.synthetic_facade(3, max(height, width))[0][:height, :width]
    image, found = Image.fromarray(rgb), {}
    deep = rgb[..., 0].astype(np.uint16) << 8 | 0x9f
    three = lambda plane: np.repeat(plane[..., None], 3, 2)
    few = image.quantize(16)
    for name, right, picture, how in (
            ("rgb.tiff", rgb, image, {}), ("packed.tiff", rgb, image, {"compression": "tiff_lzw"}),
            ("deep.tiff", three(rgb[..., 0]), Image.fromarray(deep), {}),
            ("turned.tiff", TURNED[6](rgb), image, {"tiffinfo": {0x0112: 6}}),
            ("lossless.webp", rgb, image, {"lossless": True}),
            ("turned-webp.webp", TURNED[8](rgb), image,
             {"lossless": True, "exif": b"Exif\0\0" + exif(8)}),
            ("rgb-bmp.bmp", rgb, image, {}), ("few.gif", np.asarray(few.convert("RGB")), few, {})):
        picture.save(folder / name, **how)
        found[folder / name] = right
    size, digits = f"{width} {height}\n".encode(), " ".join(map(str, rgb.ravel())).encode()
    (folder / "text.ppm").write_bytes(b"P3\n# by hand\n" + size + b"255\n" + digits + b"\n")
    found[folder / "text.ppm"] = rgb
    return found
