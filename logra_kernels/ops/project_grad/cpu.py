"""C++ launcher of project_grad."""

from collections.abc import Callable

import torch
from torch import Tensor

from logra_kernels import _C
from logra_kernels.ops._check import accumulator_dtype
from logra_kernels.ops._native import matrix, positions


def launch(
    x: Tensor,
    dy: Tensor,
    p_in: Tensor | None,
    p_out: Tensor | None,
    offsets: Tensor | None,
    weights: Tensor | None,
) -> Tensor:
    *_, d_in = x.shape
    if offsets is None:
        n, t, d_out = dy.shape
        rows, cuts = n * t, None
    else:
        rows, d_out = dy.shape
        n, t = offsets.shape[0] - 1, 0
        cuts = offsets.to(torch.int64).contiguous()
    k_in = d_in if p_in is None else p_in.shape[0]
    k_out = d_out if p_out is None else p_out.shape[0]
    out = torch.empty(n, k_out, k_in, dtype=accumulator_dtype(dy.dtype), device="cpu")
    _C.project_grad(
        positions(x),
        positions(dy),
        None if p_in is None else matrix(p_in),
        None if p_out is None else matrix(p_out),
        None if weights is None else positions(weights.unsqueeze(-1)),
        0 if cuts is None else cuts.data_ptr(),
        out.data_ptr(),
        n,
        t,
        rows,
        d_in,
        d_out,
        k_in,
        k_out,
        torch.get_num_threads(),
    )
    return out


def kept_dtype(dy: torch.dtype, p_out: Tensor | None) -> torch.dtype:
    pairs = p_out is not None and p_out.dtype == torch.bfloat16 and _C.multiplies_bf16()
    return torch.bfloat16 if pairs else accumulator_dtype(dy)


def prepare_add(x: Tensor, dy: Tensor, p_in: Tensor | None, p_out: Tensor | None) -> Callable[..., None]:
    """f(x, dy, g, add): G of x [N, T, d_in], with this one's strides, and of dy to g, or added to it.

    dy: [N * T, d_out], or contiguous with more dimensions.
    """
    (n, t, d_in), d_out = x.shape, dy.shape[-1]
    k_in = d_in if p_in is None else p_in.shape[0]
    k_out = d_out if p_out is None else p_out.shape[0]
    factors = None if p_in is None else matrix(p_in), None if p_out is None else matrix(p_out)
    native = _C.project_grad_adder(positions(x), positions(dy), *factors, n, t, d_in, d_out, k_in, k_out)

    threads = torch.get_num_threads

    def add_project_grad(
        x: Tensor, dy: Tensor, g: Tensor, add: bool, _held: tuple[Tensor | None, Tensor | None] = (p_in, p_out)
    ) -> None:
        strides = (d_out, 1) if dy.is_contiguous() else dy.stride()
        native(x.data_ptr(), dy.data_ptr(), *strides, g.data_ptr(), add, threads())  # type: ignore[call-arg, arg-type]

    return add_project_grad
