"""Per-sample autograd: the definition that captured gradients must equal."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from logra_kernels.nn import Taps


def projected_autograd(model: nn.Module, taps: Taps, losses: list[Callable[[], Tensor]]) -> dict[str, Tensor]:
    """{layer: [N, k_out, k_in]} as P_out dW P_in^T, dW from one backward of the whole model for each sample's loss."""
    wanted = {name: model.get_submodule(name).weight for name in taps.layers}
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    for p in frozen:
        p.requires_grad_(True)
    rows: dict[str, list[Tensor]] = {name: [] for name in wanted}
    for loss in losses:
        grads = torch.autograd.grad(loss(), list(wanted.values()))
        for (name, _), dw in zip(wanted.items(), grads, strict=True):
            p_in, p_out = (None if p is None else p.double() for p in taps.factors[name])
            module = model.get_submodule(name)
            g = (
                dw.double() if isinstance(module, nn.Linear | nn.Embedding) else dw.double().T
            )  # Conv1D keeps W transposed
            g = g if p_out is None else p_out @ g
            rows[name].append(g if p_in is None else g @ p_in.T)
    for p in frozen:
        p.requires_grad_(False)
    return {name: torch.stack(parts) for name, parts in rows.items()}


def exact_rows(loss_of: Callable[..., Tensor], model: nn.Module, taps: Taps, x: Tensor, target: Tensor):
    """The same for loss_of(model, x, target) of each sample alone, while the taps are still on."""
    taps.active = False
    samples = (slice(i, i + 1) for i in range(len(x)))
    exact = projected_autograd(model, taps, [lambda one=one: loss_of(model, x[one], target[one]) for one in samples])
    taps.active = True
    return exact


def assert_equal_rows(got: dict[str, Tensor], exact: dict[str, Tensor], rtol: float = 1e-5) -> None:
    """Relative to each sample's and layer's own norm."""
    assert list(got) == list(exact)
    for name in exact:
        assert got[name].shape == exact[name].shape
        error = (got[name].double() - exact[name]).flatten(1).norm(dim=1)
        size = exact[name].flatten(1).norm(dim=1)
        assert bool((size > 0).all()), f"{name}: the oracle is zero, the test would prove nothing"
        assert bool((error <= rtol * size).all()), f"{name}: {(error / size).max():.2e}"
