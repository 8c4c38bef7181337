"""Which layers of a model are tapped: what the kinds and the user's filters choose, tied weights seen as one layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from logra_kernels.nn.adapters import DEFAULT_KINDS, KINDS, Adapter, AttentionAdapter, adapt, forwards_as

SEQUENCE_FIRST = nn.TransformerEncoderLayer, nn.TransformerDecoderLayer


@dataclass(frozen=True)
class Layer:
    """One tapped weight under the first module's name, with every module that holds it (several when it is tied)."""

    name: str
    weight: Tensor
    holders: tuple[tuple[nn.Module, Adapter], ...]

    @property
    def d_in(self) -> int:
        return self.holders[0][1].d_in

    @property
    def d_out(self) -> int:
        return self.holders[0][1].d_out


def find_layers(
    model: nn.Module,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    kinds: Sequence[str] = DEFAULT_KINDS,
    bias: bool = False,
) -> list[Layer]:
    """The layers of `model` that kinds and filters choose, in the model's own order.

    Args:
        model: Any module; `torch.compile`'s wrapper is looked through.
        include: Glob patterns on module names ("*.mlp.*"); None takes every layer of the kinds.
        exclude: Glob patterns taken away from these.
        kinds: Of "linear", "conv", "embedding", "norm", "expert".
        bias: Give linear layers that have a bias one more input column, its gradient; not where their weight is tied to
            a module's that has none.

    Raises:
        ValueError: An unknown kind, a pattern that matches no layer, or nothing is left.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise ValueError(f"capture: kinds {unknown} are unknown; they must be of {', '.join(KINDS)}")
    model = getattr(model, "_orig_mod", model)
    lazy = [name for name, p in model.named_parameters() if is_lazy(p)]
    if lazy:
        raise ValueError(f"capture: {lazy[0]!r} is yet without a shape: run the model on one batch before")
    found = tappable(model, kinds, bias)
    if not found:
        raise ValueError(f"capture: {type(model).__name__} has no layer of the kinds {', '.join(kinds)}")
    for pattern in [*(include or ()), *(exclude or ())]:
        if not any(fnmatchcase(name, pattern) for name in found):
            some = ", ".join(list(found)[:8])
            raise ValueError(f"capture: the filter {pattern!r} matches none of the {len(found)} layers ({some}, ...)")
    chosen = {name for name in found if include is None or any(fnmatchcase(name, pattern) for pattern in include)}
    chosen = {name for name in chosen if not any(fnmatchcase(name, pattern) for pattern in exclude or ())}
    if not chosen:
        raise ValueError("capture: the filters leave no layer")
    modules = dict(model.named_modules())
    for name in [name for name in found if name in chosen]:
        module, adapter = found[name]
        _check(name, module, adapter)
        if not isinstance(adapter, AttentionAdapter):  # which knows
            adapter.samples_at = _samples_at(name, modules)
    weights = {name: adapter.parameters(module)[0] for name, (module, adapter) in found.items() if name in chosen}
    tied: dict[tuple[int, str], list[str]] = {}
    for name, weight in weights.items():
        tied.setdefault((id(weight), found[name][1].part), []).append(name)
    return [Layer(names[0], weights[names[0]], _holders(names, found)) for names in tied.values()]


def _check(name: str, module: nn.Module, adapter: Adapter) -> None:
    """Raise ValueError for a layer that would give an error later."""
    weight = adapter.parameters(module)[0]
    if weight.is_complex():
        raise ValueError(f"capture: the weight of layer {name!r} is {weight.dtype}; it must be real: exclude the layer")


def _samples_at(name: str, modules: Mapping[str, nn.Module]) -> int:
    """Which dimension holds the samples: the second one in PyTorch's transformer layers that take [T, N, d].

    Raises:
        ValueError: The block above the layer is such a one with a forward of its own.
    """
    path = name.split(".")
    for above in (".".join(path[:i]) for i in range(len(path))):
        block = modules.get(above)
        if isinstance(block, SEQUENCE_FIRST) and not block.self_attn.batch_first:
            if forwards_as(block, *SEQUENCE_FIRST):
                return 1
            raise ValueError(
                f"capture: layer {name!r} is in {above!r}, a {type(block).__name__} that takes [T, N, d] and has a"
                " forward of its own: make it with batch_first=True, or exclude it"
            )
    return 0


def _holders(
    names: Sequence[str], found: Mapping[str, tuple[nn.Module, Adapter]]
) -> tuple[tuple[nn.Module, Adapter], ...]:
    """The modules of one weight, whose gradients are to be added: all without a bias where one is."""
    holders = tuple(found[name] for name in names)
    if len({adapter.d_in for _, adapter in holders}) == 1:
        return holders
    plain = tuple((module, adapt(module, (adapter.kind,), bias=False)[adapter.part]) for module, adapter in holders)
    for (_, adapter), (_, before) in zip(plain, holders, strict=True):
        adapter.samples_at = before.samples_at
    return plain


def tappable(
    model: nn.Module, kinds: Sequence[str] = KINDS, bias: bool = False
) -> dict[str, tuple[nn.Module, Adapter]]:
    """Layer name -> (module, its adapter) of all layers of these kinds, in the model's own order."""
    return {
        ".".join(filter(None, (name, part))): (module, adapter)
        for name, module in model.named_modules()
        for part, adapter in adapt(module, tuple(kinds), bias).items()
    }
