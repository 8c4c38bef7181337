"""What logging costs on top of the model's own forward and backward, a whole model at a time.

    python bench/bench_logging.py [--providers plain,logra_kernels,LogIX] [--rounds 16]

A Llama-shaped model (8 layers, hidden 512, intermediate 1408, vocabulary 8192; random weights, frozen), its 24 MLP
linears tapped at k = 64, 8 x 256 tokens in fp32. Every provider does the same forward and backward, in turn, round by
round, each round beginning with another. A row has the median of the rounds' ratios to the plain step of the same
round, and that median's standard error, by bootstrap. All keep their heap: what glibc gives back after a step, the next
one faults in again, 100,000 pages of it. Peers run where they are installed (`logging_peers.py`).

" pca" has factors like those that observing learns, so that gate and up share their input's projection.

"+fisher" sums the rows as a `Run` does, in panels of 256. Every round times what 32 steps add, which is one whole
panel, and counts a 32nd of it to the step.
"""

import argparse
import ctypes
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from logging_peers import PEERS, Factors, importable, targets
from torch import Tensor, nn

import logra_kernels as lk
from logra_kernels.curvature import GramSums, RawFisher
from logra_kernels.curvature.sums import PANEL
from logra_kernels.projection import Learned

RANK, BATCH, TOKENS, ROUNDS = 64, 8, 256, 16
INCLUDE = ["*.mlp.*"]
EVERY_LINEAR = (".self_attn.", ".mlp.")  # by parts of their names
STEPS = PANEL // BATCH  # to a panel of rows


def keep_heap() -> None:
    """Tell glibc to give no memory back to the system, and to take none from it outside the heap."""
    mallopt = ctypes.CDLL(None).mallopt
    trim_threshold, mmap_threshold = -1, -3
    assert mallopt(mmap_threshold, 1 << 30)
    assert mallopt(trim_threshold, (1 << 31) - 1)


def make_model() -> tuple[nn.Module, Tensor]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=8192,
        max_position_embeddings=TOKENS,
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM(config).requires_grad_(False)
    return model, torch.randint(0, 8192, (BATCH, TOKENS))


def step(model: nn.Module, ids: Tensor) -> None:
    """Forward and backward down to the embeddings, as training the lowest layer's inputs would need."""
    embedded = model.get_input_embeddings()(ids).requires_grad_()
    logits = model(inputs_embeds=embedded).logits[:, :-1]
    nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()


class Hooks:
    """The plain way: keep P x in a forward hook, project dy and sum the outer products in a tensor hook, by torch."""

    def __init__(self, model: nn.Module, factors: Factors) -> None:
        self.grads: dict[str, Tensor] = {}
        self.handles: list = []
        self.layers = [(model.get_submodule(name), self._hook(name, *pair)) for name, pair in factors.items()]
        self.attach()

    def attach(self) -> None:
        self.handles = [layer.register_forward_hook(hook) for layer, hook in self.layers]

    def _hook(self, name: str, p_in: Tensor, p_out: Tensor) -> Callable:
        def forward(layer: nn.Module, args: tuple, y: Tensor) -> None:
            a = args[0].detach() @ p_in.T

            def backward(dy: Tensor) -> None:
                self.grads[name] = (dy @ p_out.T).transpose(1, 2) @ a

            if y.requires_grad:
                y.register_hook(backward)

        return forward

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def own_factors(model: nn.Module, projection: lk.Projection, within: tuple[str, ...] = (".mlp.",)) -> Factors:
    return {
        name: (
            projection.factor(name, "in", m.in_features).to(m.weight),
            projection.factor(name, "out", m.out_features).to(m.weight),
        )
        for name, m in targets(model, within).items()
    }


