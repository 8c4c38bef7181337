"""Triton launchers: the shared score kernels without row factors."""

from torch import Tensor

from logra_kernels.ops._format import EncodedRows
from logra_kernels.ops._queries import as_multiplied
from logra_kernels.ops._score import score, score_encoded


def launch(queries: Tensor, rows: Tensor) -> Tensor:
    return score(queries, rows)


def launch_encoded(queries: Tensor, rows: EncodedRows, digits: int) -> Tensor:
    """Products in fp32; with 1 digit of queries rounded to int8."""
    return score_encoded(as_multiplied(queries, rows.format, digits), rows)
