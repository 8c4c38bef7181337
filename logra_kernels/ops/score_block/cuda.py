"""CUDA C++ launchers of score_block: rows in fp32, bf16, fp16 or codes, on the tensor cores in bf16 parts."""

import torch
from torch import Tensor

from logra_kernels import _C_cuda
from logra_kernels.ops._device import programs_of
from logra_kernels.ops._format import EncodedRows
from logra_kernels.ops._native import Encoded, Matrix, encoded, matrix, row_major

LEAST_STEPS = 16  # of a piece of D, beside which what its sums cost is little


def launch(queries: Tensor, rows: Tensor) -> Tensor:
    if rows.dtype == torch.float64:
        raise RuntimeError("score_block: backend 'cuda' has no fp64 kernel; use 'triton' or 'reference'")
    return _scores(queries, rows, matrix(rows))


def launch_encoded(queries: Tensor, rows: EncodedRows, digits: int) -> Tensor:
    """Products in bf16 parts, whatever `digits` allows."""
    rows = row_major(rows)
    return _scores(queries, rows, encoded(rows))


def _scores(queries: Tensor, rows: Tensor | EncodedRows, as_native: Matrix | Encoded) -> Tensor:
    (q, d), n = queries.shape, len(rows)
    out = torch.empty((q, n), dtype=torch.float32, device=queries.device)
    if not out.numel():
        return out
    if not d:
        return out.zero_()
    piece, pieces = cut(q, n, d, programs_of(queries))
    partial = out if pieces == 1 else out.new_empty((pieces, q, n))
    with torch.cuda.device(queries.device):
        stream = torch.cuda.current_stream(queries.device).cuda_stream
        _C_cuda.score_block(
            matrix(queries), as_native, out.data_ptr(), partial.data_ptr(), q, n, d, piece, pieces, stream
        )
    return out


def cut(q: int, n: int, d: int, programs: int) -> tuple[int, int]:
    """(numbers of a piece of D, pieces): D is cut only where few tiles would leave processors without work."""
    queries, rows, depth = _C_cuda.score_block_tile(q)
    tiles, steps = -(-q // queries) * -(-n // rows), -(-d // depth)
    piece = depth * -(-steps // max(1, min(programs // tiles, steps // LEAST_STEPS)))
    return piece, -(-d // piece)
