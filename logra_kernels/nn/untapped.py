"""What no tap sees: modules of PyTorch whose matrices are of no kind, and fused calls that pass whole layers by."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from logra_kernels.nn.adapters import adapt

_OF_NO_KIND = (
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.Bilinear,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_FUSED = nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder
_NAMED = 3


def warn_of_untapped(model: nn.Module, kinds: Sequence[str]) -> None:
    """Name the modules whose weights have no part in the rows though they multiply what the model computes."""
    found = [
        f"{name!r} ({type(module).__name__})"
        for name, module in model.named_modules()
        if isinstance(module, _OF_NO_KIND) and not adapt(module, tuple(kinds), bias=False)
    ]
    if found:
        more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        warnings.warn(
            f"capture: the weights of {len(found)} modules have no part in the rows: {', '.join(found[:_NAMED])}{more};"
            " write them with nn.Linear or nn.Conv layers to have them, or name the layers that are wanted (include=)",
            stacklevel=3,
        )


@contextmanager
def without_fused_layers(model: nn.Module) -> Iterator[None]:
    """Have a model of PyTorch's transformer layers call each part of them, frozen and in eval mode, too.

    Else `nn.TransformerEncoder` makes its padded batch a nested tensor, and its layers are one call of the library's.
    """
    if (
        not any(isinstance(module, _FUSED) for module in model.modules())
        or not torch.backends.mha.get_fastpath_enabled()
    ):
        yield
        return
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
