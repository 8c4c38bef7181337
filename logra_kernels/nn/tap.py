"""The tap: an autograd Function that lets y and dy pass and gives a probe the projected gradient of each sample.

    forward    a[n,t] = P_in x[n,t]  is saved;  y passes through
    backward   d loss / d probe[n] := sum_t w[n,t] (P_out dy[n,t]) (x) a[n,t];  dy passes through

Adding a zero probe[n] to the projected weight of sample n would have this gradient, so autograd itself sums over reuse and
tied weights, and `torch.autograd.grad(loss, probe)`, checkpointing and torch.compile need nothing special.
"""

import math

import torch
from torch import Tensor

from logra_kernels.ops import project_grad, project_rows


class Tap(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, y: Tensor, x: Tensor, probe: Tensor, p_in: Tensor | None, p_out: Tensor | None, weights: Tensor | None
    ) -> Tensor:  # type: ignore[override]
        rows = x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])
        a = rows if p_in is None else project_rows(rows, p_in)
        ctx.save_for_backward(a, p_out, weights)
        # a plain alias: returning y itself would make it a view that in-place activations may not write to
        return torch.ops.aten._unsafe_view(y, y.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor):  # type: ignore[override]
        a, p_out, weights = ctx.saved_tensors
        rows = dy.reshape(a.shape[0], a.shape[1], dy.shape[-1])
        return dy, None, project_grad(a, rows, None, p_out, None, weights), None, None, None
