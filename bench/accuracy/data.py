"""The studies' data, as normalised fp32 rows."""

import gzip
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .setting import Setting


@dataclass(frozen=True)
class Data:
    """x [N, d_in] fp32, positions side by side, and y [N] int64 of the training rows, and of the queries."""

    x: Tensor
    y: Tensor
    query_x: Tensor
    query_y: Tensor


def load(setting: Setting) -> Data:
    """The first `train` rows and the first `queries` rows after them (digits, patches) or of the test split (fmnist).

    Raises:
        FileNotFoundError: fmnist without its four IDX files under `$LOGRA_DATA/fashion-mnist`.
    """
    if setting.study in ("digits", "patches"):
        from sklearn.datasets import load_digits

        bunch = load_digits()
        order = np.random.Generator(np.random.PCG64(0)).permutation(len(bunch.target))  # the file is sorted by writer
        x = torch.from_numpy(bunch.data[order].astype(np.float32)) / 16
        y = torch.from_numpy(bunch.target[order].astype(np.int64))
        x = (x - x.mean()) / x.std()
        if setting.study == "patches":
            x = F.unfold(x.view(-1, 1, 8, 8), 4, stride=2).transpose(1, 2).flatten(1)
        end = setting.train + setting.queries
        return Data(x[: setting.train], y[: setting.train], x[setting.train : end], y[setting.train : end])
    if "LOGRA_DATA" not in os.environ:
        raise FileNotFoundError("accuracy: set LOGRA_DATA to a folder with fashion-mnist/train-images-idx3-ubyte.gz")
    folder = Path(os.environ["LOGRA_DATA"]) / "fashion-mnist"
    parts = []
    for split, count in (("train", setting.train), ("t10k", setting.queries)):
        image = read_idx(folder / f"{split}-images-idx3-ubyte.gz")[:count].reshape(count, -1).astype(np.float32)
        parts.append(torch.from_numpy((image / 255 - 0.2860) / 0.3530))
        parts.append(torch.from_numpy(read_idx(folder / f"{split}-labels-idx1-ubyte.gz")[:count].astype(np.int64)))
    return Data(*parts)


def read_idx(path: Path) -> np.ndarray:
    """A gzipped IDX file of bytes."""
    raw = gzip.decompress(path.read_bytes())
    axes = raw[3]
    shape = np.frombuffer(raw, ">u4", axes, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape)