def as_learned(model: nn.Module, dtype: torch.dtype) -> lk.Projection:
    """Drawn factors in the place of PCA's, of which gate and up, that have one input, have one for it."""
    drawn = own_factors(model, lk.Projection(rank=RANK))
    factors = {}
    for name, (_, p_out) in drawn.items():
        factors[name, "in"] = drawn[name.replace("up_proj", "gate_proj")][0].to(dtype)
        factors[name, "out"] = p_out.to(dtype)
    return lk.Projection(RANK, "pca", learned=Learned(factors, dict.fromkeys(drawn, 1.0)))


def by_hooks(model: nn.Module, ids: Tensor, factors: Factors) -> dict[str, Tensor]:
    hooked = Hooks(model, factors)
    step(model, ids)
    hooked.remove()
    return hooked.grads


@dataclass
class Provider:
    """What is timed, and how its gradients are checked.

    Attributes:
        run: One logging step, which leaves the model as it is; its gradients.
        factors: What they are projected with.
        within: How near they must be to those of plain hooks.
        sum_panel: Adds the last step's rows to the Fisher as often as fills a panel.
        check_sums: Does so once, and raises unless the first layer's Fisher is right.
    """

    run: Callable[[], dict[str, Tensor] | None]
    factors: Factors
    within: float
    sum_panel: Callable[[], None] | None = None
    check_sums: Callable[[], None] | None = None

    def seconds(self) -> float:
        """Of one step, with its part of a panel."""
        begun = time.perf_counter()
        self.run()
        stepped = time.perf_counter()
        if self.sum_panel is None:
            return stepped - begun
        self.sum_panel()
        return stepped - begun + (time.perf_counter() - stepped) / STEPS


def provider(name: str, model: nn.Module, ids: Tensor) -> Provider:
    """Names of ours: "logra_kernels", then " pca" for factors as learned, " bf16" where activations are rounded
    to be projected, and "+fisher".
    """
    if name in PEERS:
        peer = PEERS[name](model, ids, RANK, step)
        return Provider(peer.run, peer.factors, 1e-4)
    if name == "plain":
        return Provider(lambda: step(model, ids), {}, 0)
    narrow = " bf16" in name
    dtype = torch.bfloat16 if narrow else torch.float32
    projection = as_learned(model, dtype) if " pca" in name else lk.Projection(rank=RANK)
    factors = own_factors(model, projection)
    if name == "hooks":
        return Provider(lambda: by_hooks(model, ids, factors), factors, 1e-4)
    taps = lk.capture(model, projection, include=INCLUDE, projection_dtype=dtype)

    def run() -> dict[str, Tensor]:
        with taps:
            taps.reset(BATCH)
            step(model, ids)
        return taps.grads

    within = 2e-2 if narrow else 1e-4
    return with_fisher(taps, run, factors, within) if name.endswith("+fisher") else Provider(run, factors, within)


def with_fisher(taps: lk.Taps, logs: Callable[[], dict[str, Tensor]], factors: Factors, within: float) -> Provider:
    parts = RawFisher.columns(taps.layers)
    sums, rows = GramSums(parts), torch.empty(0)

    def run() -> dict[str, Tensor]:
        nonlocal rows
        grads = logs()
        rows = taps.rows()
        return grads

    def sum_panel() -> None:
        for _ in range(STEPS):
            sums.add(rows)

    def check_sums() -> None:
        sum_panel()
        layer = next(iter(parts))
        g = rows[:, parts[layer]].double()
        torch.testing.assert_close(
            sums.total([layer])[layer].double(), STEPS * g.T @ g, rtol=1e-5, atol=1e-5 * STEPS * g.square().max().item()
        )

    return Provider(run, factors, within, sum_panel, check_sums)


OURS = tuple(f"logra_kernels{kind}" for kind in ("", " bf16", " pca", " pca bf16", "+fisher", " bf16+fisher"))


def check(name: str, got: dict[str, Tensor] | None, expected: dict[str, Tensor], within: float) -> None:
    assert got is not None
    assert len(expected) == 24, name
    for layer, g in expected.items():
        torch.testing.assert_close(
            got[layer], g, rtol=within, atol=within * g.abs().max().item(), msg=lambda m: f"{name}: {m}"
        )


