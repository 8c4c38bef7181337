"""Embeddings."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from logra_kernels.nn.adapters.base import Adapter, forwards_as, positions_flat, projected, sample_gradients


class EmbeddingAdapter(Adapter):
    """y[t] = W[id[t]]: dW = sum_t onehot(id[t]) (x) dy[t], [vocabulary, width] as torch (and a tied head) keeps W.

    P_out times a one-hot is a column of P_out, so nothing of the vocabulary's width is made; only the ids are kept.

    Args:
        scale: What the module multiplies W[id[t]] with, as Gemma does.
    """

    kind = "embedding"

    def __init__(self, embedding: nn.Embedding, scale: float = 1.0) -> None:
        super().__init__(embedding.embedding_dim, embedding.num_embeddings)
        self.padding, self.scale = embedding.padding_idx, scale

    def check(self, name: str, x: Tensor) -> None:
        if not isinstance(x, Tensor) or x.dim() < 1 or x.is_floating_point():
            got = f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else f"of type {type(x).__name__}"
            raise ValueError(f"capture: layer {name!r} got ids {got}; they must be [N, ...] integers; exclude it")

    def counts_positions(self, x: Tensor) -> bool:
        """0, 1, 2, ..., or what depends on the distance of a row and a column, as relative positions do."""
        if x.dim() == 1:
            return torch.equal(x, torch.arange(len(x), dtype=x.dtype, device=x.device))
        return x.dim() == 2 and torch.equal(x[1:, 1:], x[:-1, :-1]) and not bool((x == x[0, 0]).all())

    def keep(self, x: Tensor, p_in: Tensor | None) -> Tensor:
        return x.reshape(x.shape[0], math.prod(x.shape[1:]))

    def gradient(
        self,
        kept: Tensor,
        dy: Tensor,
        p_in: Tensor | None,
        p_out: Tensor | None,
        weights: Tensor | None,
        offsets: Tensor | None,
    ) -> Tensor:
        if self.padding is not None:  # torch gives this id no gradient
            counted = (kept != self.padding).to(torch.float64 if dy.dtype == torch.float64 else torch.float32)
            weights = counted if weights is None else weights * counted
        return sample_gradients(self._rows(dy), self._columns(kept, dy, p_out), p_in, None, weights, offsets)

    def _rows(self, dy: Tensor) -> Tensor:
        """The gradient of W[id[t]], [N, T, width]."""
        rows = positions_flat(dy)
        return rows if self.scale == 1 else rows * self.scale

    def _columns(self, kept: Tensor, dy: Tensor, p_out: Tensor | None) -> Tensor:
        """P_out onehot(id), [N, T, k_out]."""
        return F.one_hot(kept, self.d_out).to(dy.dtype) if p_out is None else p_out.T[kept]

    def expected(self, module: nn.Module, x: Tensor) -> list[Tensor]:
        # ids of tokens where positions are taken (Whisper's) may lie beyond the table, and are told from y
        ids = x.clamp(0, self.d_out - 1)
        return [F.embedding(ids, module.weight) * self.scale]  # type: ignore[arg-type]

    def sides(self, kept: Tensor, dy: Tensor, p_in: Tensor | None, p_out: Tensor | None) -> tuple[Tensor, Tensor]:
        left = self._columns(kept, dy, p_out)
        if self.padding is not None:
            left = left * (kept != self.padding)[..., None].to(left.dtype)
        return left, projected(self._rows(dy), p_in)


def adapt_embedding(module: nn.Module, bias: bool) -> Adapter | None:
    if not isinstance(module, nn.Embedding) or module.max_norm is not None or module.scale_grad_by_freq:
        return None
    if forwards_as(module, nn.Embedding):
        return EmbeddingAdapter(module)
    scale = getattr(module, "embed_scale", None)  # Hugging Face's scaled ones
    number = scale.to(module.weight.dtype).item() if isinstance(scale, Tensor) else scale
    adapter = EmbeddingAdapter(module, 1.0 if number is None else float(number))
    ours = type(module).__name__.endswith("ScaledWordEmbedding") and "forward" not in vars(module)
    adapter.known = number is not None and ours
    return adapter
