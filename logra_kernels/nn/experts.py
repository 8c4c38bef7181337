"""The forward of a fused mixture of experts with taps inside.

What an expert reads and writes never leaves such a module, so while the taps are active its forward is replaced by the
same computation, an expert at a time:

    y[t] = sum over experts e of token t:  w[t,e] D_e gate(U_e x[t])           (+ biases, + the module's own norm)

Every expert's rows are tapped as a linear layer's, with the limits of each sample among them.
"""

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from logra_kernels.nn.adapters import ReplacedForward
from logra_kernels.nn.covariance import Covariances
from logra_kernels.nn.hook import Hook
from logra_kernels.nn.state import TapState


class _Unrouted(torch.autograd.Function):
    """y passes; the probes of experts that no token came to get a gradient of zero."""

    @staticmethod
    def forward(ctx, y: Tensor, *probes: Tensor) -> Tensor:
        ctx.like = [(probe.shape, probe.dtype, probe.device) for probe in probes]
        return y.view_as(y)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor):
        return dy, *(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like)


class TappedExperts(ReplacedForward):
    """Stands in for a mixture's forward.

    Args:
        module: With a 3-D parameter for each stack, as transformers' `use_experts_implementation` makes it.
        hooks: "<stack>.<expert>" -> the hook of each tapped one.
    """

    def __init__(self, module: nn.Module, hooks: dict[str, Hook], taps: TapState) -> None:
        self._signature = inspect.signature(type(module).forward)
        self._name = next(iter(hooks.values())).name
        self._hooks, self._taps = hooks, taps
        super().__init__(module)

    def __call__(self, *args, **kwargs):
        if not self._taps.active or not torch.is_grad_enabled():
            return self._forward(*args, **kwargs)
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"capture: {self._name!r} is an expert, whose rows are cut by their values: run the model itself, or"
                " compile it without its experts"
            )
        if self._module._is_expert_parallel:
            raise ValueError(f"capture: {self._name!r} is an expert of an expert-parallel model; exclude the experts")
        hidden, index, weights = list(self._signature.bind(self._module, *args, **kwargs).arguments.values())[1:4]
        flat = hidden.reshape(-1, hidden.shape[-1])
        return self._mix(flat, index.reshape(len(flat), -1), weights.reshape(len(flat), -1)).view_as(hidden)

    def _mix(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """hidden [R, d], index and weights [R, K] -> [R, d]."""
        module, taps = self._module, self._taps
        sample_of = self._samples(len(hidden), hidden.device)
        for hook in self._hooks.values():
            if hook.probe.leaf is None:
                assert taps.samples is not None
                hook.probe.renew(taps.samples)
        position_weights = self._position_weights(len(hidden))
        expert, order = index.flatten().sort(stable=True)  # stable: an expert's tokens stay in the samples' order
        token = order // index.shape[1]
        counts = torch.bincount(expert, minlength=module.num_experts)[: module.num_experts].tolist()
        parts, unrouted = [], []
        for e, rows in enumerate(token[: sum(counts)].split(counts)):
            if not len(rows):
                unrouted += [h for h in (self._hooks.get(f"{s}.{e}") for s in self._stacks) if h is not None]
                continue
            offsets = torch.searchsorted(sample_of[rows], self._limits(hidden.device))
            w = None if position_weights is None else position_weights[rows]
            up = self._linear(self._stacks[0], e, hidden[rows], w, offsets)
            gated = module._apply_gate(up) if module.has_gate else module.act_fn(up)
            parts.append(self._linear(self._stacks[1], e, gated, w, offsets))
        out = torch.cat(parts)
        if module.has_post_expert_norm:
            out = module.post_expert_norm(out)
        out = out * weights.flatten()[order[: len(out)], None]
        mixed = torch.zeros_like(hidden).index_add(0, token[: len(out)], out.to(hidden.dtype))
        if isinstance(taps.mode, Covariances):
            for h in unrouted:
                taps.mode.unreached(h.name, h.adapter, mixed, *h.probe.factors(mixed.dtype, mixed.dtype))
        if not unrouted or (taps.mode is not None and not taps.beside):
            return mixed
        return _Unrouted.apply(mixed, *(h.probe.leaf for h in unrouted))

    @property
    def _stacks(self) -> tuple[str, str]:
        return "gate_up_proj" if self._module.has_gate else "up_proj", "down_proj"

    def _linear(self, stack: str, e: int, x: Tensor, weights: Tensor | None, offsets: Tensor) -> Tensor:
        weight = getattr(self._module, stack)[e]
        bias = getattr(self._module, f"{stack}_bias")[e] if self._module.has_bias else None
        y = F.linear(x, weight.T if self._module.is_transposed else weight, bias)
        hook = self._hooks.get(f"{stack}.{e}")
        if hook is None:
            return y
        w = None if weights is None else weights.to(y.device, hook.probe.dtype)[:, None]
        return hook.tap(hook.adapter, y, x, w, offsets)

    def _samples(self, tokens: int, device: torch.device) -> Tensor:
        """Which sample each token belongs to, [R], never decreasing."""
        taps = self._taps
        if taps.offsets is not None:
            assert taps.extent is not None
            end = taps.extent.numel()
            if end != tokens:
                raise ValueError(f"capture: offsets end at {end} and the experts of {self._name!r} get {tokens} tokens")
            cuts = taps.offsets.to(device)
            return torch.searchsorted(cuts, torch.arange(tokens, device=device), right=True) - 1
        if taps.samples is None or tokens % taps.samples:
            raise ValueError(
                f"capture: the experts of {self._name!r} get {tokens} tokens of all samples side by side, and"
                f" {taps.samples} samples were begun: call taps.reset(batch_size), or give offsets"
            )
        return torch.arange(tokens, device=device) // (tokens // taps.samples)

    def _limits(self, device: torch.device) -> Tensor:
        assert self._taps.samples is not None
        return torch.arange(self._taps.samples + 1, device=device)

    def _position_weights(self, tokens: int) -> Tensor | None:
        weights = self._taps.weights
        if weights is not None and weights.numel() != tokens:
            raise ValueError(
                f"capture: weights {tuple(weights.shape)} do not fit the {tokens} tokens of the experts of"
                f" {self._name!r}"
            )
        return None if weights is None else weights.flatten()
