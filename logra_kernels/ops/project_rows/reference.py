"""The definition of project_rows. Runs on any device and dtype; fp64 in, fp64 out."""

import torch
from torch import Tensor

from logra_kernels.ops._check import accumulator_dtype


def project_rows(x: Tensor, p: Tensor) -> Tensor:
    return torch.einsum("ntd,kd->ntk", x.to(p.dtype), p).to(accumulator_dtype(x.dtype))
