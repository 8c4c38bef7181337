"""A linear layer whose weight is spread over processes by columns or by rows (`parallelize_module`).

    by columns     y is this process's part of the outputs:   G = sum over processes of (P_out[:, part] dy) (x) (P_in x)
    by rows        x is this process's part of the inputs:    G = sum over processes of (P_out dy) (x) (P_in[:, part] x)

A process projects with its part of a factor, and the sums are made in the backward, so all processes end with G.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from logra_kernels.nn.adapters.base import Adapter, positions_flat, projected, sample_gradients
from logra_kernels.nn.adapters.linear import LinearAdapter
from logra_kernels.ops import project_rows


class ParallelAdapter(Adapter):
    """One process's part of a linear layer, whose `check` was made on the whole.

    Args:
        whole: The layer's own.
        group: The processes that share it.
        inputs, outputs: This process's part of a side; None for the whole of it.
    """

    kind = "linear"
    projects_x = True

    def __init__(
        self, whole: LinearAdapter, group: "dist.ProcessGroup", inputs: slice | None, outputs: slice | None
    ) -> None:
        super().__init__(whole.d_in, whole.d_out)
        self.whole, self.group, self.inputs, self.outputs = whole, group, inputs, outputs

    def check(self, name: str, x: Tensor) -> None:
        pass

    def keep(self, x: Tensor, p_in: Tensor | None) -> Tensor:
        if self.inputs is None:
            return self.whole.keep(x, p_in)
        return project_rows(positions_flat(x), _part(p_in, self.d_in, self.inputs, x))

    def gradient(
        self,
        kept: Tensor,
        dy: Tensor,
        p_in: Tensor | None,
        p_out: Tensor | None,
        weights: Tensor | None,
        offsets: Tensor | None,
    ) -> Tensor:
        left = positions_flat(dy)
        if self.outputs is not None:
            p_out = _part(p_out, self.d_out, self.outputs, dy)
            if p_out.shape[0] > p_out.shape[1]:  # a part can be narrower than k_out, which project_grad refuses
                left, p_out = project_rows(left, p_out), None
                kept = kept.to(left.dtype)
        gradient = sample_gradients(kept, left, None, p_out, weights, offsets)
        dist.all_reduce(gradient, group=self.group)
        return gradient

    def sides(self, kept: Tensor, dy: Tensor, p_in: Tensor | None, p_out: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.outputs is None:
            left, right = projected(positions_flat(dy), p_out), kept.clone()
            dist.all_reduce(right, group=self.group)
        else:
            left, right = projected(positions_flat(dy), _part(p_out, self.d_out, self.outputs, dy)), kept
            dist.all_reduce(left, group=self.group)
        return left, right


def parallel(name: str, adapter: Adapter, x: Tensor, y: Tensor) -> tuple[Adapter, Tensor]:
    """(the adapter of this process's part, its x) of a layer that was given a DTensor.

    Raises:
        ValueError: Not a linear layer by columns or by rows with plain tensors as outputs.
    """
    mesh, placement = x.device_mesh, x.placements[0]  # type: ignore[attr-defined]
    local: Tensor = x.to_local().detach()  # type: ignore[attr-defined]
    by_rows = placement.is_shard(x.dim() - 1)
    fits = (
        isinstance(adapter, LinearAdapter)
        and mesh.ndim == 1
        and (by_rows or placement.is_replicate())
        and not hasattr(y, "device_mesh")
        and y.shape[:-1] == x.shape[:-1]
        and not (by_rows and adapter.bias)
        and (local if by_rows else y).shape[-1] * mesh.size() == (adapter.d_in if by_rows else adapter.d_out)
    )
    if not fits:
        raise ValueError(
            f"capture: layer {name!r} got a DTensor {tuple(x.shape)} {x.placements};"  # type: ignore[attr-defined]
            " tapped can be linear layers parallelised by columns, or by rows without bias=True, over one mesh"
            " dimension, whose outputs are plain tensors of all positions; exclude this one"
        )
    assert isinstance(adapter, LinearAdapter)
    width = (local if by_rows else y).shape[-1]
    part = slice(mesh.get_local_rank() * width, (mesh.get_local_rank() + 1) * width)
    inputs, outputs = (part, None) if by_rows else (None, part)
    return ParallelAdapter(adapter, mesh.get_group(), inputs, outputs), local


def _part(p: Tensor | None, width: int, part: slice, like: Tensor) -> Tensor:
    """Columns of a factor, of the identity where there is none."""
    whole = torch.eye(width, dtype=like.dtype, device=like.device) if p is None else p
    return whole[:, part]
