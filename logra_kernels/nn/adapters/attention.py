"""Projections of nn.MultiheadAttention, which calls none of them: `nn.attention` does so while it is tapped."""

import torch.nn.functional as F
from torch import Tensor, nn

from logra_kernels.nn.adapters.base import forwards_as
from logra_kernels.nn.adapters.linear import LinearAdapter


class AttentionAdapter(LinearAdapter):
    """One projection: "in_proj", that of q, k and v by one parameter [3 E, E], or "q_proj", "k_proj", "v_proj", where
    k and v have widths of their own; and "out_proj".

    Args:
        rows: Which rows of in_proj_bias are this projection's.
    """

    argument = "query"
    flattens = False

    def __init__(self, module: nn.MultiheadAttention, part: str, bias: bool, rows: slice | None = None) -> None:
        self.part, self._rows = part, rows
        d_out, d_in = self.weight(module).shape
        self.samples_at = 0 if module.batch_first else 1
        super().__init__(d_in, d_out, bias=bias and module.in_proj_bias is not None)

    def weight(self, module: nn.Module) -> Tensor:
        return module.out_proj.weight if self.part == "out_proj" else getattr(module, f"{self.part}_weight")  # type: ignore

    def parameters(self, module: nn.Module) -> list[Tensor]:
        bias: Tensor = module.out_proj.bias if self.part == "out_proj" else module.in_proj_bias  # type: ignore
        return [self.weight(module), bias] if self.bias else [self.weight(module)]

    def matrix(self, grads: list[Tensor]) -> Tensor:
        return super().matrix([grads[0], *(b if self._rows is None else b[self._rows] for b in grads[1:])])

    def part_of_rows(self, start: int, stop: int) -> "RowsAdapter":
        return RowsAdapter(self, start, stop)


class RowsAdapter(LinearAdapter):
    """Rows start .. stop of another's weight, by themselves: the rest of them has other inputs."""

    def __init__(self, whole: LinearAdapter, start: int, stop: int) -> None:
        super().__init__(whole.d_in - whole.bias, whole.d_out, bias=whole.bias)
        self.start, self.stop = start, stop

    def gradient(
        self,
        kept: Tensor,
        dy: Tensor,
        p_in: Tensor | None,
        p_out: Tensor | None,
        weights: Tensor | None,
        offsets: Tensor | None,
    ) -> Tensor:
        g = super().gradient(kept, dy, p_in, self._own(p_out), weights, offsets)
        return F.pad(g, (0, 0, self.start, self.d_out - self.stop)) if p_out is None else g

    def sides(self, kept: Tensor, dy: Tensor, p_in: Tensor | None, p_out: Tensor | None) -> tuple[Tensor, Tensor]:
        left, right = super().sides(kept, dy, p_in, self._own(p_out))
        return F.pad(left, (self.start, self.d_out - self.stop)) if p_out is None else left, right

    def _own(self, p_out: Tensor | None) -> Tensor | None:
        return None if p_out is None else p_out[:, self.start : self.stop]


def adapt_attention(module: nn.Module, bias: bool) -> dict[str, AttentionAdapter]:
    """Part -> its adapter; nothing for another module, or one that computes attention in its own way."""
    if not isinstance(module, nn.MultiheadAttention) or not forwards_as(module, nn.MultiheadAttention):
        return {}
    if type(module.out_proj) is not nn.modules.linear.NonDynamicallyQuantizableLinear:
        return {}
    if module._qkv_same_embed_dim:
        made = [AttentionAdapter(module, "in_proj", bias)]
    else:
        e = module.embed_dim
        names = ("q_proj", "k_proj", "v_proj")
        made = [AttentionAdapter(module, name, bias, slice(i * e, (i + 1) * e)) for i, name in enumerate(names)]
    return {adapter.part: adapter for adapter in (*made, AttentionAdapter(module, "out_proj", bias))}
