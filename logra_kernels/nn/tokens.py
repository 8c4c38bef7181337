"""Token-level influence: what every position of a sample contributes to <row, gradient>.

    share[q,n,t] = sum over layers of (P_out dy[n,t])^T M[q] (P_in x[n,t])    M[q] [k_out, k_in], a row cut into layers
    sum_t share[q,n,t] = <M[q], G[n]>, the sample's whole score

A mode of the taps: the same hooks, and a probe [Q, N, T] whose "gradient" is the share.
"""

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from logra_kernels.nn.adapters import Adapter
from logra_kernels.nn.tap import alias, check_heard


class TokenTap(torch.autograd.Function):
    """y and dy pass; d loss / d probe[q,n,t] := w[n,t] left[n,t]^T M[q] right[n,t]."""

    @staticmethod
    def forward(
        ctx,
        y: Tensor,
        x: Tensor,
        probe: Tensor,
        m: Tensor,
        p_in: Tensor | None,
        p_out: Tensor | None,
        weights: Tensor | None,
        adapter: Adapter,
    ) -> Tensor:
        ctx.save_for_backward(adapter.keep(x, p_in), m, p_in, p_out, weights)
        ctx.adapter = adapter
        return alias(y)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor):
        kept, m, p_in, p_out, weights = ctx.saved_tensors
        left, right = (side.to(m.dtype) for side in ctx.adapter.sides(kept, dy, p_in, p_out))
        shares = torch.stack([((left @ one) * right).sum(-1) for one in m])
        if ctx.adapter.repeats > 1:
            shares = shares.unflatten(-1, (ctx.adapter.repeats, -1)).sum(-2)
        if weights is not None:  # a position of weight 0 counts for nothing, whatever it holds
            shares = torch.where(weights != 0, shares * weights, 0)
        return dy, None, shares, None, None, None, None, None


class TokenShares:
    """The shares of one or more backward passes, which add up as `.grad` does. Made by `Taps.tokens`.

    Args:
        layers: Layer name -> (k_out, k_in), in the order of the rows' columns.
        rows: [Q, D], at least one row.
    """

    def __init__(self, layers: dict[str, tuple[int, int]], rows: Tensor) -> None:
        widths = [k_out * k_in for k_out, k_in in layers.values()]
        if rows.dim() != 2 or rows.shape[0] == 0 or rows.shape[1] != sum(widths):
            raise ValueError(f"tokens: rows {tuple(rows.shape)} must be [Q, {sum(widths)}] with at least one row")
        parts = rows.detach().split(widths, dim=1)
        self._m = {name: part.unflatten(1, k) for (name, k), part in zip(layers.items(), parts, strict=True)}
        self._probes: dict[str, dict[int, Tensor]] = {}  # of each layer, by the number of positions

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
        """y, with this layer's shares tapped; what the taps' hooks call."""
        if torch.compiler.is_compiling():
            raise RuntimeError("tokens: a compiled model cannot be tapped for token shares; run the model itself")
        if not adapter.samples_first:
            raise ValueError(
                f"tokens: layer {name!r} has its rows cut by experts, not by samples, so its part of a score cannot be"
                " shared out over tokens: log the rows without this layer (exclude=) to have token shares"
            )
        samples, *rest = adapter.positions(x, y)
        positions = math.prod(rest)
        dtype = torch.float64 if torch.float64 in (y.dtype, self._m[name].dtype) else torch.float32
        m = self._m[name].to(y.device, dtype)
        probes = self._probes.setdefault(name, {})
        if positions not in probes:
            zero = torch.zeros((), dtype=dtype, device=y.device)
            probes[positions] = zero.expand(len(m), samples, positions).requires_grad_()
        return TokenTap.apply(y, x, probes[positions], m, p_in, p_out, weights, adapter)

    def check(self) -> None:
        """Raise LograError unless every layer received a gradient."""
        heard = [name for name, probes in self._probes.items() if any(p.grad is not None for p in probes.values())]
        check_heard("tokens", self._m, heard, "run forward and backward of the same model that was logged")

    @property
    def layers(self) -> dict[str, Tensor]:
        """Layer name -> that layer's part of every share, [Q, N, T].

        T is 1 behind a pooling. A layer that is used at several numbers of positions, as an attention's projection of
        queries and of another sequence's keys and values, has those of one use behind those of the other.

        Raises:
            LograError: A layer received no gradient.
        """
        self.check()
        of = {name: self._probes[name].values() for name in self._m}
        return {
            name: torch.cat([torch.zeros_like(p) if p.grad is None else p.grad for p in probes], dim=-1)
            for name, probes in of.items()
        }

    @property
    def shares(self) -> Tensor:
        """Every position's part of every score, [Q, N, T] fp32 (fp64 for an fp64 model), on the CPU; `of` all layers.

        Summed over T it is the dot-mode score of the N samples. A position is where a layer's input and output stand:
        for a language model, the token that is read, whose loss lies in predicting those after it.

        Raises:
            ValueError: The layers have not all the same number of positions.
            LograError: A layer received no gradient.
        """
        return self.of(["*"])

    def of(self, include: Sequence[str]) -> Tensor:
        """Every position's part of what these layers add to every score, [Q, N, T] on the CPU.

        An encoder's positions are other ones than its decoder's, even where they are as many.

        Args:
            include: Glob patterns on layer names, as `["model.encoder.*"]`.

        Raises:
            ValueError: A pattern matches no layer, or they have not all the same number of positions.
            LograError: A layer received no gradient.
        """
        unmatched = [pattern for pattern in include if not any(fnmatchcase(name, pattern) for name in self._m)]
        if unmatched or not include:
            raise ValueError(f"tokens: the patterns {unmatched or list(include)} match none of {', '.join(self._m)}")
        parts = {
            name: part for name, part in self.layers.items() if any(fnmatchcase(name, pattern) for pattern in include)
        }
        first: dict[int, str] = {}
        for name, part in parts.items():
            first.setdefault(part.shape[-1], name)
        if len(first) > 1:
            found = ", ".join(f"{length} ({name!r})" for length, name in first.items())
            raise ValueError(
                f"tokens: layers see different numbers of positions of a sample, {found}: ask for those of one sequence"
                " by name, as tokens.of(['*.encoder.*']); all layers' parts are in tokens.layers"
            )
        return torch.stack([part.cpu() for part in parts.values()]).sum(0)
