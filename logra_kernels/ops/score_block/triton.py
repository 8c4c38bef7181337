"""Triton launchers: the shared score kernels without row factors."""

from torch import Tensor

from logra_kernels.ops._format import EncodedRows
from logra_kernels.ops._score import score, score_encoded


def launch(queries: Tensor, rows: Tensor) -> Tensor:
    return score(queries, rows)


def launch_encoded(queries: Tensor, rows: EncodedRows, digits: int) -> Tensor:
    """Products in fp32, whatever `digits` allows."""
    return score_encoded(queries, rows)
