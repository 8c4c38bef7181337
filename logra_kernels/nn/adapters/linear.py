"""Linear layers: nn.Linear and Hugging Face's Conv1D, which keeps the weight transposed."""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from logra_kernels.nn.adapters.base import Adapter, forwards_as, positions_flat, projected, sample_gradients
from logra_kernels.ops import project_rows


class LinearAdapter(Adapter):
    """y = W x (+ b): dW = sum_t dy[t] (x) x[t]. With `bias`, its gradient is one more column: an input of 1."""

    kind = "linear"
    projects_x = True
    mixes_dtypes = True

    def __init__(
        self, d_in: int, d_out: int, argument: str = "input", bias: bool = False, transposed: bool = False
    ) -> None:
        super().__init__(d_in + bias, d_out)
        self.argument, self.bias, self.transposed = argument, bias, transposed

    def check(self, name: str, x: Tensor) -> None:
        if x.dim() < 2 or x.shape[-1] != self.d_in - self.bias:
            raise ValueError(
                f"capture: layer {name!r} got an input {tuple(x.shape)}; it must be [N, ..., {self.d_in - self.bias}],"
                " samples first"
            )

    def keep(self, x: Tensor, p_in: Tensor | None) -> Tensor:
        rows = positions_flat(x)
        if not self.bias:
            return rows if p_in is None else project_rows(rows, p_in)
        if p_in is None:
            return torch.cat([rows, torch.ones_like(rows[..., :1])], dim=-1)
        return project_rows(rows, p_in[:, :-1]) + p_in[:, -1]

    def gradient(
        self,
        kept: Tensor,
        dy: Tensor,
        p_in: Tensor | None,
        p_out: Tensor | None,
        weights: Tensor | None,
        offsets: Tensor | None,
    ) -> Tensor:
        return sample_gradients(kept, positions_flat(dy), None, p_out, weights, offsets)

    def sides(self, kept: Tensor, dy: Tensor, p_in: Tensor | None, p_out: Tensor | None) -> tuple[Tensor, Tensor]:
        return projected(positions_flat(dy), p_out), kept

    def expected(self, module: nn.Module, x: Tensor) -> list[Tensor]:
        weight: Tensor = module.weight  # type: ignore[assignment]
        if weight.dim() != 2 or not weight.is_floating_point() or weight.itemsize < 2:
            return []
        return [F.linear(x.to(weight.dtype), weight.T if self.transposed else weight, module.bias)]  # type: ignore[arg-type]

    def parameters(self, module: nn.Module) -> list[Tensor]:
        return [module.weight, module.bias] if self.bias else [module.weight]  # type: ignore[list-item]

    def matrix(self, grads: list[Tensor]) -> Tensor:
        dw = grads[0].T if self.transposed else grads[0]
        return torch.cat([dw, grads[1][:, None]], dim=1) if self.bias else dw


def adapt_linear(module: nn.Module, bias: bool) -> Adapter | None:
    # nn.MultiheadAttention's out_proj, which is never called as a module, is a part of it (`adapt_attention`)
    if not isinstance(module, nn.Linear) or isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return None
    adapter = LinearAdapter(module.in_features, module.out_features, bias=bias and module.bias is not None)
    adapter.known = forwards_as(module, nn.Linear)
    return adapter


def adapt_hugging_face_conv1d(module: nn.Module, bias: bool) -> Adapter | None:
    owner = sys.modules.get("transformers.pytorch_utils")  # a model that has one has imported it
    if owner is None or not isinstance(module, owner.Conv1D):
        return None
    adapter = LinearAdapter(module.nx, module.nf, "x", bias, transposed=True)
    adapter.known = forwards_as(module, owner.Conv1D)
    return adapter
