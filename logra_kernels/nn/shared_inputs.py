"""Taps that are given the same tensor: it is projected once, by their stacked factors.

    a[n,t] = [P_1; P_2; ...] x[n,t]        [N, T, k_1 + k_2 + ...]; every tap keeps its own columns

q, k and v read one x, and so do gate and up. Factors that were learned from one x are the same (PCA's): they are
stacked once, so that such taps have one projection and keep it once. Which taps are given one tensor is seen in a
forward pass, not guessed from names: those that are, unchanged between them, are a group from then on. The first of a
group that comes to a tensor projects it for all. The others take their columns where they are given that very tensor at
that very version, and in every other case they project what they are given by themselves. Nothing here keeps x or a
alive: a lives as long as a tap holds its columns. These have the bits that the tap alone would give them: rows that
were logged before a group was seen are those of a run that had seen it. Where that cannot be promised, nothing is
shared.
"""

import threading
import weakref
from collections import deque
from itertools import accumulate

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from logra_kernels.nn.adapters import Adapter, LinearAdapter
from logra_kernels.nn.probe import Probe
from logra_kernels.ops import ProjectRows, accumulator_dtype, columns_stand_alone, untransformed

MOST_FAILURES = 3  # groups of a tap that fell apart, before it stays alone
_FEW = 8  # rows of a factor, up to which C++ multiplies in another order: a tap's bits must not hang on others
_SEEN_AT_ONCE = 4  # tensors that taps of a group may be given between its first and its last one

_Factors = dict[Adapter, tuple[Probe, Tensor]]

_saving_hooks = torch._C._autograd._top_saved_tensors_default_hooks


def _origin(probe: Probe) -> int:
    """Of its factor: the same for tied layers, which have one probe, and for factors that were learned from one x."""
    return id(probe if probe.source is None else probe.source)


def _stream(x: Tensor) -> int:
    """What runs on another stream does not wait for a projection made on this one."""
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0


