"""project_grad: per-sample gradient of a linear layer, projected on both sides.

    G[n] = sum_{t of n} w[t] (P_out dy[t]) (P_in x[t])^T        [N, k_out, k_in], fp32 (fp64 for fp64 input)

A batch is R positions cut into N samples by `offsets`; a dense [N, T, d] batch is the case of equal lengths.
"""

import weakref
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from logra_kernels.ops._check import accumulator_dtype, check_factor, check_tensors
from logra_kernels.ops._dispatch import LIB, eager, is_native, launcher

INTEGERS = (torch.int32, torch.int64)

LIB.define(
    "project_grad(Tensor x, Tensor dy, Tensor? p_in, Tensor? p_out, Tensor? offsets, Tensor? weights, str backend)"
    " -> Tensor"
)


def _launch(
    x: Tensor,
    dy: Tensor,
    p_in: Tensor | None,
    p_out: Tensor | None,
    offsets: Tensor | None,
    weights: Tensor | None,
    backend: str,
) -> Tensor:
    if offsets is not None:
        _check_offsets(offsets, x.shape[0])
    return launcher("project_grad", dy.device.type, backend)(x, dy, p_in, p_out, offsets, weights)


_passed: tuple[weakref.ref[Tensor], int, int] | None = None  # the offsets on a device that were checked last


def _check_offsets(offsets: Tensor, rows: int) -> None:
    """Reading them waits for the device, so that a batch's offsets are read once and not for every layer."""
    global _passed
    if _passed is not None and (_passed[0]() is offsets, *_passed[1:]) == (True, offsets._version, rows):
        return
    cuts = offsets.tolist()
    if cuts[0] < 0 or cuts[-1] > rows or any(b < a for a, b in pairwise(cuts)):
        raise ValueError(f"project_grad: offsets {cuts[:8]}... must not decrease and must stay within 0..{rows}")
    _passed = weakref.ref(offsets), offsets._version, rows


LIB.impl("project_grad", _launch, "CPU")
LIB.impl("project_grad", _launch, "CUDA")


@torch.library.register_fake("logra_kernels::project_grad", lib=LIB)
def _fake(
    x: Tensor,
    dy: Tensor,
    p_in: Tensor | None,
    p_out: Tensor | None,
    offsets: Tensor | None,
    weights: Tensor | None,
    backend: str,
) -> Tensor:
    samples = x.shape[0] if offsets is None else offsets.shape[0] - 1
    k_out = dy.shape[-1] if p_out is None else p_out.shape[0]
    k_in = x.shape[-1] if p_in is None else p_in.shape[0]
    return dy.new_empty((samples, k_out, k_in), dtype=accumulator_dtype(dy.dtype))


_op = torch.ops.logra_kernels.project_grad.default


def _check_shape(name: str, p: Tensor, k: str, positions: str, v: Tensor) -> None:
    d = v.shape[-1]
    if p.dim() != 2 or p.shape[1] != d:
        raise ValueError(f"project_grad: {name} {tuple(p.shape)} must be [{k}, {d}] to fit {positions}")
    if p.shape[0] > d:
        raise ValueError(
            f"project_grad: {name} {tuple(p.shape)} has more rows than {positions} {tuple(v.shape)} has features; a"
            f" projection must have {k} <= d"
        )


def _check(
    x: Tensor,
    dy: Tensor,
    p_in: Tensor | None,
    p_out: Tensor | None,
    offsets: Tensor | None,
    weights: Tensor | None,
) -> None:
    check_tensors("project_grad", x=x, dy=dy, p_in=p_in, p_out=p_out, weights=weights)
    dims = 3 if offsets is None else 2
    if x.dim() != dims or dy.dim() != dims or x.shape[:-1] != dy.shape[:-1]:
        layout = "[N, T, d]" if offsets is None else "[R, d]"
        raise ValueError(
            f"project_grad: x {tuple(x.shape)} and dy {tuple(dy.shape)} must both be {layout} and agree but in d"
        )
    if p_in is not None:
        check_factor("project_grad", "x", x, "p_in", p_in)
        _check_shape("p_in", p_in, "k_in", "x", x)
    if p_out is not None:
        check_factor("project_grad", "dy", dy, "p_out", p_out)
        _check_shape("p_out", p_out, "k_out", "dy", dy)
    if x.dtype != dy.dtype and not (p_in is None and x.dtype == accumulator_dtype(dy.dtype)):
        raise ValueError(f"project_grad: x is {x.dtype} and dy is {dy.dtype}; only an x that is projected may differ")
    if offsets is not None and (offsets.dim() != 1 or offsets.shape[0] < 1 or offsets.dtype not in INTEGERS):
        raise ValueError(f"project_grad: offsets {tuple(offsets.shape)} {offsets.dtype} must be [N+1] int32 or int64")
    if offsets is not None and offsets.device != x.device:
        raise ValueError(f"project_grad: offsets is on {offsets.device} and x on {x.device}; move one")
    if weights is not None:
        if weights.shape != dy.shape[:-1]:
            raise ValueError(f"project_grad: weights {tuple(weights.shape)} must be {tuple(dy.shape[:-1])}, as dy")
        if weights.dtype != accumulator_dtype(dy.dtype):
            raise ValueError(f"project_grad: weights is {weights.dtype}; it must be {accumulator_dtype(dy.dtype)}")


