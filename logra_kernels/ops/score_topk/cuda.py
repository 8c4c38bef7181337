"""CUDA C++ launchers of score_topk: scores leave the tiles as candidates, which are merged into each query's best."""

import torch
from torch import Tensor

from logra_kernels import _C_cuda
from logra_kernels.ops._best import select
from logra_kernels.ops._device import device_of
from logra_kernels.ops._format import EncodedRows
from logra_kernels.ops._score_cuda import Operands, scores

CANDIDATES = 1 << 23  # that there is room for, 8 bytes each; a block of rows has no more scores
FIRST_BLOCK = 1 << 15  # rows, all of which are candidates; few of later ones beat the best of these
QUERIES_AT_ONCE = 1024


def launch(queries: Tensor, rows: Tensor, k: int, row_scale: Tensor | None, largest: bool) -> tuple[Tensor, Tensor]:
    return _best(Operands.of("score_topk", queries, rows, 0), k, row_scale, largest)


def launch_encoded(
    queries: Tensor, rows: EncodedRows, k: int, row_scale: Tensor | None, largest: bool, digits: int
) -> tuple[Tensor, Tensor]:
    """Products as in score_block."""
    return _best(Operands.of("score_topk", queries, rows, digits), k, row_scale, largest)


def _best(operands: Operands, k: int, row_scale: Tensor | None, largest: bool) -> tuple[Tensor, Tensor]:
    q, n, _ = operands.shape
    if k > _C_cuda.SCORE_TOPK_MOST_K and n > _C_cuda.SCORE_TOPK_MOST_K:
        return _select(operands, k, row_scale, largest)
    k = min(k, n)
    values = torch.empty((q, k), dtype=torch.float32, device=operands.device)
    index = torch.empty((q, k), dtype=torch.int64, device=operands.device)
    for start in range(0, q if k else 0, QUERIES_AT_ONCE):
        some = slice(start, start + QUERIES_AT_ONCE)
        _launch(operands.some(some, slice(None)), row_scale, largest, values[some], index[some])
    return values, index


def _launch(operands: Operands, row_scale: Tensor | None, largest: bool, values: Tensor, index: Tensor) -> None:
    (q, n, d), k = operands.shape, values.shape[1]
    capacity = min(n, max(1, CANDIDATES // q))
    first = min(capacity, FIRST_BLOCK)
    piece, pieces = operands.cut()
    if n > first:  # blocks enough to keep every processor at work
        piece, pieces = piece * pieces, 1
    candidates, best = index.new_empty((q, capacity)), index.new_zeros((q, k))
    counts = torch.zeros(q, dtype=torch.int32, device=index.device)
    partial = values if pieces == 1 else values.new_empty((pieces, q, n))
    scale = (0, 0) if row_scale is None else (row_scale.data_ptr(), row_scale.stride(0))
    with device_of(values):
        stream = torch.cuda.current_stream(values.device).cuda_stream
        _C_cuda.score_topk(
            operands.arch,
            *operands.native,
            scale,
            values.data_ptr(),
            index.data_ptr(),
            candidates.data_ptr(),
            counts.data_ptr(),
            best.data_ptr(),
            partial.data_ptr(),
            q,
            n,
            d,
            k,
            largest,
            first,
            capacity,
            piece,
            pieces,
            stream,
        )


def _select(operands: Operands, k: int, row_scale: Tensor | None, largest: bool) -> tuple[Tensor, Tensor]:
    """More best rows than the kernel keeps: blocks of scores, merged by sorts."""

    def some(rows: slice) -> Tensor:
        return scores(operands.some(slice(None), rows), None if row_scale is None else row_scale[rows])

    q, n, _ = operands.shape
    return select(some, q, n, k, largest, operands.device, torch.float32)
