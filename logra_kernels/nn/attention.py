"""The forward of nn.MultiheadAttention with taps inside.

It gives its weights to a function and calls no module with them, so while the taps are active its forward is replaced
by the same computation, from the same calls in the same order (dropout draws the same numbers):

    q, k, v = W_q x_q, W_k x_k, W_v x_v                          [N, H, L, d], [N, H, S, d] twice     (+ biases)
    y = W_out concat over heads of softmax(q k^T / sqrt(d) + masks) v

Where x_q, x_k and x_v are one tensor, in_proj is one layer of one input. Else each input meets its own rows of it.
"""

import inspect
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from logra_kernels.nn.adapters import AttentionAdapter, LinearAdapter, ReplacedForward
from logra_kernels.nn.hook import Hook
from logra_kernels.nn.state import TapState

_signature = inspect.signature(nn.MultiheadAttention.forward)


class TappedAttention(ReplacedForward):
    """Stands in for an attention's forward.

    Args:
        hooks: Part -> the hook of each tapped one.
    """

    def __init__(self, module: nn.Module, hooks: dict[str, Hook], taps: TapState) -> None:
        super().__init__(module)
        self._hooks, self._taps = hooks, taps
        self._batch_first: bool = module.batch_first  # type: ignore[assignment]

    def __call__(self, *args, **kwargs):
        if not self._taps.active or not torch.is_grad_enabled():
            return self._forward(*args, **kwargs)
        bound = _signature.bind(self._module, *args, **kwargs)
        bound.apply_defaults()
        return self._attend(*list(bound.arguments.values())[1:])

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        average_attn_weights: bool,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor | None]:
        for hook in self._hooks.values():
            if not torch.compiler.is_compiling():
                hook.check_plain(query, key, value)
            if query.dim() != 3:
                raise ValueError(
                    f"capture: layer {hook.name!r} is of an attention that got a query {tuple(query.shape)} without"
                    " samples; give it a batch of them, or exclude the layer"
                )
        if is_causal and attn_mask is None:
            raise RuntimeError("nn.MultiheadAttention: is_causal is a hint that needs attn_mask")
        module = self._module
        q, k, v = (self._heads(y) for y in self._project(query, key, value))
        k, v, added = self._lengthened(k, v)
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else _merged(attn_mask, key_padding_mask, q, k.shape[2] - added, added)
        p = module.dropout if module.training else 0.0
        if need_weights:
            heads, weights = _weighted(q, k, v, mask, p)
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            heads, weights = F.scaled_dot_product_attention(q, k, v, mask, p, causal), None
        x = heads.permute(0, 2, 1, 3) if self._batch_first else heads.permute(2, 0, 1, 3)
        x = x.flatten(2)
        return self._tapped("out_proj", x, module.out_proj(x)), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v as the inputs lie, [N, T, E] or [T, N, E]."""
        module, e = self._module, self._module.embed_dim
        bias = module.in_proj_bias
        if module.in_proj_weight is None:
            biases = (None, None, None) if bias is None else bias.chunk(3)
            names, inputs = ("q_proj", "k_proj", "v_proj"), (query, key, value)
            q, k, v = (
                self._tapped(name, x, F.linear(x, getattr(module, f"{name}_weight"), b))
                for name, x, b in zip(names, inputs, biases, strict=True)
            )
            return q, k, v
        if query is key and key is value:
            return self._in_proj(query, 0, 3 * e).chunk(3, -1)  # type: ignore[return-value]
        if key is value:
            return self._in_proj(query, 0, e), *self._in_proj(key, e, 3 * e).chunk(2, -1)  # type: ignore[return-value]
        return self._in_proj(query, 0, e), self._in_proj(key, e, 2 * e), self._in_proj(value, 2 * e, 3 * e)

    def _in_proj(self, x: Tensor, start: int, stop: int) -> Tensor:
        """x by these rows of in_proj."""
        weight, bias = self._module.in_proj_weight, self._module.in_proj_bias
        if stop - start == len(weight):
            return self._tapped("in_proj", x, F.linear(x, weight, bias))
        y = F.linear(x, weight[start:stop], None if bias is None else bias[start:stop])
        hook = self._hooks.get("in_proj")
        if hook is None:
            return y
        assert isinstance(hook.adapter, AttentionAdapter)
        return self._tapped("in_proj", x, y, hook.adapter.part_of_rows(start, stop))

    def _tapped(self, part: str, x: Tensor, y: Tensor, adapter: LinearAdapter | None = None) -> Tensor:
        """y as it lies, with the tap of this part behind it, if there is one."""
        hook = self._hooks.get(part)
        if hook is None:
            return y
        if self._batch_first:
            return hook.behind(self._module, x, y, adapter)
        return hook.behind(self._module, x.transpose(0, 1), y.transpose(0, 1), adapter).transpose(0, 1)

    def _heads(self, y: Tensor) -> Tensor:
        """[N, T, E] or [T, N, E] -> [N, H, T, d]."""
        heads = y.unflatten(-1, (self._module.num_heads, -1))
        return heads.permute(0, 2, 1, 3) if self._batch_first else heads.permute(1, 2, 0, 3)

    def _lengthened(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        """k and v with what `add_bias_kv` and `add_zero_attn` put behind them, and how many positions that is."""
        module, n, added = self._module, len(k), 0
        if module.bias_k is not None:
            own = (one.view(1, module.num_heads, 1, -1).expand(n, -1, -1, -1) for one in (module.bias_k, module.bias_v))
            k, v = (torch.cat([x, one.to(x.dtype)], 2) for x, one in zip((k, v), own, strict=True))
            added += 1
        if module.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
            added += 1
        return k, v, added


def _weighted(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float) -> tuple[Tensor, Tensor]:
    """Attention [N, H, L, d] whose weights [N, H, L, S] are wanted too; p is dropout's."""
    scores = (q * math.sqrt(1 / q.shape[-1])) @ k.transpose(-2, -1)
    weights = (scores if mask is None else scores + mask).softmax(-1)
    if p > 0:
        weights = F.dropout(weights, p)
    return weights @ v, weights


def _merged(attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, s: int, added: int) -> Tensor | None:
    """What is added to the scores [N, H, L, S + added]; a bool mask's True stands for -inf.

    Raises:
        RuntimeError: A mask of a shape that PyTorch does not take.
    """
    n, h, length, _ = q.shape
    merged = None
    if attn_mask is not None:
        if attn_mask.shape not in ((length, s), (n * h, length, s)):
            raise RuntimeError(
                f"nn.MultiheadAttention: attn_mask {tuple(attn_mask.shape)} must be {(length, s)}"
                f" or {(n * h, length, s)}"
            )
        merged = _additive(attn_mask, q.dtype, added)
        merged = merged if merged.dim() == 2 else merged.unflatten(0, (n, h))
    if key_padding_mask is not None:
        if key_padding_mask.shape != (n, s):
            raise RuntimeError(
                f"nn.MultiheadAttention: key_padding_mask {tuple(key_padding_mask.shape)} must be {(n, s)}"
            )
        padding = _additive(key_padding_mask, q.dtype, added)[:, None, None]
        merged = padding if merged is None else merged + padding
    return merged


def _additive(mask: Tensor, dtype: torch.dtype, added: int) -> Tensor:
    if not mask.is_floating_point():
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
    return F.pad(mask, (0, added))
