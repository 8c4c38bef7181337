"""A logging step of whole models on a device, beside the same step without taps: time, peak memory, tokens a second."""

import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from bench_logging import EVERY_LINEAR, Hooks, own_factors, step
from clock import synced
from gpu_clock import failed, peak_beyond
from logging_peers import PEERS, Factors, importable
from torch import Tensor, nn

import logra_kernels as lk
from logra_kernels.nn import Covariances

RANK, ROUNDS = 64, 7
GPU_PEERS = ("LogIX", "Bergson")
WARMUPS = 3  # until a compiler's graphs are recorded
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


Run = Callable[[], dict[str, Tensor] | None]


@dataclass
class Provider:
    """One step, the bytes that it keeps between steps, and the factors its gradients are to be checked with."""

    run: Run
    kept: int = 0
    factors: Factors | None = None


def allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def compiled(net: nn.Module, taps: lk.Taps, ids: Tensor, compiler: str) -> dict[str, Provider]:
    """What is compiled stays tapped, and is traced with the taps at work and at rest."""
    taps.__enter__()
    run = torch.compile(net, mode=None if compiler == "default" else compiler)

    def once(active: bool) -> dict[str, Tensor] | None:
        torch.compiler.cudagraph_mark_step_begin()
        taps.active = active
        if active:
            taps.reset(len(ids))
        step(run, ids)
        return taps.grads if active else None

    own = own_factors(net, lk.Projection(rank=RANK), EVERY_LINEAR)
    return {"plain": Provider(lambda: once(False)), "logra_kernels": Provider(lambda: once(True), factors=own)}


def eager(net: nn.Module, taps: lk.Taps, ids: Tensor) -> dict[str, Provider]:
    def tapped() -> dict[str, Tensor]:
        with taps:
            taps.reset(len(ids))
            step(net, ids)
        return taps.grads

    own = own_factors(net, lk.Projection(rank=RANK), EVERY_LINEAR)
    size = sum(p.nbytes for pair in own.values() for p in pair)
    return {
        "plain": Provider(lambda: step(net, ids)),
        "logra_kernels": Provider(tapped, size, own),
        "hooks": Provider(lambda: by_hand(net, ids, own), size, own),
    }


def observing(net: nn.Module, taps: lk.Taps, ids: Tensor) -> Provider:
    """Steps that a run observes, one after the other: what PCA learns from."""
    seen: Covariances | None = None

    def once() -> None:
        nonlocal seen
        with taps, taps.covariances(seen, ("in", "out"), rank=RANK) as seen:
            taps.reset(len(ids))
            step(net, ids)

    return Provider(once)


def by_hand(net: nn.Module, ids: Tensor, factors: Factors) -> dict[str, Tensor]:
    """One step of the plain way."""
    hooked = Hooks(net, factors)
    step(net, ids)
    hooked.remove()
    return hooked.grads


def peer(name: str, net: nn.Module, ids: Tensor) -> Provider:
    before = allocated()
    made = PEERS[name](net, ids, RANK, step, EVERY_LINEAR)
    return Provider(made.run, allocated() - before, made.factors)


def check(got: dict[str, Tensor] | None, expected: dict[str, Tensor]) -> None:
    assert got is not None
    assert got.keys() == expected.keys()
    for name, g in expected.items():
        assert (got[name].float() - g.float()).norm() <= 0.05 * g.float().norm(), name


def measure(
    name: str, compiler: str | None = None, device: str = "cuda", dtype: torch.dtype = torch.bfloat16,
    model: tuple[dict, tuple[int, int]] | None = None, rounds: int = ROUNDS, peers: Iterable[str] = GPU_PEERS,
    observed: bool = False,
) -> Iterator[dict]:  # fmt: skip
    """One row a provider. One whose gradients are not those of plain hooks, or that fails, has a row that says so.

    Args:
        peers: Measured where they can be imported and nothing is compiled.
        observed: Measure a step that is observed as well; its memory without the sums.
    """
    sizes, batch = model or MODELS[name]
    part = {"part": f"logging {name}", "compiled": compiler or "no", "shape": f"{batch[0]}x{batch[1]} k{RANK}"}
    net, ids = make(sizes, batch, device, dtype)
    held = allocated()
    alone = peak_beyond(lambda: step(net, ids))
    taps = lk.capture(net, lk.Projection(rank=RANK), include=[f"*{part}*" for part in EVERY_LINEAR])
    steps = eager(net, taps, ids) if compiler is None else compiled(net, taps, ids, compiler)
    if observed:
        steps["observed"] = observing(net, taps, ids)
    for other in importable(peers) if compiler is None else ():
        try:
            steps[other] = peer(other, net, ids)
        except Exception as error:  # whatever a peer raises is its result here
            yield failed(part, other, error)
    peaks = {}
    for provider, made in list(steps.items()):
        try:
            if made.factors is not None:
                check(made.run(), by_hand(net, ids, made.factors))
            for _ in range(WARMUPS):
                made.run()
            peaks[provider] = held + made.kept + (peak_beyond(made.run) or 0)
        except Exception as error:
            yield failed(part, provider, error)
            del steps[provider]
    seconds: dict[str, list[float]] = {provider: [] for provider in steps}
    for _ in range(rounds):
        for provider, made in steps.items():
            begun = synced()
            made.run()
            seconds[provider].append(synced() - begun)
    for provider, own in seconds.items():
        ratios = [mine / plain for mine, plain in zip(own, seconds["plain"], strict=True)]
        median = statistics.median(own)
        row = part | {"provider": provider, "median_ms": round(median * 1e3, 2)}
        row |= {"tokens_per_s": round(ids.numel() / median), "time_ratio": round(statistics.median(ratios), 4)}
        if alone is not None and compiler is None:
            row |= {"peak_gb": round(peaks[provider] / 2**30, 2)}
            row |= {"memory_ratio": round(peaks[provider] / (held + alone), 4)}
        yield row
