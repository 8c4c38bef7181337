"""What logging costs on top of the model's own forward and backward, a whole model at a time.

A Llama-shaped model (8 layers, hidden 512, intermediate 1408, vocabulary 8192; random weights, frozen), its 24 MLP
linears tapped at k = 64, 8 x 256 tokens in fp32. Every provider does the same forward and backward; steps are timed in
turn, round by round, and each round gives a ratio to the plain step of that round.
"""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import logra_kernels as lk

RANK, BATCH, TOKENS, ROUNDS = 64, 8, 256, 7
INCLUDE = ["*.mlp.*"]


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

    def __init__(self, model: nn.Module, within: tuple[str, ...] = (".mlp.",)) -> None:
        self.grads: dict[str, Tensor] = {}
        self.handles = []
        self.layers = []
        projection = lk.Projection(rank=RANK)
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Linear) and any(part in name for part in within):
                p_in = projection.factor(name, "in", layer.in_features).to(layer.weight)
                p_out = projection.factor(name, "out", layer.out_features).to(layer.weight)
                self.layers.append((layer, self._hook(name, p_in, p_out)))
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


def providers(model: nn.Module, ids: Tensor) -> dict[str, Callable[[], dict[str, Tensor] | None]]:
    """name -> one logging step; each leaves the model as it found it."""
    taps, narrow = (
        lk.capture(model, lk.Projection(rank=RANK), include=INCLUDE, projection_dtype=dtype)
        for dtype in (None, torch.bfloat16)
    )
    fisher = {name: torch.zeros(o * i, o * i) for name, (o, i) in taps.layers.items()}

    def plain() -> None:
        step(model, ids)

    def hooks() -> dict[str, Tensor]:
        hooked = Hooks(model)
        step(model, ids)
        hooked.remove()
        return hooked.grads

    def ours(on: lk.Taps) -> dict[str, Tensor]:
        with on:
            on.reset(BATCH)
            step(model, ids)
        return on.grads

    def ours_and_fisher(on: lk.Taps) -> dict[str, Tensor]:
        grads = ours(on)
        for name, g in grads.items():
            lk.accumulate_gram(g.flatten(1), fisher[name])
        return grads

    return {
        "plain": plain,
        "hooks": hooks,
        "logra_kernels": lambda: ours(taps),
        "logra_kernels bf16": lambda: ours(narrow),
        "logra_kernels+fisher": lambda: ours_and_fisher(taps),
    }


def check(found: dict[str, dict[str, Tensor] | None]) -> None:
    expected = found["hooks"]
    assert expected is not None
    assert len(expected) == 24
    for name, within in (("logra_kernels", 1e-4), ("logra_kernels bf16", 2e-2), ("logra_kernels+fisher", 1e-4)):
        got = found[name]
        assert got is not None
        for layer, g in expected.items():
            torch.testing.assert_close(got[layer], g, rtol=within, atol=within * g.abs().max().item())


def high_water() -> int:
    """Peak resident bytes of this process; getrusage would count the parent's before exec."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024


def peak_bytes(provider: str) -> int:
    """High-water mark of a fresh process after three steps of one provider."""
    out = subprocess.run([sys.executable, __file__, provider], capture_output=True, text=True, check=True)
    return int(out.stdout.split()[-1])


def measure(rounds: int = ROUNDS) -> list[dict]:
    """One row a provider; raises before any timing if a provider's gradients are wrong."""
    model, ids = make_model()
    steps = providers(model, ids)
    check({name: run() for name, run in steps.items()})
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, run in steps.items():
            begun = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begun)
    memory = {name: peak_bytes(name) for name in steps}
    rows = []
    for name, own in seconds.items():
        ratios = [mine / plain for mine, plain in zip(own, seconds["plain"], strict=True)]
        rows.append(
            {
                "provider": name,
                "median_ms": round(statistics.median(own) * 1e3, 1),
                "tokens_per_s": round(BATCH * TOKENS / statistics.median(own)),
                "time_ratio": round(statistics.median(ratios), 4),
                "time_ratio_range": [round(min(ratios), 4), round(max(ratios), 4)],
                "memory_ratio": round(memory[name] / memory["plain"], 4),
            }
        )
    return rows


def bench_logging(benchmark) -> None:
    rows = benchmark.pedantic(measure, args=(3,), rounds=1)
    for row in rows:
        print(row)


def main() -> None:
    """`bench_logging.py` measures and records; `bench_logging.py PROVIDER` prints that provider's peak memory."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    if len(sys.argv) > 1:
        model, ids = make_model()
        run_step = providers(model, ids)[sys.argv[1]]
        for _ in range(3):
            run_step()
        print(high_water())
        return
    from machine import commit, cpu_model
    from record import RESULTS, slug, text

    rows = measure()
    facts = {"op": "logging", "machine": cpu_model(), "commit": commit(), "torch": torch.__version__}
    facts |= {"shape": "llama 8x512, 24 linears, k=64, 8x256", "dtype": "fp32", "threads": torch.get_num_threads()}
    path = RESULTS / f"logging-{slug(cpu_model())}.json"
    path.write_text(text({**facts, "rows": rows}))
    print(path.read_text())


if __name__ == "__main__":
    main()
