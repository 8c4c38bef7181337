"""The definition of factor_rows. Runs on any device and dtype; fp64 in, fp64 out."""

import torch
from torch import Tensor

from logra_kernels.ops._check import accumulator_dtype
from logra_kernels.ops._factored import Layers, factored_dim, parts


def factor_rows(rows: Tensor, layers: Layers, rank: int) -> Tensor:
    n, dtype = rows.shape[0], accumulator_dtype(rows.dtype)
    out = torch.zeros((n, factored_dim(layers, rank)), dtype=dtype, device=rows.device)
    for (k_out, k_in), (dense, left, right) in zip(layers, parts(layers, rank), strict=True):
        if not n * k_out * k_in:
            continue
        g = rows[:, dense].to(dtype).reshape(n, k_out, k_in)
        finite = g.isfinite().flatten(1).all(dim=1)
        u, sigma, v = torch.linalg.svd(torch.where(finite[:, None, None], g, 0), full_matrices=False)
        kept = min(rank, k_out, k_in)
        root = torch.where(finite[:, None], sigma[:, :kept].sqrt(), torch.nan)[..., None]
        out[:, left].view(n, rank, k_out)[:, :kept] = root * u.mT[:, :kept]
        out[:, right].view(n, rank, k_in)[:, :kept] = root * v[:, :kept]
    return out
