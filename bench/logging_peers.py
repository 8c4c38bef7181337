"""LogIX, Bergson and dattri as `bench_logging.py` and `gpu_logging.py` drive them: same layers, rank, batch and loss.

Each is a step beside `step(model, ids)` that keeps its gradients in memory, with the factors it drew, so that they can
be checked. None is told to write a store, as the others do not, and none gathers a Hessian. Models that they change are
copies, whose weights are the model's own.
"""

import copy
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

Factors = dict[str, tuple[Tensor, Tensor]]  # layer -> P_in [k, d_in], P_out [k, d_out]
Step = Callable[[nn.Module, Tensor], None]


@dataclass
class Peer:
    """A provider: one logging step, and the factors its gradients are projected with."""

    run: Callable[[], dict[str, Tensor]]
    factors: Factors


MLP = (".mlp.",)  # what the names of the tapped layers contain one of


def targets(model: nn.Module, within: tuple[str, ...] = MLP) -> dict[str, nn.Linear]:
    linears = ((name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear))
    return {name: m for name, m in linears if any(part in name for part in within)}


def copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})


def logix(model: nn.Module, ids: Tensor, rank: int, step: Step, within: tuple[str, ...] = MLP) -> Peer:
    """LogIX 0.1.1 with its own LoRA layers (kaiming-uniform factors) on a copy, and the "log" plugin alone."""
    from logix import LogIX
    from logix.config import LoRAConfig

    names = list(targets(model, within))
    weight = next(model.parameters())
    model = copied(model)
    root = Path(tempfile.mkdtemp())
    config = root / "config.yaml"
    config.write_text(f"root_dir: {root}\n")
    run = LogIX("bench", config=str(config))
    run.watch(model, name_filter=list(within))
    run.add_lora(lora_config=LoRAConfig(init="random", rank=rank))
    model.to(weight.dtype)
    run.setup({"grad": ["log"]})
    sample_ids = [str(i) for i in range(len(ids))]

    def once() -> dict[str, Tensor]:
        with run(data_id=sample_ids):
            step(model, ids)
        log = run.get_log()[1]
        return {name: log[f"{name}.logix_lora_B"]["grad"] for name in names}

    lora = {name: model.get_submodule(name) for name in names}
    factors = {
        name: (m.logix_lora_A.weight.detach(), m.logix_lora_C.weight.detach().T)  # type: ignore[union-attr, operator]
        for name, m in lora.items()
    }
    return Peer(once, factors)


def bergson(model: nn.Module, ids: Tensor, rank: int, step: Step, within: tuple[str, ...] = MLP) -> Peer:
    """Bergson 2.5 with the collector that keeps gradients in memory, Rademacher factors, no normaliser."""
    from bergson.collector.gradient_collectors import TraceCollector
    from bergson.gradients import GradientProcessor

    layers = targets(model, within)
    weight = next(model.parameters())
    weight.requires_grad_(True)  # it looks for the dtype among trainable ones; the step itself trains none
    collector = TraceCollector(
        model=model,
        target_modules=set(layers),
        processor=GradientProcessor(projection_dim=rank),
        device=weight.device,
        dtype=weight.dtype,
    )
    weight.requires_grad_(False)

    def once() -> dict[str, Tensor]:
        collector.mod_grads.clear()
        with collector:
            step(model, ids)
        return {name: parts[0].unflatten(1, (rank, rank)) for name, parts in collector.mod_grads.items()}

    def factor(name: str, width: int, role: str) -> Tensor:
        return collector.projection(name, rank, width, role, weight.device, weight.dtype)

    factors = {
        name: (factor(name, m.in_features, "right"), factor(name, m.out_features, "left")) for name, m in layers.items()
    }
    return Peer(once, factors)


def dattri(model: nn.Module, ids: Tensor, rank: int, step: Step, within: tuple[str, ...] = MLP) -> Peer:
    """dattri 0.3.0 with the hooks and compressors of its `LoGraAttributor`, on a copy; Gaussian factors.

    It compiles what projects, for which torch needs a C++ compiler.
    """
    import torch
    from dattri.algorithm.block_projected_if import HookManager, setup_model_compressors

    model = copied(model)
    layers = targets(model, within)
    normal = {"device": "cpu", "proj_dim": rank, "proj_max_batch_size": 64, "proj_type": "normal"}
    compressors = setup_model_compressors(
        model, list(layers), normal, {**normal, "proj_dim": -1, "proj_type": "identity"}, {"input_ids": ids}
    )
    hooks = HookManager(model, list(layers))
    hooks.set_compressors(compressors)

    def once() -> dict[str, Tensor]:
        step(model, ids)
        grads = hooks.get_compressed_grads()
        return {name: g.unflatten(1, (rank, rank)) for name, g in zip(layers, grads, strict=True)}

    def factor(project: Callable, width: int) -> Tensor:
        return project(torch.eye(width), ensemble_id=0).T

    factors = {}
    for (name, m), compressor in zip(layers.items(), compressors, strict=True):
        of_dy, of_x = compressor.sparsifier.sparsifier_comp
        # it takes losses for means over the batch, and multiplies dy by the batch's size
        factors[name] = factor(of_x, m.in_features), factor(of_dy, m.out_features) * len(ids)
    return Peer(once, factors)


PEERS = {"LogIX": logix, "Bergson": bergson, "dattri": dattri}


def importable(names: Iterable[str] = tuple(PEERS)) -> Iterator[str]:
    """Those of the peers that are installed; says which are not."""
    for name in names:
        try:
            __import__(name.lower())
        except ImportError as error:
            print(f"{name} is left out: {error}")
        else:
            yield name
