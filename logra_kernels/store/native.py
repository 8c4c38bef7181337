"""The C++ helpers of the store. Without them everything works, page by page and slower."""

import os
from collections.abc import Callable, Sequence
from functools import cache, partial
from types import ModuleType

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from logra_kernels.ops import RowFormat
from logra_kernels.ops._dispatch import is_native
from logra_kernels.ops._native import DTYPE_CODE, matrix

READERS = 8  # threads that bring a file in; more than there are cores, since each waits for the disk

LONG = 1 << 19  # numbers of an append that is worth several threads

_QUANTIZED = (torch.float32, torch.bfloat16, torch.float16)


@cache
def _library() -> ModuleType | None:
    """The native library, loaded at its first use; None where it is not built."""
    try:
        from logra_kernels import _C
    except ImportError:
        return None
    return _C


def takes_rows(rows: Tensor, dtype: torch.dtype) -> bool:
    """Whether `take_rows` can be called."""
    plain = rows.device.type == "cpu" and rows.dtype == torch.float32 and rows.stride(1) == 1
    return plain and dtype in (torch.float32, torch.bfloat16) and _library() is not None


def take_rows(rows: Tensor, dtype: torch.dtype, pieces: Sequence[np.ndarray]) -> bool:
    """Copy fp32 rows [n, D] into pieces of memory as fp32 or bf16; whether every number of it is finite. One pass of
    one thread: on all threads, they would wait for the one that the store's writer has displaced."""
    library = _library()
    assert library is not None
    return library.take_rows(rows.data_ptr(), rows.stride(0), _ranges(pieces), DTYPE_CODE[dtype], *rows.shape)


def largest_magnitude(rows: Tensor) -> Tensor:
    """Of rows [n, D], n > 0; NaN if there is one. fp32 rows are looked at by one thread: where all were, the others
    would go on spinning for milliseconds, on the processors that write the store."""
    library = _library()
    if library is None or not takes_rows(rows, torch.float32):
        return torch.stack(torch.aminmax(rows)).abs().amax()
    return torch.tensor(library.largest_magnitude(rows.data_ptr(), rows.stride(0), *rows.shape), device="cpu")


def quantizes_rows(rows: Tensor) -> bool:
    """Whether `quantize_rows` can be called."""
    return rows.device.type == "cpu" and rows.dtype in _QUANTIZED and is_native("quantize_rows")


def quantizing_threads(rows: Tensor) -> int:
    """How many threads encode an append. The store's writer is left one; and after a few rows the others would only go
    on spinning, where it has work to do."""
    return max(1, torch.get_num_threads() - 1) if rows.numel() >= LONG else 1


def quantize_rows(rows: Tensor, form: RowFormat, codes: np.ndarray, scales: np.ndarray, threads: int) -> bool:
    """Encode rows [n, D] into memory as `ops.quantize_rows` does; whether every block has a scale."""
    library = _library()
    assert library is not None
    half = form.scale == "fp16"
    at = codes.ctypes.data, scales.ctypes.data
    return library.quantize_rows(matrix(rows), *at, *rows.shape, form.code, half, form.block, False, 0, 0, threads)


def _ranges(pieces: Sequence[np.ndarray]) -> list[tuple[int, int]]:
    return [(piece.ctypes.data, len(piece)) for piece in pieces]


def gather(parts: Sequence[np.ndarray], out: np.ndarray) -> int:
    """Copy arrays of bytes one after the other; how many bytes they have. One call, because each that lets the
    interpreter go may have to wait for it afterwards."""
    library = _library()
    if library is not None:
        return library.gather(_ranges(parts), out.ctypes.data, len(out))
    count = 0
    for part in parts:
        np.copyto(out[count : count + len(part)], part)
        count += len(part)
    return count


def packs_strings() -> bool:
    """Whether `pack_strings` can be called."""
    return _library() is not None


def pack_strings(strings: list[str], offsets: np.ndarray) -> bytes | None:
    """Their UTF-8 bytes one after the other, and n + 1 int32 offsets; None when these are too many for that.

    Raises:
        TypeError: One is no str.
        UnicodeEncodeError: One is not to be had in UTF-8.
    """
    library = _library()
    assert library is not None
    return library.pack_strings(strings, offsets.ctypes.data, len(offsets))


def has_places() -> bool:
    """Whether `NativePlaces` can be made."""
    return _library() is not None


class NativePlaces:
    """`ids.Places` in C++."""

    def __init__(self) -> None:
        library = _library()
        assert library is not None
        self._table = library.IdTable()
        self.add = self._table.add
        self.drop = self._table.drop

    def __len__(self) -> int:
        return len(self._table)

    def find(self, ids: list[str]) -> np.ndarray:
        places = np.empty(len(ids), np.int64)
        self._table.find(ids, places.ctypes.data, len(places))
        return places

    def add_arrow(self, ids: pa.Array) -> int:
        return self._table.add_arrow(*_strings_at(ids)) if len(ids) else -1

    def add_new(self, ids: pa.Array) -> np.ndarray:
        new = np.empty(len(ids), np.bool_)
        if len(ids):
            self._table.add_new(*_strings_at(ids), new.ctypes.data)
        return new


def _strings_at(ids: pa.Array) -> tuple[int, int, int]:
    """Where Arrow has its offsets, its bytes, and how many they are."""
    _, offsets, data = ids.buffers()
    return offsets.address + 4 * ids.offset, data.address if data else 0, len(ids)


def has_writes() -> bool:
    """Whether `NativeWrites` can be made."""
    return _library() is not None


class NativeWrites:
    """`disk.Writes` in C++, in a thread of its own."""

    def __init__(self) -> None:
        library = _library()
        assert library is not None
        self._writes = library.Writes()

    def begin(self, fd: int, data: np.ndarray, offset: int) -> Callable[[], None]:
        return partial(self._finish, self._writes.add(fd, data.ctypes.data, len(data), offset), data)

    def _finish(self, number: int, data: np.ndarray) -> None:
        """`data` is held until then."""
        error = self._writes.wait(number)
        if error:
            raise OSError(error, os.strerror(error))


def populate(pages: np.ndarray) -> None:
    """Return once a mapped file's bytes are in memory and in the page table, in huge pages where there are any.

    Raises:
        OSError: The disk cannot read them.
    """
    library = _library()
    error = library.populate(pages.ctypes.data, len(pages), READERS) if library is not None else 0
    if error:
        raise OSError(error, os.strerror(error))


def resident(pages: np.ndarray) -> bool:
    """Whether a sample of a mapped file's bytes is in memory; taken for granted where nobody can tell."""
    library = _library()
    return library is None or library.resident(pages.ctypes.data, len(pages))


def let_go(pages: np.ndarray) -> None:
    """Take a mapped file's bytes out of the page table; they stay valid."""
    library = _library()
    if library is not None:
        library.let_go(pages.ctypes.data, len(pages))
