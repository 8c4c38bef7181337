"""How each kind of layer is seen as a matrix product, so that one tap serves them all.

Every adapter writes a sample's weight gradient as dW = sum_t left[t] (x) right[t], [d_out, d_in], and says what to keep
from the forward and how to project both sides. A new layer kind is one class here and one entry in `ADAPTERS`.
"""

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from logra_kernels.ops import project_grad, project_rows


class Adapter(ABC):
    """One layer's matrix view.

    Attributes:
        kind: "linear", "conv", "embedding" or "norm", what `capture(kinds=)` chooses by.
        d_in, d_out: Width of the gradient's two sides.
        argument: The name of x in the layer's forward.
        repeats: How many rows of `sides` stand for one position (a convolution's groups), as [repeats, T] flattened.
    """

    kind: str
    argument = "input"
    repeats = 1

    def __init__(self, d_in: int, d_out: int) -> None:
        self.d_in, self.d_out = d_in, d_out

    @abstractmethod
    def check(self, name: str, x: Tensor) -> None:
        """Raise ValueError unless x is a batch this layer can be tapped on."""

    def positions(self, x: Tensor, y: Tensor) -> tuple[int, ...]:
        """The shape [N, ...] that position weights must have (up to flattening)."""
        return y.shape[:-1]

    @abstractmethod
    def keep(self, x: Tensor, p_in: Tensor | None) -> Tensor:
        """What the forward saves: as little as the backward can do with."""

    @abstractmethod
    def gradient(
        self, kept: Tensor, dy: Tensor, p_in: Tensor | None, p_out: Tensor | None, weights: Tensor | None
    ) -> Tensor:
        """[N, k_out, k_in] from what was kept and the gradient of the layer's output."""

    @abstractmethod
    def sides(self, kept: Tensor, dy: Tensor, p_in: Tensor | None, p_out: Tensor | None) -> tuple[Tensor, Tensor]:
        """left [N, repeats * T, k_out], right [N, repeats * T, k_in]: the gradient is sum_t left (x) right."""

    def parameters(self, module: nn.Module) -> list[Tensor]:
        """The parameters whose gradients make up dW."""
        return [module.weight]  # type: ignore[list-item]

    def matrix(self, grads: list[Tensor]) -> Tensor:
        """dW [d_out, d_in] from the gradients of `parameters`, as autograd gives them."""
        return grads[0].flatten(1)