def high_water() -> int:
    """Peak resident bytes of this process; getrusage would count the parent's before exec."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024


def peak_bytes(name: str) -> int:
    """High-water mark of a fresh process in the second to fourth step of one provider."""
    # every freed block goes back to the system, so that the mark does not hang on how they fitted into the heap
    settings = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    asked = [sys.executable, __file__, "--peak", name]
    return int(subprocess.run(asked, capture_output=True, text=True, check=True, env=settings).stdout.split()[-1])


def median_error(ratios: list[float]) -> float:
    """The standard error of their median: its deviation over 2,000 resamples."""
    draw = random.Random(0)
    return statistics.stdev(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))


def measure(names: list[str], rounds: int, with_memory: bool = True) -> list[dict]:
    """One row a provider, "plain" first; raises before any timing if a provider's gradients are wrong."""
    keep_heap()
    model, ids = make_model()
    providers = {}
    for name in names:
        made = providers[name] = provider(name, model, ids)
        if name != "plain":
            check(name, made.run(), by_hooks(model, ids, made.factors), made.within)
        if made.check_sums is not None:
            made.check_sums()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for r in range(-1, rounds):  # the first, untimed, brings the heap to its size
        for i in range(len(names)):
            name = names[(i + r) % len(names)]
            taken = providers[name].seconds()
            if r >= 0:
                seconds[name].append(taken)
    memory = {name: peak_bytes(name) for name in names} if with_memory else {}
    rows = []
    for name, own in seconds.items():
        ratios = [mine / plain for mine, plain in zip(own, seconds["plain"], strict=True)]
        rows.append(
            {
                "provider": name,
                "best_ms": round(min(own) * 1e3, 1),
                "median_ms": round(statistics.median(own) * 1e3, 1),
                "tokens_per_s": round(BATCH * TOKENS / statistics.median(own)),
                "time_ratio_median": round(statistics.median(ratios), 4),
                "time_ratio_error": round(median_error(ratios), 4),
            }
            | ({"memory_ratio": round(memory[name] / memory["plain"], 4)} if memory else {})
        )
    return rows


def bench_logging(benchmark) -> None:
    for row in benchmark.pedantic(measure, args=(["plain", "hooks", *OURS], 3, False), rounds=1):
        print(row)


def main() -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    parser = argparse.ArgumentParser(description="Time of a logging step over that of the plain one.")
    parser.add_argument("--providers", help="comma-separated; default: all that are installed")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--peak", metavar="PROVIDER", help="print one provider's peak memory in bytes")
    parser.add_argument("--dry", action="store_true", help="print and do not record")
    asked = parser.parse_args()
    if asked.peak:
        model, ids = make_model()
        made = provider(asked.peak, model, ids)
        if asked.peak != "hooks":
            made.factors.clear()  # the check's, beside the taps' own
        made.seconds()  # in which a tap learns who shares its input
        Path("/proc/self/clear_refs").write_text("5")  # the mark is of the steps to come alone
        for _ in range(3):
            made.seconds()
        print(high_water())
        return
    from machine import commit, cpu_model
    from record import RESULTS, slug, text

    names = asked.providers.split(",") if asked.providers else ["hooks", *OURS, *importable()]
    rows = measure(["plain", *(name for name in names if name != "plain")], asked.rounds)
    facts = {"op": "logging", "machine": cpu_model(), "commit": commit(), "torch": torch.__version__}
    facts |= {"shape": "llama 8x512, 24 linears, k=64, 8x256", "dtype": "fp32", "threads": torch.get_num_threads()}
    facts |= {"rounds": asked.rounds}
    contents = text({**facts, "rows": rows})
    print(contents)
    if not asked.dry:
        (RESULTS / f"logging-{slug(cpu_model())}.json").write_text(contents)


if __name__ == "__main__":
    main()
