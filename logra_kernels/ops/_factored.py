"""Rows kept as factors: of each layer's G [k_out, k_in] ~ sum_c u_c v_c^T first all u_c, then all v_c.

LoRIF (arXiv 2601.21929) keeps projected gradients this way: rank * (k_out + k_in) numbers a layer, not k_out * k_in.
Layers lie side by side, or each begins at a multiple of `align`, so that no block of a scaled format holds two layers'.
"""

from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

from logra_kernels.ops._check import accumulator_dtype
from logra_kernels.ops._format import EncodedRows

MOST_RANK = 8

Layers = Sequence[tuple[int, int]]  # (k_out, k_in) of each layer, in row order


def factored_dim(layers: Layers, rank: int, align: int = 1) -> int:
    """F, numbers in a factored row."""
    end = 0
    for k_out, k_in in layers:
        end = -(-end // align) * align + rank * (k_out + k_in)
    return end


def dense_dim(layers: Layers) -> int:
    """D, numbers in a dense row."""
    return sum(k_out * k_in for k_out, k_in in layers)


def flat_sizes(op: str, layers: Layers, rank: int, align: int = 1) -> list[int]:
    """[k_out, k_in, k_out, k_in, ...], as the op library takes them.

    Raises:
        ValueError: A layer is not two sizes, or the rank or what layers are aligned to is none.
    """
    if not 1 <= rank <= MOST_RANK:
        raise ValueError(f"{op}: rank is {rank}; it must be 1 to {MOST_RANK}")
    if align < 1:
        raise ValueError(f"{op}: align is {align}; it must be at least 1")
    for size in layers:
        if len(size) != 2 or min(size) < 0:
            raise ValueError(f"{op}: layers hold {tuple(size)}; each must be (k_out, k_in)")
    return [k for size in layers for k in size]


def pairs(sizes: list[int]) -> list[tuple[int, int]]:
    """The layers of flat_sizes again."""
    return list(zip(sizes[::2], sizes[1::2], strict=True))


def parts(layers: Layers, rank: int, align: int = 1) -> Iterator[tuple[slice, slice, slice]]:
    """For each layer its part of a dense row, and its u's and its v's of a factored row."""
    column = factor = 0
    for k_out, k_in in layers:
        factor = -(-factor // align) * align
        middle, end = factor + rank * k_out, factor + rank * (k_out + k_in)
        yield slice(column, column + k_out * k_in), slice(factor, middle), slice(middle, end)
        column, factor = column + k_out * k_in, end


@cache
def layer_table(layers: tuple[tuple[int, int], ...], rank: int, device: torch.device, align: int = 1) -> Tensor:
    """What a kernel that goes through the layers needs: k_out, k_in, first dense column, first factor; int64 [L, 4]."""
    firsts = ((dense.start, left.start) for dense, left, _ in parts(layers, rank, align))
    lines = [(*size, *first) for size, first in zip(layers, firsts, strict=True)]
    return torch.tensor(lines, dtype=torch.int64, device=device).view(len(lines), 4)


def rebuild_rows(factors: Tensor, layers: Layers, rank: int, *, align: int = 1) -> Tensor:
    """The dense rows that factors stand for.

    Args:
        factors: [N, F], fp32, bf16, fp16 or fp64, from `factor_rows`.
        layers: (k_out, k_in) of each layer, in row order.
        rank: c, vectors of each side.
        align: Each layer's factors begin at a multiple of it.

    Returns:
        [N, D] in fp32; fp64 for fp64 factors.

    Raises:
        ValueError: Sizes do not fit.
    """
    flat_sizes("rebuild_rows", layers, rank, align)
    check_factors("rebuild_rows", factors, layers, rank, align)
    n = factors.shape[0]
    dtype = accumulator_dtype(factors.dtype)
    out = torch.empty((n, dense_dim(layers)), dtype=dtype, device=factors.device)
    for (k_out, k_in), (dense, left, right) in zip(layers, parts(layers, rank, align), strict=True):
        u = factors[:, left].to(dtype).reshape(n, rank, k_out)
        v = factors[:, right].to(dtype).reshape(n, rank, k_in)
        out[:, dense] = (u.mT @ v).flatten(1)
    return out


def check_factors(op: str, factors: Tensor | EncodedRows, layers: Layers, rank: int, align: int) -> None:
    """
    Raises:
        ValueError: Not [N, F].
    """
    width = factored_dim(layers, rank, align)
    if len(factors.shape) != 2 or factors.shape[1] != width:
        raise ValueError(
            f"{op}: factors {tuple(factors.shape)} must be [N, {width}]: rank {rank} of {len(layers)} layers"
            f"{'' if align == 1 else f' at multiples of {align}'}"
        )
