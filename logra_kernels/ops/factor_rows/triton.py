"""Triton launcher of factor_rows: one program finds the factors of one layer of one row.

Subspace iteration of 16 vectors, the rows of G read a block at a time; a two-sided Jacobi iteration, 8 rotations at
once in a round-robin order, turns them to the singular vectors.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from logra_kernels.ops._check import accumulator_dtype
from logra_kernels.ops._device import device_of
from logra_kernels.ops._factored import Layers, factored_dim, layer_table
from logra_kernels.ops._tile import OPTIONS, accumulator, block

ITERATIONS = 8  # residuals stay within 1e-3 of the least ones on matrices of independent normal numbers
WIDTH = 16  # vectors; the least extent tl.dot takes
SWEEPS = 5


@triton.jit
def _layer_rows(g, start, k_out, k_in, stride, scale, ACC: tl.constexpr, BLOCK_OUT: tl.constexpr, j):
    """Rows start.. of one G [k_out, k_in], times scale; zeros beyond it."""
    i = start + tl.arange(0, BLOCK_OUT)
    at = g + (i.to(tl.int64)[:, None] * k_in + j[None, :]) * stride
    return tl.load(at, mask=(i < k_out)[:, None] & (j < k_in)[None, :], other=0.0).to(ACC) * scale


@triton.jit
def _orthonormal(z, WIDTH: tl.constexpr):
    """Gram-Schmidt over the columns, twice; a column that depends on those before it becomes 0."""
    b = tl.arange(0, WIDTH)
    for k in range(WIDTH):
        mine = (b == k)[None, :]
        column = tl.sum(tl.where(mine, z, 0.0), 1)
        before = tl.sum(column * column, 0) * 0.0
        left = before
        for _ in range(2):
            share = tl.where(b < k, tl.sum(z * column[:, None], 0), 0.0)
            column -= tl.sum(z * share[None, :], 1)
            before = left
            left = tl.sum(column * column, 0)
        alive = (left > 0.01 * before) & (left > 0.0)
        scale = tl.where(alive, 1.0 / tl.sqrt(tl.where(alive, left, 1.0)), 0.0)
        z = tl.where(mine, (column * scale)[:, None], z)
    return z


@triton.jit
def _eigenvectors(s, SWEEPS: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr):
    """Of a symmetric matrix, largest eigenvalue first, as columns."""
    a = tl.arange(0, WIDTH)
    same = a[:, None] == a[None, :]
    vectors = tl.where(same, 1.0, 0.0).to(ACC)
    for step in range(SWEEPS * (WIDTH - 1)):
        turn = step % (WIDTH - 1)
        partner = (turn + WIDTH - 1 - a) % (WIDTH - 1)  # of all but the last vector, who gets the one left over
        partner = tl.where(partner == a, WIDTH - 1, partner)
        partner = tl.where(a == WIDTH - 1, turn * (WIDTH // 2) % (WIDTH - 1), partner)
        pairs = a[:, None] == partner[None, :]  # column b holds its partner's row
        # the same number for both of a pair, however s was rounded: their tangents must differ in sign alone
        both = 0.5 * (tl.sum(tl.where(pairs, s, 0.0), 0) + tl.sum(tl.where(pairs, s, 0.0), 1))
        mine = tl.sum(tl.where(same, s, 0.0), 0)
        theirs = tl.sum(tl.where(pairs, mine[:, None], 0.0), 0)
        apart, twice = theirs - mine, both + both
        root = tl.sqrt(apart * apart + twice * twice)
        up = (apart > 0.0) | ((apart == 0.0) & (a < partner))
        divisor = tl.where(up, apart + root, apart - root)
        tangent = tl.where(divisor != 0.0, twice / tl.where(divisor != 0.0, divisor, 1.0), 0.0)
        cosine = 1.0 / tl.sqrt(1.0 + tangent * tangent)
        turned = tl.where(same, cosine[None, :], 0.0) - tl.where(pairs, (cosine * tangent)[None, :], 0.0)
        turned = turned.to(ACC)
        s = tl.dot(tl.trans(turned), tl.dot(s, turned, input_precision="ieee", out_dtype=ACC),
                   input_precision="ieee", out_dtype=ACC)  # fmt: skip
        vectors = tl.dot(vectors, turned, input_precision="ieee", out_dtype=ACC)
    values = tl.sum(tl.where(same, s, 0.0), 0)
    across = tl.sum(tl.where(same, s, 0.0), 1)
    ahead = (across[:, None] > values[None, :]) | ((across[:, None] == values[None, :]) & (a[:, None] < a[None, :]))
    place = tl.sum(ahead.to(tl.int32), 0)  # of column b, once they are sorted
    back = tl.sum(tl.where(same, place[None, :], 0), 1)
    order = tl.where(back[:, None] == a[None, :], 1.0, 0.0).to(ACC)
    return tl.dot(vectors, order, input_precision="ieee", out_dtype=ACC)


@triton.jit
def _factor_rows_kernel(
    rows, table, first, factors, stride_rn, stride_rd, F,
    RANK: tl.constexpr, ACC: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, ITERATIONS: tl.constexpr,
    SWEEPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """G[n,l] ~ sum_c u_c v_c^T, the leading singular vectors times the square roots of their values"""
    n, layer = tl.program_id(0).to(tl.int64), tl.program_id(1)
    k_out, k_in = tl.load(table + layer * 4), tl.load(table + layer * 4 + 1)
    g = rows + n * stride_rn + tl.load(table + layer * 4 + 2) * stride_rd
    out = factors + n * F + tl.load(table + layer * 4 + 3)
    j, b = tl.arange(0, BLOCK_IN), tl.arange(0, WIDTH)

    largest = tl.zeros([BLOCK_IN], ACC)
    poison = tl.zeros([BLOCK_IN], ACC)  # NaN once a number is not finite, else 0
    for start in range(0, k_out, BLOCK_OUT):
        part = _layer_rows(g, start, k_out, k_in, stride_rd, 1.0, ACC, BLOCK_OUT, j)
        largest = tl.maximum(largest, tl.max(tl.abs(part), 0))
        poison += tl.sum(part - part, 0)
    most, bad = tl.max(largest, 0), tl.sum(poison, 0)
    most = tl.where((most > 0.0) & (bad == 0.0), most, 1.0)
    scale, root = 1.0 / most, tl.sqrt(most)

    q = tl.load(first + j[:, None] * WIDTH + b[None, :], mask=(j < k_in)[:, None], other=0.0)
    for _ in range(ITERATIONS):
        z = tl.zeros([BLOCK_IN, WIDTH], ACC)
        for start in range(0, k_out, BLOCK_OUT):
            part = _layer_rows(g, start, k_out, k_in, stride_rd, scale, ACC, BLOCK_OUT, j)
            y = tl.dot(part, q, input_precision="ieee", out_dtype=ACC)
            z = tl.dot(tl.trans(part), y, z, input_precision="ieee", out_dtype=ACC)
        q = _orthonormal(z, WIDTH)

    gram = tl.zeros([WIDTH, WIDTH], ACC)
    for start in range(0, k_out, BLOCK_OUT):
        part = _layer_rows(g, start, k_out, k_in, stride_rd, scale, ACC, BLOCK_OUT, j)
        y = tl.dot(part, q, input_precision="ieee", out_dtype=ACC)
        gram = tl.dot(tl.trans(y), y, gram, input_precision="ieee", out_dtype=ACC)
    # many rotations leave the vectors orthonormal to some ulps only
    q = _orthonormal(tl.dot(q, _eigenvectors(gram, SWEEPS, WIDTH, ACC), input_precision="ieee", out_dtype=ACC), WIDTH)

    squares = tl.zeros([WIDTH], ACC)
    for start in range(0, k_out, BLOCK_OUT):
        part = _layer_rows(g, start, k_out, k_in, stride_rd, scale, ACC, BLOCK_OUT, j)
        y = tl.dot(part, q, input_precision="ieee", out_dtype=ACC)
        squares += tl.sum(y * y, 0)
    sigma = tl.sqrt(squares)
    right = root * tl.sqrt(sigma)
    left = tl.where(sigma > 0.0, root / tl.sqrt(tl.where(sigma > 0.0, sigma, 1.0)), 0.0)
    for start in range(0, k_out, BLOCK_OUT):
        part = _layer_rows(g, start, k_out, k_in, stride_rd, scale, ACC, BLOCK_OUT, j)
        y = tl.dot(part, q, input_precision="ieee", out_dtype=ACC)
        i = start + tl.arange(0, BLOCK_OUT)
        at = out + b.to(tl.int64)[None, :] * k_out + i[:, None]
        tl.store(at, y * left[None, :] + bad, mask=(b < RANK)[None, :] & (i < k_out)[:, None])
    at = out + RANK * k_out + b.to(tl.int64)[None, :] * k_in + j[:, None]
    tl.store(at, q * right[None, :] + bad, mask=(b < RANK)[None, :] & (j < k_in)[:, None])


@cache
def _first(k_in: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Where the iteration starts: [k_in, 16] numbers in [-1, 1), the same in every call and on every device."""
    index = torch.arange(1, k_in * WIDTH + 1, dtype=torch.float64, device="cpu")
    mixed = torch.sin(index * 12.9898) * 43758.5453  # the fractional part scatters like noise
    return (2 * (mixed - mixed.floor()) - 1).view(k_in, WIDTH).to(device, dtype)


def launch(rows: Tensor, layers: Layers, rank: int) -> Tensor:
    n, width, dtype = rows.shape[0], factored_dim(layers, rank), accumulator_dtype(rows.dtype)
    out = torch.empty((n, width), dtype=dtype, device=rows.device)
    if not out.numel():
        return out
    most_in = max(size[1] for size in layers)
    block_in = block(most_in, 1 << 20)
    wide = dtype == torch.float64  # of which shared memory holds fewer
    options = OPTIONS | {"num_stages": 1} if wide else OPTIONS
    with device_of(rows):
        _factor_rows_kernel[n, len(layers)](
            rows, layer_table(tuple(layers), rank, rows.device), _first(block_in, dtype, rows.device), out,
            *rows.stride(), width,
            RANK=rank, ACC=accumulator(rows.dtype), BLOCK_OUT=16 if wide or block_in > 128 else 32,
            BLOCK_IN=block_in, ITERATIONS=ITERATIONS, SWEEPS=SWEEPS, WIDTH=WIDTH,
            num_warps=8, **options,  # fewer warps and more rows of G at a time spill registers
        )  # fmt: skip
    return out
