"""CUDA C++ launchers of score_block: rows of numbers or codes, on the tensor cores in bf16 parts or as int8.

Products of fp8 are not among them: the tensor cores multiply fp8 no faster than int8, and queries rounded to fp8, in
blocks of 128, move scores by 2.6 % of a standard deviation where int8 queries move them by 0.7 %.
"""

from torch import Tensor

from logra_kernels.ops._format import EncodedRows
from logra_kernels.ops._score_cuda import Operands, scores


def launch(queries: Tensor, rows: Tensor) -> Tensor:
    return scores(Operands.of("score_block", queries, rows, 0))


def launch_encoded(queries: Tensor, rows: EncodedRows, digits: int) -> Tensor:
    """Products of int8 where `digits` is 1 and the codes are whole numbers, in bf16 parts otherwise."""
    return scores(Operands.of("score_block", queries, rows, digits))
