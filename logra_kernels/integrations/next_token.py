"""The loss of next-token prediction, a part of the vocabulary's numbers at a time.

    nll[n] = sum over predicted t of  log sum_v exp(z[n,t,v]) - z[n,t,token]
    dz     = (softmax(z) - onehot(token)) dnll

Logits are the largest tensors of a model with many tokens. torch's cross entropy of chosen positions holds six of their
size at once (the chosen, their logarithms, both gradients, zeros around these), and walks over memory as often; here
there are two, z and dz, and what is between them stays in a cache.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy

_BYTES = {"cpu": 4 << 20}  # of logits at work at a time, in fp32
_BYTES_ELSEWHERE = 256 << 20


def summed_nll(logits: Tensor, labels: Tensor, ignored: int) -> Tensor:
    """Each sample's sum of negative log-likelihoods, in nats.

    Args:
        logits: [N, T, V]; those of position t predict the token of t + 1.
        labels: The token at each predicted position, `ignored` elsewhere, [N, T] int64.

    Returns:
        [N] fp32, fp64 of fp64 logits.
    """
    return _SummedNll.apply(logits, labels, ignored)


class _SummedNll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, ignored: int) -> Tensor:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        each = torch.zeros(labels.shape, dtype=dtype, device=logits.device)
        flat, nll = logits.reshape(-1, logits.shape[-1]), each.view(-1)
        tokens = torch.full_like(labels, ignored)
        tokens[:, :-1] = labels[:, 1:]
        tokens = tokens.flatten()
        at = (tokens != ignored).nonzero().squeeze(1)
        for rows in _parts(at, flat, dtype):
            nll[rows] = cross_entropy(flat[rows].to(dtype), tokens[rows], reduction="none")
        ctx.save_for_backward(logits, tokens, at)
        ctx.dtype = dtype
        return each.sum(dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        logits, tokens, at = ctx.saved_tensors
        n, t, v = logits.shape
        flat = logits.reshape(-1, v)
        dz = torch.empty(n * t, v, dtype=logits.dtype, device=logits.device)
        left_out = torch.ones(n * t, dtype=torch.bool, device=logits.device).index_fill(0, at, False)
        dz[left_out.nonzero().squeeze(1)] = 0
        for rows in _parts(at, flat, ctx.dtype):
            part = flat[rows].to(ctx.dtype)
            part = torch.softmax(part, dim=1, out=part)
            part[torch.arange(len(rows), device=part.device), tokens[rows]] -= 1
            dz[rows] = part.mul_(g[rows // t, None]).to(logits.dtype)
        return dz.view(n, t, v), None, None


def _parts(at: Tensor, flat: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    most = _BYTES.get(flat.device.type, _BYTES_ELSEWHERE)
    return iter(at.split(max(1, most // (flat.shape[1] * dtype.itemsize))))
