"""Arrow arrays made without `pa.array`: that imports pandas, where it is installed, only to ask whether what it was
given is of pandas, which takes 0.2 s of the first store of a process."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from logra_kernels.store.native import pack_strings, packs_strings

_MOST_BYTES = (1 << 31) - 1  # of the strings in one array


def strings(values: Sequence[str]) -> pa.Array:
    """What `pa.array` makes of them.

    Raises:
        TypeError: One is no str.
        UnicodeEncodeError: One is not to be had in UTF-8.
    """
    offsets = np.zeros(len(values) + 1, np.int32)
    data = pack_strings(list(values), offsets) if packs_strings() else _joined(values, offsets)
    if data is None:
        return pa.array(values, pa.string())
    return pa.StringArray.from_buffers(len(values), pa.py_buffer(offsets), pa.py_buffer(data), null_count=0)


def _joined(values: Sequence[str], offsets: np.ndarray) -> bytes | None:
    """`native.pack_strings`, slower."""
    whole = "".join(values)
    data = whole.encode()
    if len(data) > _MOST_BYTES:
        return None
    plain = len(data) == len(whole)  # ASCII
    lengths = map(len, values) if plain else (len(value.encode()) for value in values)
    np.cumsum(np.fromiter(lengths, np.int64, len(values)), out=offsets[1:])
    return data


def integers(values: Tensor) -> pa.Array:
    """Whole numbers [n] of any device as int64."""
    held = values.detach().to("cpu", torch.int64).contiguous().numpy()
    return pa.Array.from_buffers(pa.int64(), len(held), [None, pa.py_buffer(held)], null_count=0)


def others(column: pa.ChunkedArray, lines: Tensor) -> list:
    """The column's values but for those at `lines`, int64."""
    left = torch.ones(len(column), dtype=torch.bool, device="cpu")
    left[lines] = False
    return column.take(integers(left.nonzero().flatten())).to_pylist()
