"""IDX, the format of MNIST and of sets in its likeness: arrays of bytes behind a small header."""

import numpy as np
import torch
from torch import Tensor


def parse(content: bytes) -> Tensor:
    """The array in an IDX file's content, uint8. ValueError for anything else."""
    if content[:3] != b"\0\0\x08" or len(content) < 4:
        raise ValueError("it holds an IDX file of another type than bytes")
    shape = np.frombuffer(content, ">u4", content[3], 4)
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)
    return torch.from_numpy(values.copy())
