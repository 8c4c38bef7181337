"""CUDA C++ launcher of project_grad: bf16, fp16 and fp32 (which it multiplies exactly; there is no tf32 here).

Half operands whose rows the copy engine can fetch go through the kernels of sm_90a on a device of compute capability
9.0; everything else, and everything under LOGRA_KERNELS_CUDA_PATH=sm_80, through those of sm_80.
"""

import torch
from torch import Tensor

from logra_kernels import _C_cuda
from logra_kernels.ops._check import HALVES
from logra_kernels.ops._device import cuda_arch, programs_of
from logra_kernels.ops._native import DTYPE_CODE, matrix
from logra_kernels.ops.project_grad.chunks import cut, partials_of

CLUSTER = 0  # blocks of sm_90a that share what they read of a factor: 1, 2, 4, or 0 for as many as suit the work


def launch(
    x: Tensor, dy: Tensor, p_in: Tensor | None, p_out: Tensor | None, offsets: Tensor | None, weights: Tensor | None
) -> Tensor:
    if dy.dtype == torch.float64:
        raise RuntimeError("project_grad: backend 'cuda' has no fp64 kernel; use 'triton' or 'reference'")
    x, dy, p_in, p_out, element = _alike(x, dy, p_in, p_out)
    code = DTYPE_CODE[element]
    n = x.shape[0] if offsets is None else offsets.shape[0] - 1
    t, d_in, d_out = x.shape[-2], x.shape[-1], dy.shape[-1]
    k_in, k_out = (v.shape[-1] if p is None else p.shape[0] for p, v in ((p_in, x), (p_out, dy)))
    g = torch.empty((n, k_out, k_in), dtype=torch.float32, device=dy.device)
    if not g.numel():
        return g
    if not t:
        return g.zero_()
    arch = arch_of(x, dy, p_in, p_out, element)
    most_t, least_t, tiles = _C_cuda.project_grad_tiling(arch, code, k_in, k_out, p_out is None)
    block_t, chunk = cut(n, t, offsets is not None, tiles, most_t, programs_of(dy), partials_of(x, dy, g), least_t)
    cuts = ends = None
    if offsets is None:
        chunks = n * -(-t // chunk)
    else:
        cuts, chunks = offsets.to(torch.int64), n + t // chunk
        ends = ((cuts.diff() + chunk - 1) // chunk).cumsum(0)
    partial = g if offsets is None and chunks == n else g.new_empty((chunks, k_out, k_in))
    with torch.cuda.device(dy.device):
        _C_cuda.project_grad(
            arch,
            code,
            block_t,
            _positions(x),
            _positions(dy),
            None if p_in is None else matrix(p_in),
            None if p_out is None else matrix(p_out),
            (0, 0, 0) if weights is None else (weights.data_ptr(), *_positions(weights.unsqueeze(-1))[2:4]),
            0 if cuts is None else cuts.data_ptr(),
            0 if cuts is None else cuts.stride(0),
            0 if ends is None else ends.data_ptr(),
            g.data_ptr(),
            partial.data_ptr(),
            n,
            t,
            chunk,
            chunks,
            d_in,
            d_out,
            k_in,
            k_out,
            CLUSTER,
            torch.cuda.current_stream(dy.device).cuda_stream,
        )
    return g


def _alike(
    x: Tensor, dy: Tensor, p_in: Tensor | None, p_out: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, torch.dtype]:
    """The operands as the kernels take them, and their dtype: that of all that is projected here and its factors.

    Positions that meet a factor of another dtype are copied in it; positions without a factor may stay fp32.
    """
    x, dy = (v if p is None else v.to(p.dtype) for v, p in ((x, p_in), (dy, p_out)))
    projected = {v.dtype for v, p in ((x, p_in), (dy, p_out)) if p is not None} or {dy.dtype}
    element = projected.pop() if len(projected) == 1 else torch.float32
    x, dy = (
        v if v.dtype == element or (p is None and v.dtype == torch.float32) else v.float()
        for v, p in ((x, p_in), (dy, p_out))
    )
    p_in, p_out = (None if p is None else p.to(element) for p in (p_in, p_out))
    return x, dy, p_in, p_out, element


def arch_of(x: Tensor, dy: Tensor, p_in: Tensor | None, p_out: Tensor | None, element: torch.dtype) -> int:
    """80 or 90: whose kernels take these operands, on their device."""
    if cuda_arch(dy, _C_cuda.has_sm_90a()) == 80:
        return 80
    sides = [(v, p) for v, p in ((x, p_in), (dy, p_out)) if p is not None]
    fetched = p_out is not None and all(_mapped(v) and _mapped(p) for v, p in sides)
    return 90 if element in HALVES and fetched else 80


def _mapped(v: Tensor) -> bool:
    """Whether a tensor map describes v, [N, T, d] or [R, d]: aligned rows of neighbours, samples of whole rows, one
    after the other."""
    samples = v.dim() == 2 or len(v) < 2 or (v.stride(0) % v.stride(1) == 0 and v.stride(0) >= len(v[0]) * v.stride(1))
    return (
        v.numel() > 0
        and samples
        and v.stride(-1) == 1
        and v.stride(-2) >= v.shape[-1]
        and v.stride(-2) * v.element_size() % 16 == 0
        and v.stride(0) * v.element_size() < 2**40
        and v.data_ptr() % 16 == 0
        and max(v.shape) < 2**31
    )


def _positions(v: Tensor) -> tuple[int, ...]:
    """Address, dtype code, and strides by sample, position and feature; ragged positions have no sample stride."""
    return (v.data_ptr(), DTYPE_CODE[v.dtype], *(v.stride() if v.dim() == 3 else (0, *v.stride())))
