"""verify: are the gradients that the taps capture on the user's own model and loss those of each sample alone?

For a few samples, the rows captured from one batch are compared with P_out dW P_in^T, dW from autograd on each sample
by itself. What a difference looks like tells what causes it, and it is said in words.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from logra_kernels.nn import Adapter, Taps, without_fused_layers
from logra_kernels.session.modes import mode_problems, some

Loss = Callable[[slice], Tensor]
Grads = dict[str, Tensor]  # layer -> [N, k_out, k_in] fp64


@dataclass(frozen=True)
class Verification:
    """What `Run.verify` found.

    Attributes:
        problems: One sentence each, with what to do; empty when all is well.
        notes: What is unusual but right.
        error: Largest relative difference of a sample's gradient from autograd's over samples and layers, apart from a
            common factor that a problem names; None where it was not reached.
        samples, layers: How many were compared.
    """

    problems: list[str]
    notes: list[str]
    error: float | None
    samples: int
    layers: int

    @property
    def ok(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        head = f"verify: {self.samples} samples, {self.layers} layers: "
        if self.ok:
            head += f"captured gradients equal one-sample autograd to {self.error or 0:.1e}"
        else:
            head += f"{len(self.problems)} problem{'s' if len(self.problems) > 1 else ''}"
        return "\n".join([head, *(f"  problem: {p}" for p in self.problems), *(f"  note: {n}" for n in self.notes)])


class _Found(Exception):  # noqa: N818 - not an error: a problem behind which nothing more can be told
    pass


def verify(
    model: nn.Module,
    taps: Taps,
    loss: Loss,
    samples: int,
    rtol: float | None = None,
    offsets: Tensor | None = None,
    sequence_length: int | str | None = None,
) -> Verification:
    """See `Run.verify`."""
    if samples < 2:
        raise ValueError(f"verify: samples is {samples}; it takes at least 2 to see whether they are mixed")
    layout: dict[str, Any] = {"offsets": offsets, "sequence_length": sequence_length}
    taps.reset(samples, **layout)  # raises for offsets that are none
    problems, notes = mode_problems(model), []
    error = None
    with _unchanged(model, taps), without_fused_layers(model):
        try:
            _check_loss(loss, samples, problems)
            seen = _Seen.of(taps, loss, samples)
            notes += seen.notes(taps)
            if offsets is None:
                seen.check_samples(taps, samples, sequence_length)
            captured, silent = _captured(taps, loss, samples, layout, notes)
            exact = _alone(taps, loss, samples, _comparable(model, taps, notes))
            problems += _silences(silent, exact)
            error = _compare(captured, exact, rtol or _tolerance(taps, seen.autocast), problems)
        except _Found as found:
            problems.append(str(found))
    return Verification(problems, notes, error, samples, len(taps.layers))


@contextmanager
def _unchanged(model: nn.Module, taps: Taps) -> Iterator[None]:
    """Buffers (batch norm's statistics), random state, requires_grad and taps as they were; tapped weights have
    gradients meanwhile."""
    kept = {name: value.clone() for name, value in model.named_buffers()}
    flags = [(p, p.requires_grad) for p in model.parameters()]
    for holders in taps.holders.values():
        for p in (p for module, adapter in holders for p in adapter.parameters(module) if p.is_floating_point()):
            p.requires_grad_(True)
    try:
        with torch.random.fork_rng({p.device.index for p, _ in flags if p.is_cuda}), torch.enable_grad():
            yield
    finally:
        taps.active = False
        taps.reset()
        for p, flag in flags:
            p.requires_grad_(flag)
        with torch.no_grad():
            for name, value in model.named_buffers():
                if name in kept and kept[name].shape == value.shape:
                    value.copy_(kept[name])


def _call(loss: Loss, part: slice) -> Tensor:
    what = f"loss(slice({part.start}, {part.stop}))"
    try:
        value = loss(part)
    except Exception as error:  # the user's own code: whatever it raises is what is to be told
        raise _Found(
            f"{what} failed: {' '.join(str(error).split())[:300]}; every single sample must work too"
        ) from error
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise _Found(f"{what} gave {got}: return one number, the sum of the samples' losses")
    if not bool(value.isfinite()):
        raise _Found(f"{what} is {float(value.detach())}: find the sample whose loss is not finite and leave it out")
    return value.reshape(())


def _gradients(value: Tensor, wanted: list[Tensor]) -> Sequence[Tensor | None]:
    """By each of `wanted`; nothing is added to anybody's `.grad`."""
    if not value.requires_grad:
        return [None] * len(wanted)
    try:
        return torch.autograd.grad(value, wanted, allow_unused=True)
    except RuntimeError as error:
        raise _Found(f"the backward pass failed: {' '.join(str(error).split())[:300]}") from error


def _check_loss(loss: Loss, samples: int, problems: list[str]) -> None:
    whole = slice(0, samples)
    with torch.no_grad():
        first, second = (float(_call(loss, whole)) for _ in range(2))
    if abs(first - second) > 1e-5 * max(abs(first), abs(second)):
        if problems and problems[0].startswith("dropout"):
            raise _Found("with dropout on nothing more can be compared; call verify again after model.eval()")
        raise _Found(
            f"the same batch gives the loss {first:g} and then {second:g}: something is random (dropout in a function,"
            " noise, sampling), so gradients are too; switch it off for logging"
        )


@dataclass
class _Seen:
    """What the layers were called with: the shapes of the whole batch's inputs and of one sample's, and how."""

    whole: dict[str, list[tuple[int, ...]]]
    one: dict[str, list[tuple[int, ...]]]
    autocast: bool = False

    @classmethod
    def of(cls, taps: Taps, loss: Loss, samples: int) -> "_Seen":
        seen = cls({}, {})

        def watch(name: str, adapter: Adapter, into: dict[str, list[tuple[int, ...]]]):
            def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
                x = args[0] if args else kwargs[adapter.argument]
                into.setdefault(name, []).append(tuple(x.movedim(adapter.samples_at, 0).shape))
                seen.autocast |= torch.is_autocast_enabled(x.device.type)

            return hook

        for shapes, part in ((seen.whole, slice(0, samples)), (seen.one, slice(0, 1))):
            handles = [
                module.register_forward_pre_hook(watch(name, adapter, shapes), with_kwargs=True)
                for name, holders in taps.holders.items()
                for module, adapter in holders
                if adapter.samples_first
            ]
            try:
                with torch.no_grad():
                    _call(loss, part)
            finally:
                for handle in handles:
                    handle.remove()
        return seen

    def check_samples(self, taps: Taps, samples: int, sequence_length: int | str | None) -> None:
        """Raise _Found unless samples lie in dimension 0, or are flattened as `sequence_length` says."""
        for name, shapes in self.whole.items():
            flattens = all(adapter.flattens for _, adapter in taps.holders[name])
            for shape, one in zip(shapes, self.one.get(name, shapes), strict=False):
                first = one[0] if one else 0
                cut = first > 0 and bool(shape) and shape[0] == samples * first and (flattens or first == 1)
                if cut and (first == 1 or sequence_length in ("any", first)):
                    continue
                how = "make the model batch-first, or exclude the layer"
                if cut:
                    given = f"sequence_length={first} (or 'any')"
                    how = f"where the model flattens samples and positions, give {given} here and to log; else {how}"
                raise _Found(
                    f"layer {name!r} gets an input {shape} for {samples} samples and {one} for one: samples are not in"
                    f" dimension 0; {how}"
                )

    def notes(self, taps: Taps) -> list[str]:
        notes = []
        for name, shapes in self.whole.items():
            holders = len(taps.holders[name])
            if holders > 1:
                more = f"{holders - 1} more: their gradients are summed as one"
                notes.append(f"layer {name!r} shares its weight with {more}")
            if len(shapes) > holders:
                notes.append(f"layer {name!r} is used {len(shapes)} times in a forward: its gradients are summed")
        return notes


def _captured(taps: Taps, loss: Loss, samples: int, layout: dict, notes: list[str]) -> tuple[Grads, list[str]]:
    """Of the layers that got one, and the others, but for experts, of which a note says so."""
    taps.reset(samples, **layout)
    in_graph = taps.in_graph
    taps.active = taps.in_graph = True
    try:
        value = _call(loss, slice(0, samples))
        if not value.requires_grad:
            raise _Found(
                "the loss has no gradient: it was computed under no_grad, detached, or reaches no tapped layer"
            )
        probes = taps.probes
        grads = dict(zip(probes, _gradients(value, list(probes.values())), strict=True))
    finally:
        taps.active, taps.in_graph = False, in_graph
    silent = [name for name, grad in grads.items() if grad is None or not bool(grad.any())]
    found = {name: grad.double() for name, grad in grads.items() if grad is not None and name not in silent}
    bad = [name for name, grad in found.items() if not bool(grad.isfinite().all())]
    if bad:
        raise _Found(f"the gradient of layer {bad[0]!r} is NaN or infinite: check the model's loss on these samples")
    experts = [name for name in silent if taps.holders[name][0][1].kind == "expert"]
    if experts:
        notes.append(f"no token of these samples came to {len(experts)} experts ({some(experts)}): not compared")
    return found, [name for name in silent if name not in experts]


def _silences(silent: list[str], exact: Grads) -> list[str]:
    """What is wrong with layers whose taps got no gradient."""
    used = [name for name in silent if name in exact and bool(exact[name].any())]
    rest = [name for name in silent if name not in used]
    problems = []
    if used:
        problems.append(
            f"the model uses the weights of {len(used)} layers ({some(used)}) without calling the layers, where no tap"
            " sees it: exclude them; if the model is compiled, compile it after the run is made"
        )
    if rest:
        problems.append(
            f"the loss sends no gradient to {len(rest)} layers ({some(rest)}): exclude them, unless that is because"
            " weights begin as zeros, and training has not changed them yet"
        )
    return problems


def _comparable(model: nn.Module, taps: Taps, notes: list[str]) -> dict[str, list[list[Tensor]]]:
    """Layer -> the parameters of each of its holders, where autograd's gradient of them is the layer's own."""
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for p in module.parameters(recurse=False):
            owners.setdefault(id(p), []).append((name, module))
    found: dict[str, list[list[Tensor]]] = {}
    for name, holders in taps.holders.items():
        tapped = {part for module, _ in holders for part in module.modules()}
        parameters = [adapter.parameters(module) for module, adapter in holders]
        flat = [p for group in parameters for p in group]
        elsewhere = [other for p in flat for other, module in owners.get(id(p), []) if module not in tapped]
        if elsewhere:
            notes.append(
                f"layer {name!r} shares its weight with {elsewhere[0]!r}, which is not tapped: rows hold its own part"
                " of the gradient only, not compared; tap both (kinds=, include=) for the whole"
            )
        elif any(hasattr(p, "device_mesh") for p in flat):
            notes.append(
                f"layer {name!r} is spread over processes: not compared; verify the whole model in one process"
            )
        elif all(p.is_floating_point() and p.is_leaf for p in flat):
            found[name] = parameters
        else:
            notes.append(f"the weight of layer {name!r} can have no gradient of its own (quantised?): not compared")
    return found


def _alone(taps: Taps, loss: Loss, samples: int, learning: dict[str, list[list[Tensor]]]) -> Grads:
    """Each sample's own gradient by autograd, projected."""
    flat = list({id(p): p for groups in learning.values() for group in groups for p in group}.values())
    rows: dict[str, list[Tensor]] = {name: [] for name in learning}
    for i in range(samples):
        value = _call(loss, slice(i, i + 1))
        grads = _gradients(value, flat)
        of = {id(p): g for p, g in zip(flat, grads, strict=True)}
        for name, groups in learning.items():
            left = dict(of)
            dw: Tensor | int = 0
            for (_, adapter), group in zip(taps.holders[name], groups, strict=True):
                # the gradient of a shared weight is the whole one already: taken once
                own = [left.pop(id(p), None) for p in group]
                dw = dw + adapter.matrix(
                    [torch.zeros_like(p) if g is None else g for p, g in zip(group, own, strict=True)]
                )
            assert isinstance(dw, Tensor)
            p_in, p_out = taps.factors[name]
            g = dw.double() if p_out is None else p_out.double() @ dw.double()
            rows[name].append(g if p_in is None else g @ p_in.double().T)
    return {name: torch.stack(parts) for name, parts in rows.items()}


def _tolerance(taps: Taps, autocast: bool) -> float:
    """Batched and single products round differently; 16-bit ones to 2^-8 each."""
    held = [pair for holders in taps.holders.values() for pair in holders]
    weights = (p for module, adapter in held for p in adapter.parameters(module))
    factors = (p for pair in taps.factors.values() for p in pair if p is not None)
    narrow = any(p.dtype.itemsize < 4 for p in (*weights, *factors))
    return 0.1 if narrow or autocast else 1e-3


def _compare(captured: Grads, exact: Grads, rtol: float, problems: list[str]) -> float | None:
    """The error; what is wrong is added to `problems`."""
    names = [name for name in captured if name in exact]
    if not names:
        return None
    got = {name: captured[name].flatten(1).cpu() for name in names}
    true = {name: exact[name].flatten(1).cpu() for name in names}
    # each sample's factor: that of its middle layer, which one wrong layer does not move; NaN if it has no gradient
    factor = torch.stack([(got[n] * true[n]).sum(1) / true[n].square().sum(1) for n in names]).nanmedian(0).values
    alive = ~factor.isnan()
    errors = {}
    for name in names:
        wanted = factor.nan_to_num()[:, None] * true[name]
        size = wanted.norm(dim=1)
        floor = 1e-3 * float(size.max())  # a sample of almost no gradient is judged by the others' size
        errors[name] = float(((got[name] - wanted).norm(dim=1) / size.clamp_min(max(floor, 1e-300))).max())
    wrong = [name for name in names if errors[name] > rtol]
    samples = len(factor)
    if 2 * len(wrong) > len(names):
        if not any(p.startswith("batch norm") for p in problems):
            worst = min(_least_cosine(got[n], true[n]) for n in wrong)
            problems.append(
                f"samples are coupled: gradients in a batch are not those of the samples alone (cosine down to"
                f" {worst:.2f}): the loss or the model mixes the samples of a batch (a contrastive loss, batch"
                " statistics, attention across samples or packed documents); log them one at a time, or use a"
                " loss that is a sum over samples"
            )
        return None
    for name in wrong:
        problems.append(
            f"layer {name!r}: captured gradients differ from autograd's by {errors[name]:.0%} of their size: its weight"
            " is also used outside of its own forward (a functional call, a tied copy that was excluded) or another"
            " hook changes its input; exclude the layer"
        )
    if bool(alive.any()):
        _judge_factor(factor[alive], samples, min(10 * rtol, 0.2), problems)
    return max(errors.values())


def _least_cosine(got: Tensor, true: Tensor) -> float:
    """Between gradients of the same sample, [N, D]; samples that have none (an expert without a token) do not count."""
    there = true.any(1) | got.any(1)
    return float(torch.nn.functional.cosine_similarity(got[there], true[there], dim=1).min()) if there.any() else 1.0


def _judge_factor(factor: Tensor, samples: int, near: float, problems: list[str]) -> None:
    low, high = float(factor.min()), float(factor.max())
    if abs(low - 1) <= near and abs(high - 1) <= near:
        return
    if abs(low * samples - 1) <= near and abs(high * samples - 1) <= near:
        problems.append(
            f"the loss is a mean over the batch: every gradient is divided by the batch size ({samples}), so rows of"
            " unequal batches cannot be compared; use reduction='sum', or multiply the loss by the batch size"
        )
        return
    problems.append(
        f"the loss is divided by something of the whole batch: a sample's gradient in it is {low:.3g} to {high:.3g}"
        " times its own (a mean over all positions?), so it depends on its batch-mates; sum over positions and samples"
    )