def positions_flat(x: Tensor) -> Tensor:
    """[N, ..., d] -> [N, T, d]."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])


def _projected(rows: Tensor, p: Tensor | None) -> Tensor:
    """P rows; 16-bit ones in fp32, since single positions do not average their rounding away."""
    if p is None:
        return rows
    wide = torch.promote_types(rows.dtype, torch.float32)
    return project_rows(rows.to(wide), p.to(wide))


class LinearAdapter(Adapter):
    """y = W x (+ b): dW = sum_t dy[t] (x) x[t]. With `bias`, its gradient is one more column: an input of 1."""

    kind = "linear"

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
        self, kept: Tensor, dy: Tensor, p_in: Tensor | None, p_out: Tensor | None, weights: Tensor | None
    ) -> Tensor:
        return project_grad(kept, positions_flat(dy), None, p_out, None, weights)

    def sides(self, kept: Tensor, dy: Tensor, p_in: Tensor | None, p_out: Tensor | None) -> tuple[Tensor, Tensor]:
        return _projected(positions_flat(dy), p_out), kept

    def parameters(self, module: nn.Module) -> list[Tensor]:
        return [module.weight, module.bias] if self.bias else [module.weight]  # type: ignore[list-item]

    def matrix(self, grads: list[Tensor]) -> Tensor:
        dw = grads[0].T if self.transposed else grads[0]
        return torch.cat([dw, grads[1][:, None]], dim=1) if self.bias else dw


class ConvAdapter(Adapter):
    """y = conv(x, W), groups side by side: dW = sum over groups and output positions of dy[g,t] (x) patch[g,t].

    The patches are never laid out: P_in seen as k_in filters is itself a convolution of x, with the layer's own stride,
    padding and dilation. dW is [C_out, C_in/groups * kernel]; P_out acts on all C_out rows, so a group has its columns.
    """

    kind = "conv"

    def __init__(self, conv: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
        self.in_shape = (conv.in_channels // conv.groups, *conv.kernel_size)
        super().__init__(math.prod(self.in_shape), conv.out_channels)
        self.channels, self.groups = conv.in_channels, conv.groups
        self.repeats = conv.groups
        self.stride, self.dilation, self.padding = conv.stride, conv.dilation, conv.padding
        self.mode, self.around = conv.padding_mode, conv._reversed_padding_repeated_twice
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
        filters = torch.eye(self.d_in, dtype=x.dtype, device=x.device) if p_in is None else p_in
        padding: tuple[int, ...] | str = self.padding
        if self.mode != "zeros":
            x, padding = F.pad(x, self.around, mode=self.mode), 0  # type: ignore[assignment]
        kernel = filters.reshape(-1, *self.in_shape).repeat(self.groups, *[1] * len(self.in_shape))
        a = self.convolve(x, kernel, None, self.stride, padding, self.dilation, self.groups)
        return a.flatten(2).unflatten(1, (self.groups, -1)).transpose(2, 3).flatten(1, 2)

    def gradient(
        self, kept: Tensor, dy: Tensor, p_in: Tensor | None, p_out: Tensor | None, weights: Tensor | None
    ) -> Tensor:
        if weights is not None and self.groups > 1:
            weights = weights.repeat(1, self.groups)
        if self.groups == 1:
            return project_grad(kept.to(dy.dtype), dy.flatten(2).transpose(1, 2), None, p_out, None, weights)
        left = self._left_by_group(dy, p_out)
        return project_grad(kept.to(left.dtype), left, None, None, None, weights)

    def _left_by_group(self, dy: Tensor, p_out: Tensor | None) -> Tensor:
        """[N, groups * T, k_out]."""
        by_group = dy.flatten(2).unflatten(1, (self.groups, -1))  # [N, groups, C_out/groups, T]
        factor = torch.eye(self.d_out, dtype=dy.dtype, device=dy.device) if p_out is None else p_out
        return torch.einsum("ngct,kgc->ngtk", by_group, factor.unflatten(1, (self.groups, -1))).flatten(1, 2)

    def sides(self, kept: Tensor, dy: Tensor, p_in: Tensor | None, p_out: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.groups == 1:
            return _projected(dy.flatten(2).transpose(1, 2), p_out), kept
        return self._left_by_group(dy, p_out), kept


class EmbeddingAdapter(Adapter):
    """y[t] = W[id[t]]: dW = sum_t onehot(id[t]) (x) dy[t], [vocabulary, width] as torch (and a tied head) keeps W.

    P_out times a one-hot is a column of P_out, so nothing of the vocabulary's width is made; only the ids are kept.
    """

    kind = "embedding"

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__(embedding.embedding_dim, embedding.num_embeddings)
        self.padding = embedding.padding_idx

    def check(self, name: str, x: Tensor) -> None:
        if x.dim() < 1 or x.is_floating_point():
            raise ValueError(
                f"capture: layer {name!r} got ids {tuple(x.shape)} {x.dtype}; they must be [N, ...] integers"
            )

    def keep(self, x: Tensor, p_in: Tensor | None) -> Tensor:
        return x.reshape(x.shape[0], math.prod(x.shape[1:]))

    def gradient(
        self, kept: Tensor, dy: Tensor, p_in: Tensor | None, p_out: Tensor | None, weights: Tensor | None
    ) -> Tensor:
        if self.padding is not None:  # torch gives this id no gradient
            counted = (kept != self.padding).to(torch.float64 if dy.dtype == torch.float64 else torch.float32)
            weights = counted if weights is None else weights * counted
        return project_grad(positions_flat(dy), self._columns(kept, dy, p_out), p_in, None, None, weights)

    def _columns(self, kept: Tensor, dy: Tensor, p_out: Tensor | None) -> Tensor:
        """P_out onehot(id), [N, T, k_out]."""
        return F.one_hot(kept, self.d_out).to(dy.dtype) if p_out is None else p_out.T[kept]

    def sides(self, kept: Tensor, dy: Tensor, p_in: Tensor | None, p_out: Tensor | None) -> tuple[Tensor, Tensor]:
        left = self._columns(kept, dy, p_out)
        if self.padding is not None:
            left = left * (kept != self.padding)[..., None].to(left.dtype)
        return left, _projected(positions_flat(dy), p_in)


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
        self, kept: Tensor, dy: Tensor, p_in: Tensor | None, p_out: Tensor | None, weights: Tensor | None
    ) -> Tensor:
        gain = positions_flat(dy) * kept.to(dy.dtype)
        ones = torch.ones_like(gain[..., :1])
        return project_grad(ones, gain, p_in, p_out, None, weights)

    def sides(self, kept: Tensor, dy: Tensor, p_in: Tensor | None, p_out: Tensor | None) -> tuple[Tensor, Tensor]:
        gain = positions_flat(dy) * kept.to(dy.dtype)
        return _projected(gain, p_out), _projected(torch.ones_like(gain[..., :1]), p_in)

    def matrix(self, grads: list[Tensor]) -> Tensor:
        return grads[0][:, None]


def _linear(module: nn.Module, bias: bool) -> Adapter | None:
    # nn.MultiheadAttention's out_proj is never called as a module, so a tap on it would see nothing
    if not isinstance(module, nn.Linear) or isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return None
    return LinearAdapter(module.in_features, module.out_features, bias=bias and module.bias is not None)


def _hf_conv1d(module: nn.Module, bias: bool) -> Adapter | None:
    owner = sys.modules.get("transformers.pytorch_utils")  # a model that has one has imported it
    fits = owner is not None and isinstance(module, owner.Conv1D)
    return LinearAdapter(module.nx, module.nf, "x", bias, transposed=True) if fits else None  # type: ignore[arg-type]


def _conv(module: nn.Module, bias: bool) -> Adapter | None:
    return ConvAdapter(module) if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) else None


def _embedding(module: nn.Module, bias: bool) -> Adapter | None:
    plain = isinstance(module, nn.Embedding) and module.max_norm is None and not module.scale_grad_by_freq
    return EmbeddingAdapter(module) if plain else None  # type: ignore[arg-type]


def _norm(module: nn.Module, bias: bool) -> Adapter | None:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1:
        return None
    if isinstance(module, nn.LayerNorm):
        return NormAdapter(len(weight), "input", module.eps, centred=True)
    if isinstance(module, nn.RMSNorm):
        return NormAdapter(len(weight), "x", module.eps or torch.finfo(weight.dtype).eps, centred=False)
    eps = getattr(module, "variance_epsilon", None)  # Hugging Face's own copies
    if type(module).__name__.endswith("RMSNorm") and isinstance(eps, float):
        return NormAdapter(len(weight), "hidden_states", eps, centred=False)
    return None


ADAPTERS: dict[str, tuple[Callable[[nn.Module, bool], Adapter | None], ...]] = {
    "linear": (_linear, _hf_conv1d),
    "conv": (_conv,),
    "embedding": (_embedding,),
    "norm": (_norm,),
}
KINDS = tuple(ADAPTERS)
DEFAULT_KINDS = ("linear", "conv")
X_SIDE_KINDS = ("linear", "conv")  # those whose P_in meets x itself, in x's dtype


def adapt(module: nn.Module, kinds: tuple[str, ...], bias: bool) -> Adapter | None:
    """The adapter of the first kind that fits this module, or None."""
    return next((found for kind in kinds for make in ADAPTERS[kind] if (found := make(module, bias)) is not None), None)
