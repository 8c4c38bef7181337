"""Covariances over positions: what KFAC is made of.

    A = sum over positions of (P_in x) (P_in x)^T,   B = sum over positions of (P_out dy) (P_out dy)^T      uncentred

A mode of the taps: the same hooks, and a backward that adds to A and B instead of making gradients.
"""

import torch
from torch import Tensor

from logra_kernels.errors import LograError
from logra_kernels.nn.adapters import Adapter
from logra_kernels.nn.tap import alias, check_heard
from logra_kernels.ops import accumulate_gram


class CovarianceTap(torch.autograd.Function):
    """y and dy pass; A and B grow. The probe makes the backward come by here when all weights are frozen."""

    @staticmethod
    def forward(
        ctx,
        y: Tensor,
        x: Tensor,
        probe: Tensor,
        p_in: Tensor | None,
        p_out: Tensor | None,
        weights: Tensor | None,
        adapter: Adapter,
        sums: "LayerCovariance",
    ) -> Tensor:
        ctx.save_for_backward(adapter.keep(x, p_in), p_in, p_out, weights)
        ctx.adapter, ctx.sums = adapter, sums
        return alias(y)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor):
        kept, p_in, p_out, weights = ctx.saved_tensors
        ctx.sums.add(*ctx.adapter.sides(kept, dy, p_in, p_out), weights, ctx.adapter.repeats)
        return dy, None, torch.zeros_like(dy[(0,) * dy.dim()]), None, None, None, None, None


class LayerCovariance:
    """Sums of one layer.

    Attributes:
        a, b: [k_in, k_in] and [k_out, k_out] fp32 (fp64 for an fp64 model).
        positions: How many positions were summed over; those of weight 0 do not count.
    """

    def __init__(self, k_out: int, k_in: int, device: torch.device, dtype: torch.dtype) -> None:
        self.a = torch.zeros(k_in, k_in, device=device, dtype=dtype)
        self.b = torch.zeros(k_out, k_out, device=device, dtype=dtype)
        self.positions = 0

    def add(self, left: Tensor, right: Tensor, weights: Tensor | None, repeats: int) -> None:
        left, right = left.detach().to(self.b.dtype).flatten(0, 1), right.detach().to(self.a.dtype).flatten(0, 1)
        if weights is not None:
            factor = weights.repeat(1, repeats).flatten().to(left.dtype)
            kept = factor != 0
            left, right = left[kept] * factor[kept][:, None], right[kept]
        accumulate_gram(right, self.a)
        accumulate_gram(left, self.b)
        self.positions += len(left)


class Covariances:
    """The sums of all layers. Made by `Taps.covariances`; eager models only."""

    def __init__(self, layers: dict[str, tuple[int, int]]) -> None:
        self._layers = layers
        self._sums: dict[str, LayerCovariance] = {}
        self.samples = 0

    def tap(
        self,
        name: str,
        adapter: Adapter,
        y: Tensor,
        x: Tensor,
        p_in: Tensor | None,
        p_out: Tensor | None,
        weights: Tensor | None,
    ) -> Tensor:
        """y, with this layer's covariances tapped; what the taps' hooks call."""
        if torch.compiler.is_compiling():
            raise RuntimeError("covariances: a compiled model cannot be observed; run the model itself")
        if name not in self._sums:
            dtype = torch.float64 if y.dtype == torch.float64 else torch.float32
            self._sums[name] = LayerCovariance(*self._layers[name], y.device, dtype)
        probe = torch.zeros((), dtype=y.dtype, device=y.device, requires_grad=True)
        return CovarianceTap.apply(y, x, probe, p_in, p_out, weights, adapter, self._sums[name])

    @property
    def layers(self) -> dict[str, LayerCovariance]:
        """Layer name -> its sums.

        Raises:
            LograError: A layer saw no backward, or its sums are not finite.
        """
        heard = [name for name, sums in self._sums.items() if sums.positions]
        check_heard("covariances", self._layers, heard, "run forward and backward of the model inside")
        for name, sums in self._sums.items():
            if not (sums.a.isfinite().all() and sums.b.isfinite().all()):
                raise LograError(f"covariances: those of layer {name!r} are NaN or infinite; check the model's loss")
        return {name: self._sums[name] for name in self._layers}
