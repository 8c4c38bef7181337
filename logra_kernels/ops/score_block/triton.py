"""Triton launchers: the shared score kernels without row factors."""

from torch import Tensor

from logra_kernels.ops._format import EncodedRows
from logra_kernels.ops._queries import operand
from logra_kernels.ops._score import score, score_encoded


def launch(queries: Tensor, rows: Tensor) -> Tensor:
    return score(queries, rows)


def launch_encoded(queries: Tensor, rows: EncodedRows, digits: int) -> Tensor:
    """Products of int8 where `digits` is 1 and the codes are whole numbers, in fp32 otherwise."""
    return score_encoded(operand(queries, rows.format, digits), rows)
