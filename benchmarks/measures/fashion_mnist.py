"""Fashion-MNIST (Xiao et al., 2017, arXiv 1708.07747; MIT licence) as the bundled model was trained on it.

The data set is four gzipped idx files: a magic number that gives the element type and the number of axes,
the axes as big-endian 32-bit integers, then the bytes.
"""

from __future__ import annotations

import gzip
import math
import struct
from pathlib import Path

import numpy as np
from torch import Tensor, from_numpy, nn

__all__ = ["CLASSES", "DATA", "load_fashion_mnist", "read_idx"]

#: Where Debian's package puts the files.
DATA = Path("/usr/share/datasets/fashion-mnist")
CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
#: The names of the files, by split.
PREFIXES = {"train": "train", "test": "t10k"}
#: Element type in the third byte of the magic number: unsigned bytes, all that this data set uses.
UNSIGNED_BYTE = 0x08
#: 28x28 becomes 32x32.
PADDING = 2


def load_fashion_mnist(split: str, folder: str | Path = DATA) -> tuple[Tensor, Tensor]:
    """Read one split.

    Args:
        split: ``"train"`` (60,000 images) or ``"test"`` (10,000).
        folder: Holds the ``*.gz`` idx files.

    Returns:
        Images, float32 ``[N, 1, 32, 32]`` in [-1, 1], padded with black; and labels, int64 ``[N]``.

    Raises:
        FileNotFoundError: A file is missing; the message says how to install it.
        ValueError: There is no such split, or a file is damaged.
    """
    if split not in PREFIXES:
        msg = f"split={split!r} is not one of {', '.join(map(repr, PREFIXES))}"
        raise ValueError(msg)
    folder = Path(folder)
    images_file = folder / f"{PREFIXES[split]}-images-idx3-ubyte.gz"
    labels_file = folder / f"{PREFIXES[split]}-labels-idx1-ubyte.gz"
    for file in (images_file, labels_file):
        if not file.is_file():
            msg = f"{file} is missing: run `apt-get install dataset-fashion-mnist`, or name the folder of the idx files"
            raise FileNotFoundError(msg)
    raw, labels = read_idx(images_file), read_idx(labels_file)
    if raw.ndim != 3 or labels.ndim != 1 or len(raw) != len(labels):
        msg = f"{images_file} is {list(raw.shape)} and {labels_file} {list(labels.shape)}: not images and their labels"
        raise ValueError(msg)
    images = raw.float().div_(127.5).sub_(1.0).unsqueeze(1)
    return nn.functional.pad(images, (PADDING,) * 4, value=-1.0), labels.long()


def read_idx(path: str | Path) -> Tensor:
    """Read a gzipped idx file of unsigned bytes.

    Returns:
        uint8, in the shape that the header gives.

    Raises:
        ValueError: It is no such file, or is cut off.
    """
    try:
        content = gzip.decompress(Path(path).read_bytes())
    except (gzip.BadGzipFile, EOFError) as error:
        msg = f"{path} is not a whole gzip file ({error})"
        raise ValueError(msg) from error
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != UNSIGNED_BYTE:
        msg = f"{path} is not an idx file of unsigned bytes: it begins with {content[:4].hex() or 'nothing'}"
        raise ValueError(msg)
    axes = content[3]
    header = 4 + 4 * axes
    if len(content) < header:
        msg = f"{path} ends within its header"
        raise ValueError(msg)
    shape = struct.unpack(f">{axes}I", content[4:header])
    if len(content) - header != math.prod(shape):
        msg = f"{path} holds {len(content) - header} bytes, but its header promises {list(shape)}"
        raise ValueError(msg)
    return from_numpy(np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy())
