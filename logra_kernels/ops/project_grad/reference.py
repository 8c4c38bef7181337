"""The definition of project_grad. Runs on any device and dtype; fp64 in, fp64 out."""

from itertools import pairwise

import torch
from torch import Tensor

from logra_kernels.ops._check import accumulator_dtype


def project_grad(
    x: Tensor,
    dy: Tensor,
    p_in: Tensor | None,
    p_out: Tensor | None,
    offsets: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    if offsets is not None:
        cuts = offsets.tolist()
        spans = [slice(a, b) for a, b in pairwise(cuts)]
        w = [None if weights is None else weights[None, span] for span in spans]
        parts = [project_grad(x[None, s], dy[None, s], p_in, p_out, None, v) for s, v in zip(spans, w, strict=True)]
        k_out, k_in = (v.shape[-1] if p is None else p.shape[0] for v, p in ((dy, p_out), (x, p_in)))
        return torch.cat(parts) if parts else dy.new_zeros((0, k_out, k_in), dtype=accumulator_dtype(dy.dtype))
    a = x if p_in is None else torch.einsum("nti,ki->ntk", x.to(p_in.dtype), p_in)
    b = dy if p_out is None else torch.einsum("nto,ko->ntk", dy.to(p_out.dtype), p_out)
    if weights is not None:
        kept = (weights != 0)[..., None]
        a, b = torch.where(kept, a, 0), torch.where(kept, b * weights[..., None], 0)
    dtype = accumulator_dtype(dy.dtype)
    return torch.einsum("ntk,ntj->nkj", b.to(dtype), a.to(dtype))
