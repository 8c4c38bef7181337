"""The Triton kernels that score_block and score_topk share: a tile of queries against a tile of rows.

The rows are converted as they are loaded, and each row's scores are scaled as they leave. Where few tiles would leave
processors idle, the sum over D is cut into pieces, which are added in order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from logra_kernels.ops._check import accumulator_dtype
from logra_kernels.ops._codes import as_bytes, converts_f8, fields_of, integer_of, number_of
from logra_kernels.ops._device import PROGRAMS_PER_PROCESSOR, capability_of, device_of, pieces_of, programs_of
from logra_kernels.ops._format import EncodedRows
from logra_kernels.ops._score_tiles import TILES, ScoreTile, candidates, key_of
from logra_kernels.ops._tile import (
    INTERPRETED,
    OPTIONS,
    accumulator,
    block,
    describable,
    descriptor,
    dot_tile,
    dot_tile_described,
    fp32_precision,
    must_upcast,
)
from logra_kernels.ops._tune import tile_for


@triton.jit
def _place(Q, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr):
    """A program's first query and row; the tiles of the same rows are neighbours, who find them in L2."""
    tiles_q = tl.cdiv(Q, BLOCK_Q)
    return (tl.program_id(0) % tiles_q) * BLOCK_Q, (tl.program_id(0) // tiles_q).to(tl.int64) * BLOCK_N


@triton.jit
def _score_kernel(
    queries, rows, row_scale, scores,
    Q, N, D, PIECE, stride_qq, stride_qd, stride_rn, stride_rd, stride_s,
    ACC: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """scores[p,q,n] = row_scale[n] sum_{d of piece p} queries[q,d] rows[n,d]"""
    q0, n0 = _place(Q, BLOCK_Q, BLOCK_N)
    q, n = q0.to(tl.int64) + tl.arange(0, BLOCK_Q), n0 + tl.arange(0, BLOCK_N)
    p = tl.program_id(1).to(tl.int64)
    first = p * PIECE
    length = tl.minimum(D - first, PIECE).to(tl.int32)
    if DESCRIBED:
        tile = dot_tile_described(
            queries, rows, q0, n0.to(tl.int32), BLOCK_Q, BLOCK_N, first.to(tl.int32), first.to(tl.int32) + length,
            ACC, BLOCK_D, PRECISION, UPCAST,
        )  # fmt: skip
    else:
        tile = dot_tile(
            queries + first * stride_qd + q * stride_qq, rows + first * stride_rd + n * stride_rn, q < Q, n < N,
            stride_qd, stride_rd, length, ACC, BLOCK_D, PRECISION, UPCAST,
        )  # fmt: skip
    if row_scale is not None:
        tile = tile * tl.load(row_scale + n * stride_s, mask=n < N, other=0.0)[None, :]
    tl.store(scores + p * Q * N + q[:, None] * N + n[None, :], tile, mask=(q < Q)[:, None] & (n < N)[None, :])


@triton.jit
def _score_encoded_kernel(
    queries, codes, scales, row_scale, scores,
    Q, N, D, C, PIECE, stride_qq, stride_qd, stride_cn, stride_cd, stride_sn, stride_sd, stride_s,
    CODE: tl.constexpr, EACH: tl.constexpr, BLOCK: tl.constexpr, BF16: tl.constexpr, CONVERTS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """scores[p,q,n] = row_scale[n] sum_{d of piece p} queries[q,d] scales[n, d // BLOCK] codes[n,d]

    A step lies within one block, so that the codes, exact in bf16, are multiplied first and scaled in fp32. C: bytes of
    codes a row.
    """
    q0, n0 = _place(Q, BLOCK_Q, BLOCK_N)
    q, n = q0.to(tl.int64) + tl.arange(0, BLOCK_Q), n0 + tl.arange(0, BLOCK_N)
    p = tl.program_id(1)
    acc = tl.zeros([BLOCK_Q, BLOCK_N], tl.float32)
    for start in range(p * PIECE, tl.minimum(D, (p + 1) * PIECE), BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        at = tl.multiple_of(start // EACH, BLOCK_D // EACH) + tl.arange(0, BLOCK_D // EACH)
        step = d.to(tl.int64)
        ok = d < D
        left = tl.load(
            queries + (q * stride_qq)[:, None] + (step * stride_qd)[None, :],
            mask=(q < Q)[:, None] & ok[None, :], other=0.0,
        )  # fmt: skip
        byte = tl.load(
            codes + (n * stride_cn)[None, :] + (at.to(tl.int64) * stride_cd)[:, None],
            mask=(n < N)[None, :] & (at < C)[:, None], other=0,
        )  # fmt: skip
        scale = tl.load(scales + n * stride_sn + start // BLOCK * stride_sd, mask=n < N, other=0.0).to(tl.float32)
        number = number_of(fields_of(byte, CODE), CODE, CONVERTS)
        if BF16:
            product = tl.dot(left, number.to(tl.bfloat16), out_dtype=tl.float32)
        else:
            product = tl.dot(left.to(tl.float32), number, input_precision=PRECISION, out_dtype=tl.float32)
        acc += product * scale[None, :]
    if row_scale is not None:
        acc = acc * tl.load(row_scale + n * stride_s, mask=n < N, other=0.0)[None, :]
    tl.store(
        scores + p.to(tl.int64) * Q * N + q[:, None] * N + n[None, :], acc, mask=(q < Q)[:, None] & (n < N)[None, :]
    )


@triton.jit
def _score_int8_kernel(
    queries, query_scales, codes, scales, row_scale, scores,
    Q, N, D, C, PIECE, stride_qq, stride_qs, stride_cn, stride_cd, stride_sn, stride_sd, stride_s,
    CODE: tl.constexpr, EACH: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """scores[p,q,n] = row_scale[n] sum_d query_scales[q, d // SPAN] queries[q,d] scales[n, d // BLOCK] codes[n,d]

    d goes through piece p. A span lies within one block of the rows, so that its bytes add up as integers and are
    scaled once. C: bytes of codes a row.
    """
    q0, n0 = _place(Q, BLOCK_Q, BLOCK_N)
    q, n = q0.to(tl.int64) + tl.arange(0, BLOCK_Q), n0 + tl.arange(0, BLOCK_N)
    p = tl.program_id(1)
    acc = tl.zeros([BLOCK_Q, BLOCK_N], tl.float32)
    for first in range(p * PIECE, tl.minimum(D, (p + 1) * PIECE), SPAN):
        whole = tl.zeros([BLOCK_Q, BLOCK_N], tl.int32)
        for start in range(0, SPAN, BLOCK_D):
            d = first + start + tl.arange(0, BLOCK_D)
            at = tl.multiple_of((first + start) // EACH, BLOCK_D // EACH) + tl.arange(0, BLOCK_D // EACH)
            step = d.to(tl.int64)
            ok = d < D
            left = tl.load(
                queries + (q * stride_qq)[:, None] + step[None, :], mask=(q < Q)[:, None] & ok[None, :], other=0
            )
            byte = tl.load(
                codes + (n * stride_cn)[None, :] + (at.to(tl.int64) * stride_cd)[:, None],
                mask=(n < N)[None, :] & (at < C)[:, None], other=0,
            )  # fmt: skip
            right = integer_of(fields_of(byte, CODE), CODE)
            whole = tl.dot(left, right, whole, out_dtype=tl.int32)
        left_scale = tl.load(query_scales + q * stride_qs + first // SPAN, mask=q < Q, other=0.0)
        scale = tl.load(scales + n * stride_sn + first // BLOCK * stride_sd, mask=n < N, other=0.0).to(tl.float32)
        acc += whole.to(tl.float32) * left_scale[:, None] * scale[None, :]
    if row_scale is not None:
        acc = acc * tl.load(row_scale + n * stride_s, mask=n < N, other=0.0)[None, :]
    tl.store(
        scores + p.to(tl.int64) * Q * N + q[:, None] * N + n[None, :], acc, mask=(q < Q)[:, None] & (n < N)[None, :]
    )


def _cut(
    q: int, n: int, d: int, block_q: int, block_n: int, step: int, programs: int, most: int | None
) -> tuple[int, tuple[int, int]]:
    """(numbers of a piece of D, the grid)"""
    tiles_q, steps = triton.cdiv(q, block_q), max(1, triton.cdiv(d, step))
    pieces = pieces_of(triton.cdiv(most or n, block_n) * tiles_q, steps, programs)
    piece = step * triton.cdiv(steps, pieces)
    return piece, (triton.cdiv(n, block_n) * tiles_q, max(1, triton.cdiv(d, piece)))


def _room(pieces: int, q: int, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty((q, n) if pieces == 1 else (pieces, q, n), dtype=dtype, device=device)


def _whole(scores: Tensor) -> Tensor:
    return scores if scores.dim() == 2 else scores.sum(0)


def score_encoded(
    queries: Tensor | EncodedRows, rows: EncodedRows, row_scale: Tensor | None = None, most: int | None = None
) -> Tensor:
    """[Q, N] scores of rows with scales, on their device; queries are numbers or, beside whole codes, in int8.

    Args:
        most: N of the largest of several blocks that these rows are one of: equal rows of all have the same bits.
    """
    if isinstance(queries, EncodedRows):
        return _score_int8(queries, rows, row_scale, most)
    (q, d), n, form = queries.shape, len(rows), rows.format
    if not q * n or rows.scales is None:
        return torch.empty((q, n), dtype=torch.float32, device=rows.device)
    block_q, block_n = block(q, 64), block(most or n, 64)
    block_d = 32 if queries.element_size() > 2 else min(form.block or 64, 64)
    piece, grid = _cut(q, n, d, block_q, block_n, block_d, programs_of(rows.codes), most)
    scores = _room(grid[1], q, n, torch.float32, rows.device)
    with device_of(rows.codes):
        _score_encoded_kernel[grid](
            queries, as_bytes(rows.codes), rows.scales, row_scale, scores, q, n, d, form.code_width(d), piece,
            *queries.stride(), *rows.codes.stride(), *rows.scales.stride(),
            0 if row_scale is None else row_scale.stride(0),
            CODE=form.code, EACH=8 // form.bits, BLOCK=form.block,
            BF16=queries.dtype == torch.bfloat16 and not INTERPRETED, CONVERTS=converts_f8(rows.codes),
            BLOCK_Q=block_q, BLOCK_N=block_n, BLOCK_D=block_d,
            # codes are exact in tf32: three products keep the queries' 22 leading bits on the tensor cores
            PRECISION="tf32x3" if fp32_precision() == "ieee" else fp32_precision(),
            num_warps=8 if block_d == 32 and block_q > 32 else 4, **OPTIONS,  # four would spill registers
        )  # fmt: skip
        return _whole(scores)


def _score_int8(queries: EncodedRows, rows: EncodedRows, row_scale: Tensor | None, most: int | None) -> Tensor:
    (q, d), n, form = queries.shape, len(rows), rows.format
    span = queries.format.block
    if not q * n or rows.scales is None or queries.scales is None or span is None:
        return torch.empty((q, n), dtype=torch.float32, device=rows.device)
    block_q, block_n = block(q, 64), block(most or n, 128)
    piece, grid = _cut(q, n, d, block_q, block_n, span, programs_of(rows.codes), most)
    scores = _room(grid[1], q, n, torch.float32, rows.device)
    with device_of(rows.codes):
        _score_int8_kernel[grid](
            queries.codes, queries.scales, as_bytes(rows.codes), rows.scales, row_scale, scores,
            q, n, d, form.code_width(d), piece,
            queries.codes.stride(0), queries.scales.stride(0), *rows.codes.stride(), *rows.scales.stride(),
            0 if row_scale is None else row_scale.stride(0),
            CODE=form.code, EACH=8 // form.bits, BLOCK=form.block, SPAN=span,
            BLOCK_Q=block_q, BLOCK_N=block_n, BLOCK_D=min(span, 128), num_warps=8 if block_q > 32 else 4, **OPTIONS,
        )  # fmt: skip
        return _whole(scores)


def score(queries: Tensor, rows: Tensor, row_scale: Tensor | None = None, most: int | None = None) -> Tensor:
    """[Q, N] scores on the rows' device.

    Args:
        most: As in `score_encoded`.
    """
    q, n = queries.shape[0], rows.shape[0]
    scores = torch.empty((q, n), dtype=accumulator_dtype(rows.dtype), device=rows.device)
    if not q * n:
        return scores
    capability = capability_of(rows)
    key = key_of(capability, max(queries.element_size(), rows.element_size()), q)

    def run(tile: ScoreTile) -> Tensor:
        return _score_by(tile, queries, rows, row_scale, scores, most or n, described=capability[0] >= 9)

    with device_of(rows):
        return run(tile_for("score_block", TILES, key, candidates, run, triton.testing.do_bench))


def _score_by(
    tile: ScoreTile,
    queries: Tensor,
    rows: Tensor,
    row_scale: Tensor | None,
    scores: Tensor,
    most: int,
    *,
    described: bool,
) -> Tensor:
    (q, d), n = queries.shape, rows.shape[0]
    block_q, block_n, block_d = block(q, tile.block_q), block(most, tile.block_n), block(d, tile.block_d)
    programs = programs_of(rows) * tile.at_once // PROGRAMS_PER_PROCESSOR
    piece, grid = _cut(q, n, d, block_q, block_n, block_d, programs, most)
    pieces = scores if grid[1] == 1 else scores.new_empty((grid[1], q, n))
    mixed = must_upcast(queries.dtype, rows.dtype)
    described = described and queries.dtype == rows.dtype and describable(queries) and describable(rows)
    _score_kernel[grid](
        descriptor(queries, block_q, block_d) if described else queries,
        descriptor(rows, block_n, block_d) if described else rows,
        row_scale, pieces, q, n, d, piece, *queries.stride(), *rows.stride(),
        0 if row_scale is None else row_scale.stride(0),
        ACC=accumulator(rows.dtype), BLOCK_Q=block_q, BLOCK_N=block_n, BLOCK_D=block_d,
        PRECISION=fp32_precision(), UPCAST=mixed, DESCRIBED=described,
        num_warps=tile.warps, **(OPTIONS | {"num_stages": tile.stages}),
    )  # fmt: skip
    return _whole(pieces)
