"""The forward hook that puts a tap behind a module."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from logra_kernels.nn.adapters import Adapter, check_forward, parallel
from logra_kernels.nn.probe import Probe
from logra_kernels.nn.state import TapState
from logra_kernels.nn.tap import Refused, Tap


class MisfitError(ValueError):
    """A layer was called with something else than the batch's samples."""


def untapped(module: nn.Module, args: tuple, kwargs: dict, y: Tensor) -> None:
    """The hook in a copy of a model."""


def _untapped() -> Callable[[nn.Module, tuple, dict, Tensor], None]:
    return untapped


class Hook:
    """The forward hook on one module, for one of its layers. A copied or pickled model does not take it along."""

    def __init__(self, name: str, adapter: Adapter, probe: Probe, taps: TapState) -> None:
        self.name, self.adapter, self.probe, self.taps = name, adapter, probe, taps
        self.renew()

    def renew(self) -> None:
        """Trust nothing that was seen of the layer, which may have changed."""
        self._known, self._told_apart = self.adapter.known, False

    def __reduce__(self):
        return _untapped, ()

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, y: Tensor) -> Tensor | None:
        if not self.taps.active or not torch.is_grad_enabled():
            return None
        x = self._input(module, args, kwargs)
        if not self.adapter.samples_at:
            return self.behind(module, x, y)
        if x.dim() < 3:
            raise ValueError(
                f"capture: layer {self.name!r} got an input {tuple(x.shape)} without samples; give it a batch [T, N, d]"
            )
        return self.behind(module, x.transpose(0, 1), y.transpose(0, 1)).transpose(0, 1)

    def behind(self, module: nn.Module, x: Tensor, y: Tensor, adapter: Adapter | None = None) -> Tensor:
        """y with the tap behind it; `adapter` is that of this very call, where it is another than the layer's."""
        adapter = adapter or self.adapter
        if torch.compiler.is_compiling():
            adapter.check(self.name, x)
            return self._tapped(adapter, module, x, y)
        self.check_plain(x, y)
        adapter.check(self.name, x)
        try:
            return self._tapped(adapter, module, x, y)
        except MisfitError as misfit:
            armed = torch.zeros((), dtype=torch.float32, device=y.device, requires_grad=True)
            return Refused.apply(y, armed, misfit)

    def _input(self, module: nn.Module, args: tuple, kwargs: dict) -> Tensor:
        x = args[0] if args else kwargs.get(self.adapter.argument)
        if not isinstance(x, Tensor) and self.adapter.kind != "embedding":  # which says so itself
            got = f"a {type(x).__name__}" if args else f"{', '.join(kwargs) or 'nothing'} by name"
            raise ValueError(
                f"capture: layer {self.name!r}, a {type(module).__name__}, got {got} where its kind,"
                f" {self.adapter.kind!r}, takes a tensor {self.adapter.argument!r}; exclude it"
            )
        return x  # type: ignore[return-value]

    def check_plain(self, *tensors: object) -> None:
        """Raise ValueError for tensors that no tap is made for; those of subclasses (a DTensor) may be fine."""
        for one in tensors:
            if isinstance(one, Tensor) and (one.is_nested or one.layout is not torch.strided):
                kind = "nested" if one.is_nested else str(one.layout).removeprefix("torch.")
                raise ValueError(
                    f"capture: layer {self.name!r} got a {kind} tensor; pad it to [N, T, d], or give the rows of all"
                    " samples and their limits as offsets"
                )
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise ValueError(
                f"capture: layer {self.name!r} is called inside of torch.func (vmap, grad, jvp), which taps cannot be;"
                " call the model itself, which gives every sample's gradient in one backward"
            )

    def _tapped(self, adapter: Adapter, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        leaf = self._leaf(x)
        if self.taps.sequence_first and self.taps.offsets is None and not self.adapter.samples_at:
            self._check_told_apart(x, len(leaf))
        if self.adapter.kind == "embedding" and self.taps.offsets is None:
            self._check_ids(x)
        if not self._known:
            check_forward(self.name, adapter, module, x, y)
            self._known = True
        if self.probe.device != y.device:
            raise ValueError(
                f"capture: the weight of layer {self.name!r} was on {self.probe.device} when the taps were made, and"
                f" its output is on {y.device}: move the model before, and exclude layers that are offloaded"
            )
        x = x.to(y.device)  # what accelerate moves, it moves inside of the layer
        if self.taps.offsets is None and len(leaf) != len(x):
            shape = len(leaf), len(x) // len(leaf)
            return self._behind(adapter, y.unflatten(0, shape), x.unflatten(0, shape)).flatten(0, 1)
        return self._behind(adapter, y, x)

    def _check_told_apart(self, x: Tensor, samples: int) -> None:
        """In a model with layers that take [T, N, d], others may get that as well, which must not look like samples.

        A layer that was given another number of positions before is known to have the samples first.
        """
        features = self.adapter.kind != "embedding"
        if self._told_apart or not self.adapter.flattens or x.dim() < 2 + features or x.shape[0] != samples:
            return
        if x.shape[1] == samples > 1:
            raise MisfitError(
                f"capture: layer {self.name!r} got an input {tuple(x.shape)} of as many positions as samples, in a"
                " model with layers that take [T, N, d], so that they cannot be told apart: begin with a batch of"
                " another size"
            )
        if not torch.compiler.is_compiling():
            self._told_apart = samples > 1

    def _check_ids(self, x: Tensor) -> None:
        """Ids of positions, which a model adds to all samples, must not look like samples where they are as many."""
        if self._told_apart or torch.compiler.is_compiling() or len(x) < 2:
            return
        if self.adapter.counts_positions(x):
            raise MisfitError(
                f"capture: layer {self.name!r} got ids {tuple(x.shape)} that count positions, of which there are as"
                " many as samples: exclude it if all samples share it; if they are the samples' own ids, begin with a"
                " batch in another order"
            )
        self._told_apart = True

    def _behind(self, adapter: Adapter, y: Tensor, x: Tensor) -> Tensor:
        """y with the tap behind it, weights and offsets checked against its positions."""
        probe = self.probe
        offsets = self.taps.offsets
        if offsets is not None:
            shape, extent = adapter.positions(x, y), self.taps.extent
            assert extent is not None
            if math.prod(shape) != extent.numel():
                raise MisfitError(
                    f"capture: offsets end at {extent.numel()} and layer {self.name!r} has {tuple(shape)} ="
                    f" {math.prod(shape)} positions; offsets must cut all flattened positions of the batch, and layers"
                    " with other positions must be excluded"
                )
            if offsets.device != y.device:
                offsets = offsets.to(y.device)
                if not torch.compiler.is_compiling():
                    self.taps.offsets = offsets  # for the layers to come: one tensor is checked once, not at each
        weights = self.taps.weights
        if weights is not None:
            shape = adapter.positions(x, y)
            fits = (offsets is not None or weights.shape[0] == shape[0]) and weights.numel() == math.prod(shape)
            if not fits and weights.dtype == torch.bool and shape == weights.shape[:1] and offsets is None:
                weights = None  # a mask has nothing to say of one position a sample
            elif not fits:
                raise MisfitError(
                    f"capture: weights {tuple(weights.shape)} do not fit the {tuple(shape)} positions of layer"
                    f" {self.name!r}"
                )
            else:
                weights = weights.to(y.device, probe.dtype).reshape(shape[0], -1)
        if hasattr(x, "device_mesh"):
            adapter, x = parallel(self.name, adapter, x, y)
        return self.tap(adapter, y, x, weights, offsets)

    def _leaf(self, x: Tensor) -> Tensor:
        """The probe's, made with the batch's first layer where it was not begun with a size."""
        taps, leaf = self.taps, self.probe.leaf
        if leaf is None:
            if torch.compiler.is_compiling():
                raise RuntimeError(
                    "capture: a compiled model needs its batch size beforehand: call taps.reset(batch_size)"
                )
            if taps.samples is None:
                taps.samples, taps.begun_by = x.shape[0], self.name
            leaf = self.probe.renew(taps.samples)
        if taps.offsets is None and leaf.shape[0] != x.shape[0] and not self._flattened(x, leaf):
            by = "" if taps.begun_by is None else f" by layer {taps.begun_by!r}, as reset(batch_size) was not called"
            raise MisfitError(
                f"capture: layer {self.name!r} sees {x.shape[0]} samples where {leaf.shape[0]} were begun{by}; a Run"
                " takes one id a sample; call taps.reset() between batches; exclude layers whose inputs are not"
                " [N, ...], or, where a model"
                " flattens samples and positions, give sequence_length ('any' where it cuts samples into windows; or,"
                " packed, the samples' limits as offsets)"
            )
        return leaf

    def _flattened(self, x: Tensor, leaf: Tensor) -> bool:
        """Whether x is [N * T, ...], with the T that was said beforehand."""
        if not self.adapter.flattens:
            return False
        if self.taps.any_length:
            return len(leaf) > 0 and len(x) % len(leaf) == 0
        return self.taps.extent is not None and len(x) == self.taps.extent.numel()

    def tap(self, adapter: Adapter, y: Tensor, x: Tensor, weights: Tensor | None, offsets: Tensor | None) -> Tensor:
        """y with the tap behind it; everything fits, and there is a leaf."""
        # ids and norms are projected beside dy
        p_in, p_out = self.probe.factors(x.dtype if adapter.projects_x else y.dtype, y.dtype)
        if self.taps.mode is not None:
            y = self.taps.mode.tap(self.name, adapter, y, x, p_in, p_out, weights)
            if not self.taps.beside:
                return y
        shared = None if torch.compiler.is_compiling() else self.taps.shared
        kept = None if shared is None else shared.project(adapter, self.probe, x, p_in)
        return Tap.apply(y, x, self.probe.leaf, p_in, p_out, weights, offsets, adapter, kept)
