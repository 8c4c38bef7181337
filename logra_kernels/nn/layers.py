"""Which modules can be tapped, how wide they are, and which of them the user's filters choose.

A new layer kind is one entry in `_ADAPTERS`.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn


@dataclass(frozen=True)
class LayerShape:
    """The matrix product a layer does: y [.., d_out] = W x [.., d_in], `argument` being the name of x in its forward."""

    d_in: int
    d_out: int
    argument: str


def _linear(module: nn.Module) -> LayerShape | None:
    # nn.MultiheadAttention's out_proj is never called as a module, so a tap on it would see nothing
    if not isinstance(module, nn.Linear) or isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return None
    return LayerShape(module.in_features, module.out_features, "input")


def _hf_conv1d(module: nn.Module) -> LayerShape | None:
    owner = sys.modules.get("transformers.pytorch_utils")  # a model that has one has imported it
    if owner is None or not isinstance(module, owner.Conv1D):
        return None
    return LayerShape(module.nx, module.nf, "x")


_ADAPTERS: tuple[Callable[[nn.Module], LayerShape | None], ...] = (_linear, _hf_conv1d)


@dataclass(frozen=True)
class Layer:
    """One tapped weight: the modules that hold it (several when it is tied), under the first one's name."""

    name: str
    shape: LayerShape
    weight: Tensor
    modules: tuple[nn.Module, ...]


def find_layers(
    model: nn.Module, include: Sequence[str] | None = None, exclude: Sequence[str] | None = None
) -> list[Layer]:
    """The layers of `model` that the filters choose, in the model's own order.

    Args:
        model: Any module; `torch.compile`'s wrapper is looked through.
        include: Glob patterns on module names ("*.mlp.*"); None takes every layer that can be tapped.
        exclude: Glob patterns taken away from these.

    Raises:
        ValueError: A pattern matches no layer, or nothing is left.
    """
    model = getattr(model, "_orig_mod", model)
    shapes = {name: shape for name, module in model.named_modules() if (shape := _shape(module)) is not None}
    if not shapes:
        raise ValueError(f"capture: {type(model).__name__} has no layer that can be tapped (nn.Linear, Conv1D)")
    for pattern in [*(include or ()), *(exclude or ())]:
        if not any(fnmatchcase(name, pattern) for name in shapes):
            some = ", ".join(list(shapes)[:8])
            raise ValueError(f"capture: the filter {pattern!r} matches none of the {len(shapes)} layers ({some}, ...)")
    chosen = [name for name in shapes if include is None or any(fnmatchcase(name, pattern) for pattern in include)]
    chosen = [name for name in chosen if not any(fnmatchcase(name, pattern) for pattern in exclude or ())]
    if not chosen:
        raise ValueError("capture: the filters leave no layer")
    return _group_tied(model, chosen, shapes)


def _shape(module: nn.Module) -> LayerShape | None:
    return next((shape for adapter in _ADAPTERS if (shape := adapter(module)) is not None), None)


def _group_tied(model: nn.Module, names: list[str], shapes: dict[str, LayerShape]) -> list[Layer]:
    groups: dict[int, list[str]] = {}
    for name in names:
        groups.setdefault(id(model.get_submodule(name).weight), []).append(name)
    layers = []
    for tied in groups.values():
        modules = tuple(model.get_submodule(name) for name in tied)
        layers.append(Layer(tied[0], shapes[tied[0]], modules[0].weight, modules))  # type: ignore[arg-type]
    return layers
