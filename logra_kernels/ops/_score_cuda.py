"""What the CUDA C++ launchers of score_block and score_topk share: operands, whose kernels take them, how D is cut."""

from dataclasses import dataclass

import torch
from torch import Tensor

from logra_kernels import _C_cuda
from logra_kernels.ops._device import cuda_arch, device_of, pieces_of, programs_of
from logra_kernels.ops._format import EncodedRows
from logra_kernels.ops._native import Encoded, Matrix, encoded, matrix, row_major
from logra_kernels.ops._queries import operand


@dataclass(frozen=True)
class Operands:
    """Queries and rows as the kernels take them: rows of neighbours, int8 queries as codes."""

    queries: Tensor | EncodedRows
    rows: Tensor | EncodedRows

    @classmethod
    def of(cls, op: str, queries: Tensor, rows: Tensor | EncodedRows, digits: int) -> "Operands":
        """digits 1: queries are rounded to int8, and multiplied as such beside whole codes.

        Raises:
            RuntimeError: Operands in fp64.
        """
        if isinstance(rows, Tensor):
            if rows.dtype == torch.float64:
                raise RuntimeError(f"{op}: backend 'cuda' has no fp64 kernel; use 'triton' or 'reference'")
            return cls(queries, rows)
        return cls(operand(queries, rows.format, digits), row_major(rows))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Q, N, D."""
        return len(self.queries), *self.rows.shape

    @property
    def device(self) -> torch.device:
        return self.rows.device

    @property
    def arch(self) -> int:
        return cuda_arch(self.rows if isinstance(self.rows, Tensor) else self.rows.codes, _C_cuda.has_sm_90a())

    @property
    def native(self) -> tuple[Matrix | Encoded, Matrix | Encoded]:
        """Addresses and strides, good while this object lives."""
        return _native(self.queries), _native(self.rows)

    def some(self, queries: slice, rows: slice) -> "Operands":
        return Operands(self.queries[queries], self.rows[rows])

    def cut(self) -> tuple[int, int]:
        """(numbers of a piece of D, pieces): D is cut only where few tiles would leave processors without work."""
        q, n, d = self.shape
        queries, rows, depth = _C_cuda.score_tile(*self.native, q)
        tiles, steps = -(-q // queries) * -(-n // rows), max(1, -(-d // depth))
        codes = self.rows if isinstance(self.rows, Tensor) else self.rows.codes
        piece = depth * -(-steps // pieces_of(tiles, steps, programs_of(codes)))
        return piece, max(1, -(-d // piece))


def scores(operands: Operands, row_scale: Tensor | None = None) -> Tensor:
    """[Q, N] in fp32, each row's times its factor."""
    q, n, d = operands.shape
    out = torch.empty((q, n), dtype=torch.float32, device=operands.device)
    if not out.numel():
        return out
    piece, pieces = operands.cut()
    partial = out if pieces == 1 else out.new_empty((pieces, q, n))
    with device_of(out):
        stream = torch.cuda.current_stream(out.device).cuda_stream
        addresses = out.data_ptr(), partial.data_ptr()
        _C_cuda.score_block(operands.arch, *operands.native, *addresses, q, n, d, piece, pieces, stream)
    return out if row_scale is None else out.mul_(row_scale)


def _native(rows: Tensor | EncodedRows) -> Matrix | Encoded:
    return matrix(rows) if isinstance(rows, Tensor) else encoded(rows)
