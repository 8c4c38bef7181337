"""quantize_rows: rows to codes and one scale for each block of neighbours.

    scale = max |g| / m over the block, m the format's largest code; for the nearest sign, mean |g|
    code  = g / scale, rounded to the nearest code (ties to even) or at random to one of both neighbours

The mean magnitude is the scale of a sign with the least squared error. A random code is right on average: the chances
are a hash of the seed, the row and the column, so that they depend neither on the batch nor on the machine. Absolute
maximum per block as in QLESS (Ananta et al. 2025, arXiv 2502.01703), which has int8 to sign with one block a row.
"""

import torch
from torch import Tensor

from logra_kernels.ops._check import check_tensors
from logra_kernels.ops._dispatch import LIB, launcher
from logra_kernels.ops._format import EncodedRows, RowFormat

ROUNDINGS = ("nearest", "stochastic")

LIB.define(
    "quantize_rows(Tensor g, str format, int block, str scale, str rounding, int seed, int first_row, str backend)"
    " -> (Tensor, Tensor)"
)


def _launch(
    g: Tensor, format: str, block: int, scale: str, rounding: str, seed: int, first_row: int, backend: str
) -> tuple[Tensor, Tensor]:
    form = RowFormat(format, block, scale)
    return launcher("quantize_rows", g.device.type, backend)(g, form, rounding, seed, first_row)


LIB.impl("quantize_rows", _launch, "CPU")
LIB.impl("quantize_rows", _launch, "CUDA")


@torch.library.register_fake("logra_kernels::quantize_rows", lib=LIB)
def _fake(
    g: Tensor, format: str, block: int, scale: str, rounding: str, seed: int, first_row: int, backend: str
) -> tuple[Tensor, Tensor]:
    form, (n, d) = RowFormat(format, block, scale), g.shape
    codes = g.new_empty((n, form.code_width(d)), dtype=form.code_dtype)
    return codes, g.new_empty((n, form.scale_width(d)), dtype=form.scale_dtype)


_op = torch.ops.logra_kernels.quantize_rows.default


def quantize_rows(
    g: Tensor,
    format: RowFormat | str,
    *,
    rounding: str = "nearest",
    seed: int = 0,
    first_row: int = 0,
    backend: str = "auto",
) -> EncodedRows:
    """Rows in a stored format.

    A block that holds NaN or Inf, or one too large for fp16 scales, decodes to NaN.

    Args:
        g: [N, D], any floating dtype and strides.
        format: A `RowFormat`, or its name for 128 numbers a block and fp32 scales.
        rounding: "nearest", or "stochastic" for a scaled format: unbiased, with about 1.4 times the error.
        seed: Of the chances, at least 0.
        first_row: The number of g's first row among all rows, so that their chances do not depend on the batch.
        backend: "auto", "cpp", "triton" or "reference"; an unavailable one raises RuntimeError.

    Raises:
        ValueError: g is not [N, D], or an unknown format or rounding.
    """
    form = RowFormat.of(format) if isinstance(format, str) else format
    check_tensors("quantize_rows", g=g)
    if g.dim() != 2:
        raise ValueError(f"quantize_rows: g {tuple(g.shape)} must be [N, D]")
    if rounding not in ROUNDINGS or seed < 0 or first_row < 0:
        raise ValueError(
            f"quantize_rows: rounding {rounding!r} must be one of {', '.join(ROUNDINGS)},"
            f" seed {seed} and first_row {first_row} at least 0"
        )
    if form.block is None or form.scale is None:
        if rounding != "nearest":
            raise ValueError(f"quantize_rows: {rounding} rounding is for formats with scales, not for {form}")
        return EncodedRows(form, g.shape[1], g.to(form.code_dtype))
    g = g.float() if g.dtype == torch.float64 else g
    codes, scales = _op(g, form.name, form.block, form.scale, rounding, seed, first_row, backend)
    return EncodedRows(form, g.shape[1], codes, scales)