class _Seen:
    """A tensor, and the taps outside of groups that were given it, each known by its module's adapter."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.version = weakref.ref(x), x._version
        self.taps: _Factors = {}


class _Projected:
    """A tensor's projection, and how many of the group's taps have yet to come for their columns."""

    def __init__(self, x: Tensor, a: Tensor, stream: int, awaited: int) -> None:
        self.version, self.stream, self.awaited = x._version, stream, awaited
        self.a = TensorWeakRef(a)
        # where saved tensors are packed, as checkpointing does, no tap holds its columns until the others come
        self.held = held = [a] if _saving_hooks(True) is not None else []
        self.x = weakref.ref(x, (lambda _: held.clear()) if held else None)

    def of(self, x: Tensor, stream: int) -> Tensor | None:
        """The projection, where it is that of `x` as it is now and still alive."""
        return self.a() if self.x() is x and self.version == x._version and self.stream == stream else None

    def take(self) -> None:
        self.awaited -= 1
        if self.awaited <= 0:
            self.held.clear()


class _Group:
    """Taps that were given one tensor, and their stacked factor [k_1 + k_2 + ..., d_in]."""

    def __init__(self, taps: _Factors) -> None:
        self.taps = list(taps)
        factors = {_origin(probe): p for probe, p in taps.values()}
        self.factor = torch.cat(list(factors.values())) if len(factors) > 1 else next(iter(factors.values()))
        self.last: _Projected | None = None
        ends = list(accumulate(len(p) for p in factors.values()))
        columns = {origin: slice(end - len(p), end) for (origin, p), end in zip(factors.items(), ends, strict=True)}
        self.columns = {probe: columns[_origin(probe)] for probe, _ in taps.values()}
        self.one = len(factors) == 1
        for probe, held in self.columns.items():
            probe.move(self.factor[held])

    def project(self, adapter: Adapter, x: Tensor, project: ProjectRows | None) -> Tensor | None:
        """x by the stacked factor, [N, T, k_1 + k_2 + ...]; None where not all came for the tensor before."""
        last, stream = self.last, _stream(x)
        a = None if last is None else last.of(x, stream)
        if last is not None and a is not None:
            last.take()
            return a
        if last is not None and last.awaited > 0:
            last.held.clear()
            return None
        a = project(x) if project is not None and self.one else adapter.keep(x.detach(), self.factor)
        self.last = _Projected(x, a, stream, len(self.taps) - 1)
        return a


class SharedInputs:
    """Which taps of a model read the same tensors. A copy of it, or one from a pickle, has yet to find out.

    Args:
        on_cpu: Stack unlike factors on the CPU as well. There it is mostly slower: two narrow products, each beside its
            own layer's, find x in the cache, and one tap's columns lie apart in memory.
    """

    def __init__(self, on_cpu: bool) -> None:
        self.on_cpu = on_cpu
        self._lock = threading.Lock()  # of what taps outside of groups change
        self.forget()

    def __reduce__(self):
        return SharedInputs, (self.on_cpu,)

    def forget(self) -> None:
        """Begin anew, with other factors."""
        self._seen: deque[_Seen] = deque()
        self._groups: dict[Adapter, _Group] = {}
        self._failures: dict[Adapter, int] = {}

    def serves(self, probe: Probe, device: torch.device) -> bool:
        """Whether the probe's projection of a tensor there may be shared."""
        return probe.shares or self._stacks(device)

    def _stacks(self, device: torch.device) -> bool:
        return (self.on_cpu or device.type != "cpu") and columns_stand_alone(device.type)

    def project(
        self, adapter: Adapter, probe: Probe, x: Tensor, p_in: Tensor | None, project: ProjectRows | None = None
    ) -> Tensor | None:
        """What `adapter.keep(x, p_in)` gives, [N, T, k_in], as columns of a projection that this tap shares.

        Eager code only.

        Args:
            project: The tap's own way to have x by p_in, whose results may be rounded to bf16.

        Returns:
            None where the tap is to project x by itself.
        """
        if p_in is None or type(adapter) is not LinearAdapter or not self.serves(probe, x.device):
            return None
        if not untransformed(x) or x.is_inference():
            return None
        group = self._groups.get(adapter)
        if group is None:
            with self._lock:
                group = self._noted(adapter, probe, x, p_in)
            if group is None:
                return None
        a = group.project(adapter, x, project) if p_in.dtype is group.factor.dtype else None
        if a is None:
            with self._lock:
                self._part(group)
                self._noted(adapter, probe, x, p_in)
            return None
        if project is None and a.dtype is not accumulator_dtype(x.dtype):
            return None  # rounded
        return a if group.one else a[..., group.columns[probe]]

    def _noted(self, adapter: Adapter, probe: Probe, x: Tensor, p_in: Tensor) -> _Group | None:
        """Note that a tap outside of groups was given x; its group where what was noted before makes one."""
        before = next((i for i, seen in enumerate(self._seen) if adapter in seen.taps), -1)
        for _ in range(before + 1):  # the tap comes again: to a tensor that was seen that long ago, no others will come
            self._join(self._seen.popleft().taps)
        if adapter in self._groups:
            return self._groups[adapter]
        here = next((seen for seen in self._seen if seen.x() is x and seen.version == x._version), None)
        if here is None:
            if len(self._seen) == _SEEN_AT_ONCE:
                self._join(self._seen.popleft().taps)
            here = _Seen(x)
            self._seen.append(here)
        here.taps[adapter] = probe, p_in
        return None

    def _join(self, taps: _Factors) -> None:
        """Make groups of taps that were given one tensor: all together, or those whose factors are the same."""
        dtype = next(iter(taps.values()))[1].dtype
        fit: dict[int, _Factors] = {}
        for adapter, (probe, p) in taps.items():
            if p.dtype is dtype and self._failures.get(adapter, 0) < MOST_FAILURES and adapter not in self._groups:
                stacks = self._stacks(p.device) and not (p.is_cpu and len(p) <= _FEW)
                fit.setdefault(0 if stacks else _origin(probe), {})[adapter] = probe, p
        for members in fit.values():
            if len(members) > 1:
                self._groups.update(dict.fromkeys(members, _Group(members)))

    def _part(self, group: _Group) -> None:
        """Have the taps of a group whose tensors turned out not to be the same project by themselves again."""
        for adapter in group.taps:
            if self._groups.pop(adapter, None) is not None:
                self._failures[adapter] = self._failures.get(adapter, 0) + 1
