"""How stored rows hold their numbers: the formats, and rows in one of them.

A scaled format cuts each row into blocks of neighbours, starting anew with every row, and keeps one scale s a block:
number = s * code. Integer codes span -m..m, m = 127 (int8), 7 (int4), 1 (int2); "sign" has codes -1 and 1. Codes
below a byte lie packed in uint8, the lower bits first, as code + 8 (int4), code + 2 (int2) or 1 for a positive sign.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class _Kind(NamedTuple):
    code: int  # in the native library and the kernels
    bits: int
    dtype: torch.dtype  # of codes
    most: float  # largest code; 0: not scaled


_KINDS = {
    "fp32": _Kind(0, 32, torch.float32, 0),
    "bf16": _Kind(1, 16, torch.bfloat16, 0),
    "fp16": _Kind(2, 16, torch.float16, 0),
    "fp8": _Kind(3, 8, torch.float8_e4m3fn, 448),
    "int8": _Kind(4, 8, torch.int8, 127),
    "int4": _Kind(5, 4, torch.uint8, 7),
    "int2": _Kind(6, 2, torch.uint8, 1),
    "sign": _Kind(7, 1, torch.uint8, 1),
}
FORMATS = tuple(_KINDS)
SCALES = {"fp32": torch.float32, "fp16": torch.float16}
DEFAULT_BLOCK = 128
LEAST_BLOCK, MOST_BLOCK = 32, 1 << 20


@dataclass(frozen=True)
class RowFormat:
    """A number format of rows.

    Attributes:
        name: One of fp32, bf16, fp16, fp8 (e4m3), int8, int4, int2, sign.
        block: Numbers that share a scale, a power of two from 32 to 2^20; None for fp32, bf16 and fp16.
        scale: Of the scales, "fp32" or "fp16"; None where there are none.
    """

    name: str
    block: int | None
    scale: str | None

    @classmethod
    def of(cls, name: str, block: int | None = None, scale: str | None = None) -> "RowFormat":
        """A format by name, with 128 numbers a block and fp32 scales unless told otherwise.

        Raises:
            ValueError: An unknown name, a block or scale that cannot be, or either for a format that has no scales.
        """
        if name not in _KINDS:
            raise ValueError(f"format {name!r} is not one of {', '.join(FORMATS)}; choose one of them")
        if not _KINDS[name].most:
            if block is not None or scale is not None:
                raise ValueError(f"format {name} has no scales; leave out block and scale")
            return cls(name, None, None)
        block = DEFAULT_BLOCK if block is None else block
        scale = "fp32" if scale is None else scale
        if type(block) is not int or not LEAST_BLOCK <= block <= MOST_BLOCK or block & (block - 1):
            raise ValueError(
                f"format {name}: block is {block!r}; it must be a power of two from {LEAST_BLOCK} to {MOST_BLOCK}"
            )
        if scale not in SCALES:
            raise ValueError(f"format {name}: scale is {scale!r}; it must be one of {', '.join(SCALES)}")
        return cls(name, block, scale)

    @property
    def scaled(self) -> bool:
        return self.block is not None

    @property
    def code(self) -> int:
        """The format's number in the native library."""
        return _KINDS[self.name].code

    @property
    def bits(self) -> int:
        """Of one code."""
        return _KINDS[self.name].bits

    @property
    def most(self) -> float:
        """The largest code of a scaled format."""
        return _KINDS[self.name].most

    @property
    def code_dtype(self) -> torch.dtype:
        """Of the tensor of codes."""
        return _KINDS[self.name].dtype

    @property
    def scale_dtype(self) -> torch.dtype:
        """Of the tensor of scales; only for a scaled format."""
        return SCALES[self.scale or "fp32"]

    @property
    def value_dtype(self) -> torch.dtype:
        """What decoded rows are: the numbers themselves, fp32 for a scaled format."""
        return torch.float32 if self.scaled else self.code_dtype

    def code_width(self, dim: int) -> int:
        """Entries of `code_dtype` in a row of `dim` numbers."""
        return (dim * self.bits + 7) // 8 if self.bits < 8 else dim

    def scale_width(self, dim: int) -> int:
        """Scales of a row of `dim` numbers."""
        return 0 if self.block is None else -(-dim // self.block)

    def row_bytes(self, dim: int) -> int:
        """Codes and scales of a row of `dim` numbers."""
        scales = self.scale_width(dim) * self.scale_dtype.itemsize if self.scaled else 0
        return self.code_width(dim) * self.code_dtype.itemsize + scales

    def __str__(self) -> str:
        return f"{self.name}, {self.scale} scales of {self.block} numbers" if self.scaled else self.name


@dataclass(frozen=True)
class EncodedRows:
    """N rows of D numbers in a format; what the scoring ops take in place of a tensor of rows.

    Attributes:
        format: Of the numbers.
        dim: D.
        codes: [N, format.code_width(D)] of format.code_dtype.
        scales: [N, format.scale_width(D)] of format.scale_dtype; None for a format without scales.

    Raises:
        ValueError: Shapes or dtypes do not fit the format.
    """

    format: RowFormat
    dim: int
    codes: Tensor
    scales: Tensor | None = None

    def __post_init__(self) -> None:
        given = {"codes": self.codes} | ({} if self.scales is None else {"scales": self.scales})
        wanted = {"codes": (self.format.code_width(self.dim), self.format.code_dtype)}
        if self.format.scaled:
            wanted["scales"] = (self.format.scale_width(self.dim), self.format.scale_dtype)
        if given.keys() != wanted.keys():
            raise ValueError(f"rows in {self.format} take {' and '.join(wanted)}; given are {' and '.join(given)}")
        for name, tensor in given.items():
            shape = (self.codes.shape[0], wanted[name][0])
            if tensor.shape != shape or tensor.dtype != wanted[name][1]:
                raise ValueError(
                    f"{name} {tuple(tensor.shape)} {tensor.dtype} must be {shape} {wanted[name][1]}"
                    f" for rows of {self.dim} numbers in {self.format}"
                )

    @property
    def shape(self) -> tuple[int, int]:
        """(N, D)."""
        return self.codes.shape[0], self.dim

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def __len__(self) -> int:
        return self.codes.shape[0]

    def __getitem__(self, rows: slice | Tensor) -> "EncodedRows":
        """Some of the rows: a slice, which copies nothing, a mask [N] or row numbers."""
        return EncodedRows(self.format, self.dim, self.codes[rows], None if self.scales is None else self.scales[rows])

    def pinned(self) -> "EncodedRows":
        """A copy in memory from which a CUDA device can read by itself."""
        scales = None if self.scales is None else self.scales.pin_memory()
        return EncodedRows(self.format, self.dim, self.codes.pin_memory(), scales)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "EncodedRows":
        """The same rows on a device."""
        scales = None if self.scales is None else self.scales.to(device, non_blocking=non_blocking)
        return EncodedRows(self.format, self.dim, self.codes.to(device, non_blocking=non_blocking), scales)
