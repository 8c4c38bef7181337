"""safetensors files with a fixed byte order: written from buffers, read as a mapping.

The safetensors library writes the header's metadata in an order that changes from call to call; equal tensors must give
equal bytes here, so the header is written by this file. Any safetensors reader can read the result.
"""

import json
import mmap
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from logra_kernels.store.durable import ZEROS, seal

TAGS = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.bool: "BOOL",
}
DTYPES = {tag: dtype for dtype, tag in TAGS.items()}
ALIGNMENT = 64  # of the first tensor in the file, so that a mapped block starts on a cache line

_BEFORE_CHECKSUM = b'{"__metadata__":{"checksum":"'
CHECKSUM_AT = 8 + len(_BEFORE_CHECKSUM)


@dataclass(frozen=True)
class Spec:
    """One tensor of a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not copied."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def header(specs: Mapping[str, Spec], metadata: Mapping[str, str], checksum: str = ZEROS.decode()) -> bytes:
    """Length and JSON header of a file that holds the tensors one after the other in the given order."""
    entries = {}
    offset = 0
    for name, spec in specs.items():
        stop = offset + spec.nbytes
        entries[name] = {"dtype": TAGS[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, stop]}
        offset = stop
    table = {"__metadata__": {"checksum": checksum, **dict(sorted(metadata.items()))}, **entries}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def sealed_file(
    specs: Mapping[str, Spec], metadata: Mapping[str, str], payload: Sequence[memoryview]
) -> tuple[list, str]:
    """The buffers to write, and the checksum that the header carries. `payload` holds the tensors' bytes in order."""
    head, checksum = seal(header(specs, metadata), CHECKSUM_AT, *payload)
    return [head, *payload], checksum


def map_file(path: Path, at_least: int = 1) -> mmap.mmap:
    """Map a file privately: writing to it changes the caller's pages and never the file.

    Raises:
        OSError: It cannot be opened.
        ValueError: It is shorter than `at_least` bytes.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size
        if size < at_least:
            raise ValueError(f"{size} bytes long where {at_least} are expected")
        return mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    finally:
        os.close(fd)


def parse_header(data: memoryview) -> tuple[dict[str, tuple[Spec, int]], dict[str, str]]:
    """(name -> (spec, absolute offset), metadata) of a verified file.

    Raises:
        ValueError, KeyError, TypeError: It is not a safetensors file of the dtypes known here.
    """
    (length,) = struct.unpack_from("<Q", data)
    table = json.loads(bytes(data[8 : 8 + length]))
    metadata = table.pop("__metadata__")
    del metadata["checksum"]
    base = 8 + length
    entries = {
        name: (Spec(DTYPES[entry["dtype"]], tuple(entry["shape"])), base + entry["data_offsets"][0])
        for name, entry in table.items()
    }
    return entries, metadata


def view(mapping: mmap.mmap, spec: Spec, offset: int) -> Tensor:
    """A tensor on mapped bytes; it keeps the mapping alive."""
    count = torch.Size(spec.shape).numel()
    if count == 0:
        return torch.zeros(spec.shape, dtype=spec.dtype, device="cpu")
    return torch.frombuffer(mapping, dtype=spec.dtype, count=count, offset=offset).view(spec.shape)
