"""The tap: an autograd Function that lets y and dy pass and gives a probe the projected gradient of each sample.

    forward    what the layer's adapter keeps of x is saved (a[n,t] = P_in x[n,t] for a linear one);  y passes through
    backward   d loss / d probe[n] := sum_t w[n,t] (P_out dy[n,t]) (x) a[n,t];  dy passes through

Adding a zero probe[n] to the projected weight of sample n would have this gradient, so autograd itself sums over reuse
and tied weights, and `torch.autograd.grad(loss, probe)`, checkpointing and torch.compile need nothing special.
"""

from collections.abc import Collection, Iterable

import torch
from torch import Tensor

from logra_kernels.errors import LograError
from logra_kernels.nn.adapters import Adapter

TWICE = (
    "capture: a tap cannot be differentiated twice; no rows can be had of a loss that holds a gradient (a gradient"
    " penalty, forces)"
)


def alias(y: Tensor) -> Tensor:
    """y under another name: returned as it is, a Function makes it a view that in-place code may not write to."""
    return y.detach()


class Refused(torch.autograd.Function):
    """y passes; a gradient that comes back raises `error`, since no tap could tell whose it is.

    So a layer may be called with something else than the samples (its weight's norm by way of the identity) where no
    gradient goes through.
    """

    @staticmethod
    def forward(ctx, y: Tensor, armed: Tensor, error: Exception) -> Tensor:
        ctx.error = error
        ctx.set_materialize_grads(False)
        return alias(y)

    @staticmethod
    def backward(ctx, dy: Tensor | None):
        if dy is not None:
            raise ctx.error
        return None, None, None


def check_heard(who: str, layers: Iterable[str], heard: Collection[str], advice: str) -> None:
    """Raise LograError unless every layer received a gradient."""
    names = list(layers)
    silent = [name for name in names if name not in heard]
    if silent:
        some = ", ".join(silent[:4]) + (", ..." if len(silent) > 4 else "")
        raise LograError(f"{who}: {len(silent)} of {len(names)} layers received no gradient ({some}): {advice}")


class Tap(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        y: Tensor,
        x: Tensor,
        probe: Tensor,
        p_in: Tensor | None,
        p_out: Tensor | None,
        weights: Tensor | None,
        offsets: Tensor | None,
        adapter: Adapter,
        kept: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(adapter.keep(x, p_in) if kept is None else kept)
        ctx.constants = adapter, p_in, p_out, weights, offsets
        return alias(y)

    @staticmethod
    def backward(ctx, dy: Tensor):
        # the decorator's own work is a quarter of a tiny layer's tap
        return _backward_once(ctx, dy) if torch.is_grad_enabled() else _backward(ctx, dy)


def _backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
    (kept,) = ctx.saved_tensors
    adapter, p_in, p_out, weights, offsets = ctx.constants
    return dy, None, adapter.gradient(kept, dy, p_in, p_out, weights, offsets), None, None, None, None, None, None


def _backward_once(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
    with torch.no_grad():
        _, _, gradient, *rest = _backward(ctx, dy)
    if dy.requires_grad:
        assert gradient is not None
        dy, gradient = torch._C._functions.DelayedError(TWICE, 2)(dy, gradient)
    return dy, None, gradient, *rest
