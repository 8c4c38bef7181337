"""Triton launcher: the shared score kernel without row factors."""

from torch import Tensor

from logra_kernels.ops._score import score


def launch(queries: Tensor, rows: Tensor) -> Tensor:
    return score(queries, rows)
