"""A logging step of whole models on a device, beside the same step without taps: time, peak memory, tokens a second."""

import statistics
from collections.abc import Callable, Iterator

import torch
from bench_logging import Hooks, own_factors, step
from clock import synced
from gpu_clock import peak_beyond
from torch import Tensor, nn

import logra_kernels as lk

RANK, ROUNDS = 64, 7
WARMUPS = 3  # until a compiler's graphs are recorded
LAYERS = (".self_attn.", ".mlp.")
INCLUDE = ["*.self_attn.*", "*.mlp.*"]
MODELS = {  # of a Llama; then sequences and tokens of a step
    "8b": ({"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 8, "vocab_size": 128256}, (4, 2048)),
    "160m": ({"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
              "num_key_value_heads": 12, "vocab_size": 32000}, (8, 512)),
}  # fmt: skip


def make(sizes: dict, batch: tuple[int, int], device: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            config = LlamaConfig(**sizes, max_position_embeddings=batch[1], use_cache=False)
            model = LlamaForCausalLM(config).requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    return model, torch.randint(0, sizes["vocab_size"], batch, device=device)


def providers(
    model: nn.Module, taps: lk.Taps, ids: Tensor, compiler: str | None
) -> dict[str, Callable[[], dict[str, Tensor] | None]]:
    """name -> one step. What is compiled stays tapped, and is traced with the taps at work and at rest."""
    if compiler is None:

        def tapped() -> dict[str, Tensor]:
            with taps:
                taps.reset(len(ids))
                step(model, ids)
            return taps.grads

        return {"plain": lambda: step(model, ids), "logra_kernels": tapped}
    taps.__enter__()
    run = torch.compile(model, mode=None if compiler == "default" else compiler)

    def compiled(active: bool) -> dict[str, Tensor] | None:
        torch.compiler.cudagraph_mark_step_begin()
        taps.active = active
        if active:
            taps.reset(len(ids))
        step(run, ids)
        return taps.grads if active else None

    return {"plain": lambda: compiled(False), "logra_kernels": lambda: compiled(True)}


def hooks(model: nn.Module, ids: Tensor) -> Callable[[], dict[str, Tensor]]:
    """One step of the plain way."""
    hooked = Hooks(model, own_factors(model, LAYERS))
    hooked.remove()

    def call() -> dict[str, Tensor]:
        hooked.attach()
        step(model, ids)
        hooked.remove()
        return hooked.grads

    return call


def check(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, g in expected.items():
        assert (got[name].float() - g.float()).norm() <= 0.05 * g.float().norm(), name


def measure(
    name: str, compiler: str | None = None, device: str = "cuda", dtype: torch.dtype = torch.bfloat16,
    model: tuple[dict, tuple[int, int]] | None = None, rounds: int = ROUNDS,
) -> Iterator[dict]:  # fmt: skip
    """One row a provider; raises before any timing where the gradients are not those of the plain hooks."""
    sizes, batch = model or MODELS[name]
    net, ids = make(sizes, batch, device, dtype)
    alone = peak_beyond(lambda: step(net, ids))
    held = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    taps = lk.capture(net, lk.Projection(rank=RANK), include=INCLUDE)
    by_hand = hooks(net, ids)
    expected = by_hand()
    steps = providers(net, taps, ids, compiler)
    got = steps["logra_kernels"]()
    assert got is not None
    check(got, expected)
    del got, expected
    if compiler is None:
        steps["hooks"] = by_hand
    peaks = {}
    for provider, run in steps.items():
        for _ in range(WARMUPS):
            run()
        before = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
        peaks[provider] = before + (peak_beyond(run) or 0)
    seconds: dict[str, list[float]] = {provider: [] for provider in steps}
    for _ in range(rounds):
        for provider, run in steps.items():
            begun = synced()
            run()
            seconds[provider].append(synced() - begun)
    for provider, own in seconds.items():
        ratios = [mine / plain for mine, plain in zip(own, seconds["plain"], strict=True)]
        median = statistics.median(own)
        row = {"part": f"logging {name}", "provider": provider, "compiled": compiler or "no"}
        row |= {"shape": f"{batch[0]}x{batch[1]} k{RANK}", "median_ms": round(median * 1e3, 2)}
        row |= {"tokens_per_s": round(ids.numel() / median), "time_ratio": round(statistics.median(ratios), 4)}
        if alone is not None and compiler is None and provider == "logra_kernels":
            row["memory_ratio"] = round(peaks[provider] / (held + alone), 4)  # without taps and factors
        yield row
