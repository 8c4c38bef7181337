"""Gains of layer norms: LayerNorm, RMSNorm and Hugging Face's own copies of it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from logra_kernels.nn.adapters.base import Adapter, forwards_as, positions_flat, projected, sample_gradients


class NormAdapter(Adapter):
    """y = w * normed(x) (+ b): the gain's gradient sum_t dy[t] * normed(x)[t], a [d, 1] matrix."""

    kind = "norm"

    def __init__(self, width: int, argument: str, eps: float, centred: bool) -> None:
        super().__init__(1, width)
        self.argument, self.eps, self.centred = argument, eps, centred

    def check(self, name: str, x: Tensor) -> None:
        if x.dim() < 2 or x.shape[-1] != self.d_out:
            raise ValueError(
                f"capture: layer {name!r} got an input {tuple(x.shape)}; it must be [N, ..., {self.d_out}],"
                " samples first"
            )

    def keep(self, x: Tensor, p_in: Tensor | None) -> Tensor:
        rows = positions_flat(x)
        wide = rows if rows.dtype == torch.float64 else rows.float()
        if self.centred:
            return F.layer_norm(wide, (self.d_out,), eps=self.eps).to(rows.dtype)
        return F.rms_norm(wide, (self.d_out,), eps=self.eps).to(rows.dtype)

    def gradient(
        self,
        kept: Tensor,
        dy: Tensor,
        p_in: Tensor | None,
        p_out: Tensor | None,
        weights: Tensor | None,
        offsets: Tensor | None,
    ) -> Tensor:
        gain = positions_flat(dy) * kept.to(dy.dtype)
        ones = torch.ones_like(gain[..., :1])
        return sample_gradients(ones, gain, p_in, p_out, weights, offsets)

    def sides(self, kept: Tensor, dy: Tensor, p_in: Tensor | None, p_out: Tensor | None) -> tuple[Tensor, Tensor]:
        gain = positions_flat(dy) * kept.to(dy.dtype)
        return projected(gain, p_out), projected(torch.ones_like(gain[..., :1]), p_in)

    def expected(self, module: nn.Module, x: Tensor) -> list[Tensor]:
        normed, shift = self.keep(x, None).view_as(x), getattr(module, "bias", None)
        y = normed * module.weight  # type: ignore[operator]
        return [one if shift is None else one + shift for one in (y, y + normed)]  # gains may count from 0 or from 1

    def matrix(self, grads: list[Tensor]) -> Tensor:
        return grads[0][:, None]


def adapt_norm(module: nn.Module, bias: bool) -> Adapter | None:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1:
        return None
    eps = getattr(module, "variance_epsilon", None)
    if isinstance(module, nn.LayerNorm):
        adapter = NormAdapter(len(weight), "input", module.eps, centred=True)
        adapter.known = forwards_as(module, nn.LayerNorm)
    elif isinstance(module, nn.RMSNorm):
        adapter = NormAdapter(len(weight), "x", module.eps or torch.finfo(weight.dtype).eps, centred=False)
        adapter.known = forwards_as(module, nn.RMSNorm)
    elif type(module).__name__.endswith("RMSNorm") and isinstance(eps, float):  # Hugging Face's own copies
        adapter = NormAdapter(len(weight), "hidden_states", eps, centred=False)
        adapter.known = "forward" not in vars(module)
    else:
        return None
    return adapter
