"""C++ launchers of score_topk."""

import torch
from torch import Tensor

from logra_kernels import _C
from logra_kernels.ops._check import accumulator_dtype
from logra_kernels.ops._format import EncodedRows
from logra_kernels.ops._native import encoded, matrix, row_major


def launch(queries: Tensor, rows: Tensor, k: int, row_scale: Tensor | None, largest: bool) -> tuple[Tensor, Tensor]:
    (q, d), n = queries.shape, rows.shape[0]
    k = min(k, n)
    values = torch.empty(q, k, dtype=accumulator_dtype(rows.dtype))
    indices = torch.empty(q, k, dtype=torch.int64)
    _C.score_topk(
        matrix(queries),
        matrix(rows),
        None if row_scale is None else matrix(row_scale.unsqueeze(-1)),
        values.data_ptr(),
        indices.data_ptr(),
        q,
        n,
        d,
        k,
        largest,
        torch.get_num_threads(),
    )
    return values, indices


def launch_encoded(
    queries: Tensor, rows: EncodedRows, k: int, row_scale: Tensor | None, largest: bool, digits: int
) -> tuple[Tensor, Tensor]:
    (q, d), n = queries.shape, len(rows)
    k = min(k, n)
    values = torch.empty(q, k, dtype=torch.float32)
    indices = torch.empty(q, k, dtype=torch.int64)
    rows = row_major(rows)
    _C.score_topk_encoded(
        matrix(queries),
        encoded(rows),
        None if row_scale is None else matrix(row_scale.unsqueeze(-1)),
        values.data_ptr(),
        indices.data_ptr(),
        q,
        n,
        d,
        k,
        largest,
        digits,
        torch.get_num_threads(),
    )
    return values, indices
