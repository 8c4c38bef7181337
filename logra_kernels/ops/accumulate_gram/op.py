"""accumulate_gram: running second moment of rows, the raw projected Fisher before its division by N.

out += g^T g        [d, d], fp32 or fp64, in place
"""

import torch
from torch import Tensor

from logra_kernels.ops._check import accumulator_dtype, check_tensors
from logra_kernels.ops._dispatch import LIB, launcher

LIB.define("accumulate_gram(Tensor g, Tensor(a!) out, str backend) -> ()")


def _launch(g: Tensor, out: Tensor, backend: str) -> None:
    launcher("accumulate_gram", g.device.type, backend)(g, out)


LIB.impl("accumulate_gram", _launch, "CPU")
LIB.impl("accumulate_gram", _launch, "CUDA")


@torch.library.register_fake("logra_kernels::accumulate_gram", lib=LIB)
def _fake(g: Tensor, out: Tensor, backend: str) -> None:
    return None


_op = torch.ops.logra_kernels.accumulate_gram.default


def accumulate_gram(g: Tensor, out: Tensor, *, backend: str = "auto") -> None:
    """Add g^T g to `out` in place (Choe et al. 2024, section 3.1: the projected Hessian's sum).

    Args:
        g: Rows, [N, d], any strides.
        out: Running sum, [d, d], contiguous; fp32, or fp64 for fp64 rows. Symmetric results stay bitwise symmetric.
        backend: "auto", "cpp", "triton" or "reference"; an unavailable one raises RuntimeError.

    Raises:
        ValueError: Sizes, dtypes or devices do not fit.
    """
    check_tensors("accumulate_gram", g=g, out=out)
    if g.dim() != 2 or out.shape != (g.shape[1], g.shape[1]):
        raise ValueError(f"accumulate_gram: g {tuple(g.shape)} must be [N, d] and out {tuple(out.shape)} [d, d]")
    if out.dtype != accumulator_dtype(g.dtype):
        raise ValueError(
            f"accumulate_gram: out is {out.dtype}; it must be {accumulator_dtype(g.dtype)} for {g.dtype} g"
        )
    if not out.is_contiguous():
        raise ValueError("accumulate_gram: out must be contiguous, as it is written in place")
    _op(g, out, backend)
