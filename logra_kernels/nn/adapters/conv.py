"""Convolutions of one, two and three dimensions."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from logra_kernels.nn.adapters.base import Adapter, forwards_as, projected, sample_gradients
from logra_kernels.ops import project_rows


class ConvAdapter(Adapter):
    """y = conv(x, W), groups side by side: dW = sum over groups and output positions of dy[g,t] (x) patch[g,t].

    The patches are not laid out where they are projected: P_in seen as k_in filters is itself a convolution of x, with
    the layer's own stride, padding and dilation. (Patches are as many times x as the kernel has places.) Groups are
    samples to it, as they share their filters, and where the kernel has one place, x's own rows are projected. dW is
    [C_out, C_in/groups * kernel]; P_out acts on all C_out rows, so a group has its columns.
    """

    kind = "conv"
    flattens = False
    projects_x = True

    def __init__(self, conv: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
        self.in_shape = (conv.in_channels // conv.groups, *conv.kernel_size)
        super().__init__(math.prod(self.in_shape), conv.out_channels)
        self.channels, self.groups = conv.in_channels, conv.groups
        self.repeats = conv.groups
        self.stride, self.dilation, self.padding = conv.stride, conv.dilation, conv.padding
        self.mode, self.around = conv.padding_mode, conv._reversed_padding_repeated_twice
        unpadded = not any(conv.padding) or isinstance(conv.padding, str)
        self.pointwise = conv.groups == 1 and unpadded and math.prod(conv.kernel_size) == 1
        self.convolve = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[conv.weight.dim()]

    def check(self, name: str, x: Tensor) -> None:
        if x.dim() != len(self.in_shape) + 1 or x.shape[1] != self.channels:
            spatial = ", ".join("HWD"[: len(self.in_shape) - 1])
            raise ValueError(
                f"capture: layer {name!r} got an input {tuple(x.shape)}; it must be [N, {self.channels}, {spatial}],"
                " samples first"
            )

    def positions(self, x: Tensor, y: Tensor) -> tuple[int, ...]:
        return y.shape[0], *y.shape[2:]

    def keep(self, x: Tensor, p_in: Tensor | None) -> Tensor:
        """[N, groups * T, k_in]."""
        if self.pointwise:
            rows = x[:, :, *(slice(None, None, step) for step in self.stride)].flatten(2).transpose(1, 2)
            return rows if p_in is None else project_rows(rows, p_in)
        if p_in is None:
            return self._patches(x)
        padding: tuple[int, ...] | str = self.padding
        if self.mode != "zeros":
            x, padding = F.pad(x, self.around, mode=self.mode), 0  # type: ignore[assignment]
        kernel = p_in.reshape(-1, *self.in_shape)
        if self.groups == self.channels:  # oneDNN is slow at convolutions of many samples with one channel
            kernel = kernel.repeat(self.groups, *[1] * (kernel.dim() - 1))
            a = self.convolve(x, kernel, None, self.stride, padding, self.dilation, self.groups)
        else:
            apart = x.reshape(len(x) * self.groups, self.in_shape[0], *x.shape[2:])
            a = self.convolve(apart, kernel, None, self.stride, padding, self.dilation)
        a = a.flatten(2)
        return a.reshape(len(x), self.groups, len(p_in), a.shape[-1]).transpose(2, 3).flatten(1, 2)

    def _patches(self, x: Tensor) -> Tensor:
        """[N, groups * T, d_in]."""
        x = F.pad(x, self.around, mode="constant" if self.mode == "zeros" else self.mode)
        for at, (places, step, apart) in enumerate(
            zip(self.in_shape[1:], self.stride, self.dilation, strict=True), start=2
        ):
            x = x.unfold(at, (places - 1) * apart + 1, step)[..., ::apart]
        spatial = len(self.stride)
        x = x.unflatten(1, (self.groups, self.in_shape[0])).movedim(
            2, 2 + spatial
        )  # [N, groups, *T, C/groups, *kernel]
        return x.reshape(len(x), self.groups * math.prod(x.shape[2 : 2 + spatial]), self.d_in)

    def gradient(
        self,
        kept: Tensor,
        dy: Tensor,
        p_in: Tensor | None,
        p_out: Tensor | None,
        weights: Tensor | None,
        offsets: Tensor | None,
    ) -> Tensor:
        if self.groups == 1:
            kept = kept if self.pointwise else kept.to(dy.dtype)
            return sample_gradients(kept, dy.flatten(2).transpose(1, 2), None, p_out, weights, offsets)
        left = self._left_by_group(dy, p_out)
        if weights is not None:
            weights = weights.repeat(1, self.groups)
        if offsets is not None:  # a document's positions lie together only when the groups of a position do
            kept, left = self._by_position(kept), self._by_position(left)
            weights = None if weights is None else self._by_position(weights)
            offsets = offsets * self.groups
        return sample_gradients(kept.to(left.dtype), left, None, None, weights, offsets)

    def _left_by_group(self, dy: Tensor, p_out: Tensor | None) -> Tensor:
        """[N, groups * T, k_out]."""
        by_group = dy.flatten(2).unflatten(1, (self.groups, -1))  # [N, groups, C_out/groups, T]
        factor = torch.eye(self.d_out, dtype=dy.dtype, device=dy.device) if p_out is None else p_out
        return torch.einsum("ngct,kgc->ngtk", by_group, factor.unflatten(1, (self.groups, -1))).flatten(1, 2)

    def _by_position(self, rows: Tensor) -> Tensor:
        """[N, groups * T, ...] -> [N, T * groups, ...]."""
        return rows.unflatten(1, (self.groups, -1)).transpose(1, 2).flatten(1, 2)

    def expected(self, module: nn.Module, x: Tensor) -> list[Tensor]:
        forward = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[module.weight.dim()]._conv_forward  # type: ignore
        return [forward(module, x.to(module.weight.dtype), module.weight, module.bias)]  # type: ignore

    def sides(self, kept: Tensor, dy: Tensor, p_in: Tensor | None, p_out: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.groups == 1:
            return projected(dy.flatten(2).transpose(1, 2), p_out), kept
        return self._left_by_group(dy, p_out), kept


def adapt_conv(module: nn.Module, bias: bool) -> Adapter | None:
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return None
    adapter = ConvAdapter(module)
    own = type(module)._conv_forward in (nn.Conv1d._conv_forward, nn.Conv2d._conv_forward, nn.Conv3d._conv_forward)
    adapter.known = own and forwards_as(module, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return adapter
