"""score_block of one set of queries against rows that come block by block, as a store gives them."""

from typing import Any

import torch
from torch import Tensor

from logra_kernels.ops._dispatch import is_native, launcher
from logra_kernels.ops._format import EncodedRows
from logra_kernels.ops.score_block.op import check_encoded, numbers_of, score_block


class Scorer:
    """The scores of any number of blocks, as `score_block` gives them, bit by bit.

    The C++ kernels lay the queries out once for rows that have scales; else each block is a call of its own.

    Args:
        queries, query_format: As in `score_block`; the queries must not change meanwhile.
    """

    def __init__(self, queries: Tensor, query_format: str | None = None) -> None:
        self._queries, self._query_format = queries, query_format
        self._native: Any = None
        if queries.is_cpu and queries.dtype != torch.float64 and is_native("score_block"):
            self._native = launcher("score_block", "cpu", "auto", "Scorer")(queries)

    def score(self, rows: Tensor | EncodedRows, out: Tensor | None = None) -> Tensor:
        """[Q, n] fp32.

        Args:
            rows: [n, D], as in `score_block`; those of all calls in one format.
            out: Where the scores go, [Q, n] fp32 on the queries' device, a part of a wider one's columns, say.

        Raises:
            ValueError: As in `score_block`.
        """
        numbers = numbers_of("score_block", rows, self._query_format)
        if self._native is None or isinstance(numbers, Tensor):
            found = score_block(self._queries, rows, query_format=self._query_format)
            return found if out is None else out.copy_(found)
        digits = check_encoded("score_block", self._queries, numbers, self._query_format)
        if out is None:
            out = torch.empty(len(self._queries), len(rows), dtype=torch.float32, device="cpu")
        if out.shape[1] <= 1 or (out.stride(1) == 1 and (len(out) <= 1 or out.stride(0) >= out.shape[1])):
            self._native.score(numbers, digits, out)
            return out
        return out.copy_(self.score(rows))
