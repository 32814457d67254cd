"""Predict with an exported model: classes of images, or their masks. Needs no torch.

    python predict.py --model FILE.onnx IMAGES...        onnxruntime, NumPy and Pillow are enough

Classes are printed; masks become PNGs with the classes' palette, whose pixel value is the class.
Each image is stretched to the size that the network was trained at, as its training images were,
and its mask is brought back to the image's own size.
"""

import argparse
import io
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

from lab import cli
from lab.files import (BadInput, colours, mask_to, read_image, refuse_overwriting, to_size,
                       write_atomic)


def open_model(path: str) -> tuple[onnxruntime.InferenceSession, dict[str, str]]:
    """An .onnx file as a session, and what export.py says in it. BadInput for any other file."""
    onnxruntime.set_default_logger_severity(4)  # its errors arrive as exceptions
    try:
        content = Path(path).read_bytes()  # onnxruntime takes no file name that is no UTF-8
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        about = session.get_modelmeta().custom_metadata_map
        stride, channels = int(about["stride"]), len(about["mean"].split(","))
        if not (1 <= stride <= 64 and channels in (1, 3) and about["classes"].isprintable()):
            raise ValueError("its description is damaged")
        if "size" not in about:
            raise ValueError("it does not say the size it was trained at: export it anew")
        if not 1 <= int(about["size"]) <= 1 << 13 or int(about["size"]) % stride:
            raise ValueError("its size is damaged")
        named, gives = len(about["classes"].split(",")), session.get_outputs()[0].shape[1]
        if gives != named:
            raise ValueError(f"it gives {gives} classes and names {named}")
        palette = bytes.fromhex(about["palette"].replace(",", ""))
        if len(palette) not in (0, 3 * named) or about["input"] != session.get_inputs()[0].name:
            raise ValueError("its description is damaged")
    except Exception as error:  # onnxruntime raises its own kinds for a missing or damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadInput(f"{path} is no model that export.py made ({reason})") from error
    return session, about


def targets_of(images: list[str], out: str) -> list[Path]:
    """The file of each image's mask. BadInput where two would be one."""
    targets = {}
    for path in images:
        target = Path(out, f"{Path(path).stem}.png")
        if target in targets:
            raise BadInput(f"{path} and {targets[target]} would both write {target}; "
                           f"predict them into two --out")
        targets[target] = path
    return list(targets)


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(description=__doc__, allow_abbrev=False,
                        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="an .onnx file that export.py made")
    parser.add_argument("--out", default="predictions", help="folder of the masks (predictions)")
    parser.add_argument("images", nargs="+", help="image files of any size")
    args = parser.parse_args(argv)
    session, about = open_model(args.model)
    if "SYNTHETIC" in about.get("data", ""):
        print(f"NOTE: {args.model} was trained on {about['data']}", file=sys.stderr)
    classes, channels = about["classes"].split(","), len(about["mean"].split(","))
    palette = bytes.fromhex(about["palette"].replace(",", ""))
    targets = [None] * len(args.images)
    if palette:
        targets = targets_of(args.images, args.out)
        refuse_overwriting(targets, [args.model, *args.images], "--out")
    for path, target in zip(args.images, targets):
        image = colours(read_image(path), channels)
        batch = to_size(image, int(about["size"])).transpose(2, 0, 1)[None]
        logits = session.run(None, {about["input"]: batch})[0][0]
        if palette:
            mask = Image.fromarray(mask_to(logits.argmax(0).astype(np.uint8), *image.shape[:2]))
            mask.putpalette(palette)
            content = io.BytesIO()
            mask.save(content, format="PNG")
            target.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(target, content.getvalue())
            print(f"{path} -> {target}")
        else:
            odds = np.exp(logits - logits.max())
            print(f"{path}: {classes[odds.argmax()]} {100 * odds.max() / odds.sum():.1f} %")


if __name__ == "__main__":
    sys.exit(cli.guard(main))