def kept_dtype(dy: torch.dtype, p_out: Tensor | None) -> torch.dtype:
    """What x that is projected already is rounded to beside dy of this dtype: kept so, it gives the same bits.

    bf16 where the C++ kernels multiply projected positions in it, and else what `project_rows` returns.
    """
    if not is_native("project_grad"):
        return accumulator_dtype(dy)
    return launcher("project_grad", "cpu", "auto", "kept_dtype")(dy, p_out)


AddProjectGrad = Callable[[Tensor, Tensor, Tensor, bool], None]  # x, dy, g, whether g is added to or overwritten


def add_project_grad(x: Tensor, dy: Tensor, p_in: Tensor | None, p_out: Tensor | None) -> AddProjectGrad | None:
    """`g += project_grad(x, dy, p_in, p_out)` as a function of x, dy and g, checked here for a layer's many batches.

    It takes plain CPU tensors of these dtypes outside of autograd: x [N, T, d_in] of this one's shape and
    strides, dy [N * T, d_out] of any strides or contiguous with more dimensions, g [N, k_out, k_in] contiguous in the
    dtype that `project_grad` returns.
    An x that is projected already may also be in `kept_dtype`.

    Returns:
        None where tensors on the CPU do not get the C++ implementation.

    Raises:
        ValueError: As `project_grad`.
    """
    kept = p_in is None and x.dtype == kept_dtype(dy.dtype, p_out)
    _check(x.to(accumulator_dtype(dy.dtype)) if kept else x, dy, p_in, p_out, None, None)
    return (
        launcher("project_grad", "cpu", "auto", "prepare_add")(x, dy, p_in, p_out)
        if is_native("project_grad")
        else None
    )


def project_grad(
    x: Tensor,
    dy: Tensor,
    p_in: Tensor | None,
    p_out: Tensor | None,
    offsets: Tensor | None = None,
    weights: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Project each sample's weight gradient without forming it (Choe et al. 2024, eq. 6).

    Args:
        x: Layer inputs, [N, T, d_in], or [R, d_in] with `offsets`. Any strides.
        dy: Gradients of the loss by the layer's outputs, [N, T, d_out] or [R, d_out].
        p_in: Input-side projection, [k_in, d_in]. Products are taken in its dtype: x's own, bf16 beside an fp32 x,
            which is rounded as it is read, or fp32 beside an x of 16 bits. None where x is projected already, and then
            x may be fp32 beside a bf16 or fp16 `dy`. Where both sides' products are of bf16, projected positions may be
            rounded to it between the products: the C++ kernels do so where the processor multiplies bf16 itself.
        p_out: Output-side projection, [k_out, d_out], likewise beside dy; None where dy is projected already.
        offsets: Sample n is positions offsets[n] .. offsets[n+1]-1; [N+1], int32 or int64. A sample may be empty.
        weights: A factor for each position, [N, T] or [R], fp32 (fp64 for fp64 dy). A position of weight 0 contributes
            nothing, whatever x and dy hold there.
        backend: "auto", "cpp", "triton" or "reference"; an unavailable one raises RuntimeError.

    Returns:
        [N, k_out, k_in] in fp32; fp64 for fp64 input.

    Raises:
        ValueError: Sizes, dtypes, devices or offsets do not fit, or a projection has more rows than features.
    """
    _check(x, dy, p_in, p_out, offsets, weights)
    call = _launch if eager(dy) else _op
    return call(x, dy, p_in, p_out, offsets, weights, backend)
