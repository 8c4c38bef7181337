"""What a model's modes, its loss's scale and the rows of a first batch show to be amiss, with what to do."""

import math

from torch import Tensor, nn

from logra_kernels.nn import Taps


def mode_problems(model: nn.Module) -> list[str]:
    """Of modules that make gradients random, or that mix the samples of a batch."""
    problems = []
    modules = list(model.named_modules())
    dropout = [n for n, m in modules if m.training and _drops(m)]
    if dropout:
        problems.append(f"dropout is on ({some(dropout)}), so gradients are random: call model.eval() before logging")
    mixing = [
        n
        for n, m in modules
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and (m.training or m.running_mean is None)
    ]
    if mixing:
        problems.append(
            f"batch norm uses the batch's own statistics ({some(mixing)}), so every sample's gradient depends on its"
            " batch-mates: call model.eval() before logging, or use a norm without running statistics"
        )
    return problems


def _drops(module: nn.Module) -> bool:
    """Whether a module in train mode drops at random: nn.Dropout, or by a function, at a rate it is given by name."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    if isinstance(module, nn.RNNBase) and module.num_layers == 1:  # between layers only
        return False
    return any(isinstance(rate, float) and rate > 0 and "drop" in name for name, rate in vars(module).items())


def zero_layers(taps: Taps) -> list[str]:
    """Of layers that got gradients, and all of them zero; experts that no token came to do so rightly."""
    kinds = {name: holders[0][1].kind for name, holders in taps.holders.items()}
    grads = {name: grad for name, grad in taps.grads.items() if kinds[name] != "expert"}
    zero = [name for name, grad in grads.items() if grad.numel() and not bool(grad.any())]
    if not zero:
        return []
    return [
        f"all gradients of {len(zero)} layers are exactly zero in this batch ({some(zero)}): is a LoRA's B still zero,"
        " is the output not used, are activations quantised without a gradient? exclude such layers"
    ]


def unscaled(rows: Tensor, loss_scale: float) -> Tensor:
    """Rows of the loss itself.

    Raises:
        ValueError: `loss_scale` is no positive number.
    """
    if not (loss_scale > 0 and math.isfinite(loss_scale)):
        raise ValueError(f"Run: loss_scale is {loss_scale}; it must be what the loss was multiplied with, above 0")
    return rows if loss_scale == 1 else rows / loss_scale


def some(names: list[str]) -> str:
    return ", ".join(repr(n) for n in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
