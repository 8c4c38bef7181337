"""Triton launcher: the shared score kernel takes blocks of rows; a stable sort merges each into the best so far."""

import torch
from torch import Tensor

from logra_kernels.ops._best import rows_at_once, select
from logra_kernels.ops._check import accumulator_dtype
from logra_kernels.ops._format import EncodedRows
from logra_kernels.ops._queries import operand
from logra_kernels.ops._score import score, score_encoded


def launch(queries: Tensor, rows: Tensor, k: int, row_scale: Tensor | None, largest: bool) -> tuple[Tensor, Tensor]:
    most = min(len(rows), rows_at_once(len(queries)))

    def scores(span: slice) -> Tensor:
        return score(queries, rows[span], None if row_scale is None else row_scale[span], most)

    return select(scores, queries.shape[0], rows.shape[0], k, largest, rows.device, accumulator_dtype(rows.dtype))


def launch_encoded(
    queries: Tensor, rows: EncodedRows, k: int, row_scale: Tensor | None, largest: bool, digits: int
) -> tuple[Tensor, Tensor]:
    """Products as in score_block."""
    asked, most = operand(queries, rows.format, digits), min(len(rows), rows_at_once(len(queries)))

    def scores(span: slice) -> Tensor:
        return score_encoded(asked, rows[span], None if row_scale is None else row_scale[span], most)

    return select(scores, queries.shape[0], len(rows), k, largest, rows.device, torch.float32)
