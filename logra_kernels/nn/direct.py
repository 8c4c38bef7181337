"""The tap that is no node of the graph: a hook on the gradient of y, at a fraction of an autograd Function's cost.

    weight learns    forward    nothing: a weight that gets a gradient keeps x alive anyway
                     backward   probe.grad[n] += sum_t (P_out dy[n,t]) (x) (P_in x[n,t])
    weight frozen    forward    a[n,t] = P_in x[n,t] is kept
                     backward   probe.grad[n] += sum_t (P_out dy[n,t]) (x) a[n,t]

A probe that stands in the graph gets its gradient from `backward()`, and not from an `autograd.grad` of something else.
So does this one. What counts are the backward passes in which the layer's weight gets its own gradient, or, where it is
frozen, in which everything below the layer gets its gradient that can have one.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.autograd.graph import Node, get_gradient_edge
from torch.compiler import is_compiling

from logra_kernels.nn.adapters import Adapter
from logra_kernels.nn.hook import Hook, MisfitError
from logra_kernels.nn.probe import Probe
from logra_kernels.nn.state import TapState
from logra_kernels.nn.tap import TWICE
from logra_kernels.ops import (
    AddProjectGrad,
    ProjectRows,
    accumulator_dtype,
    add_project_grad,
    kept_dtype,
    plain,
    row_projector,
)

_executes = torch._C._will_engine_execute_node
_graph_is_kept = torch._C._autograd._get_current_graph_task_keep_graph
_pass_number = torch._C._current_graph_task_id
_node_now = torch._C._current_autograd_node
_saving_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_OURS = -1  # other hooks' handles count from 0


class _LastHook(dict):
    """A tensor's hooks, ours behind all that are added later: they may change the gradient, as the weight sees it."""

    def __setitem__(self, handle: int, hook: Callable) -> None:
        ours = self.pop(_OURS)
        super().__setitem__(handle, hook)
        super().__setitem__(_OURS, ours)


def _gets_gradient(weight: Tensor, node: Node) -> bool:
    """Whether the backward that runs adds to weight.grad; `node` is what did so when last seen."""
    try:
        if _executes(node):
            return True
        now = get_gradient_edge(weight).node  # moving a weight to another dtype and back has made another
        return now is not node and _executes(now)
    except RuntimeError:  # the weight's gradient is what autograd.grad returns
        return False


class _Pass(dict[Node, bool]):
    """Of nodes that a backward pass has been asked about: whether all leaves below get their gradients in it."""


_last_pass: tuple[int, Callable[[], _Pass | None]] = (-1, lambda: None)  # its number, and a weak reference


def _all_get_gradients() -> bool:
    """Whether the backward that runs adds to .grad of every leaf below."""
    global _last_pass
    number, node = _pass_number(), _node_now()
    known = _last_pass[1]() if _last_pass[0] == number else None
    if known is None:
        known = _Pass()
        Variable._execution_engine.queue_callback(known.clear)  # the pass keeps the nodes, and drops them if it fails
        _last_pass = number, weakref.ref(known)
    if node not in known:
        _look_below(node, known)
    return known[node]


def _look_below(node: Node, known: _Pass) -> None:
    below_of: dict[Node, list[Node]] = {}
    ahead = [node]
    while ahead:
        node = ahead.pop()
        if node not in below_of and node not in known:
            below_of[node] = below = [edge[0] for edge in node.next_functions if edge[0] is not None]
            ahead += below
    known.update(dict.fromkeys(below_of, True))
    lacking = [
        node
        for node, below in below_of.items()
        if not (all(known[under] for under in below) if below else _is_executed(node))
    ]
    above: dict[Node, list[Node]] = {}
    for node, below in below_of.items() if lacking else ():
        for under in below:
            above.setdefault(under, []).append(node)
    while lacking:
        node = lacking.pop()
        if known[node]:
            known[node] = False
            lacking += above.get(node, ())


def _is_executed(end: Node) -> bool:
    """Whether a node with nothing below it adds to a leaf's .grad, where it is a leaf's."""
    if not hasattr(end, "variable"):
        return True
    try:
        return _executes(end)
    except RuntimeError:  # its gradient is what autograd.grad returns
        return False


def _gather(
    kept: list[Tensor], add: AddProjectGrad, leaf: Tensor, weight: Tensor | None, node: Node | None, dy: Tensor | None
) -> Tensor | None:
    """The hook: what the forward kept, what to do with it, where the gradient goes, and whose it goes with, if any."""
    if not kept:
        return None  # torch says so itself where a graph was not retained
    x = kept[0] if _graph_is_kept() else kept.pop()
    if _all_get_gradients() if weight is None else _gets_gradient(weight, node):  # type: ignore[arg-type]
        g = leaf.grad
        if dy is None:
            if g is None:
                leaf.grad = torch.zeros(leaf.shape, dtype=leaf.dtype, device="cpu")
            return None
        rows = dy if dy.is_contiguous() or dy.dim() == 2 else dy.flatten(0, -2)
        if g is not None:
            add(x, rows, g, True)
        else:
            leaf.grad = g = torch.empty(leaf.shape, dtype=leaf.dtype, device="cpu")
            add(x, rows, g, False)
    if dy is None or not dy.requires_grad or not torch.is_grad_enabled():
        return None
    # also where nothing was gathered: what comes back to dy has a part by the weight that no tap sees
    return torch._C._functions.DelayedError(TWICE, 1)(dy)


@dataclass(slots=True)
class _Prepared:
    """What a weight, its factors and the shape and dtype of x decide.

    Attributes:
        add: None where the layer cannot be tapped directly.
        project: Of a frozen weight's x,
        kept: which gives this dtype,
        shares: and perhaps to other taps as well.
        source: A weight that learns, and the node that adds to its gradient.
        columns: Row stride and dtype of a shared projection, and what `add` is where x is columns of one.
    """

    weight: Tensor | None = None
    learns: bool = False
    dtype: torch.dtype | None = None
    x_shape: torch.Size | None = None
    k: tuple[int, int] | None = None
    add: AddProjectGrad | None = None
    project: ProjectRows | None = None
    kept: torch.dtype | None = None
    shares: bool = False
    p_in: Tensor | None = None
    p_out: Tensor | None = None
    source: tuple[Tensor | None, Node | None] = (None, None)
    columns: tuple[tuple[int, torch.dtype], AddProjectGrad] | None = None

    def adder_of(self, columns: Tensor, y: Tensor) -> AddProjectGrad:
        if columns.dtype is self.kept and columns.is_contiguous():
            return self.add  # type: ignore[return-value]
        made, layout = self.columns, (columns.stride(1), columns.dtype)
        if made is None or made[0] != layout:
            add = add_project_grad(columns, y.detach().reshape(*columns.shape[:2], -1), None, self.p_out)
            assert add is not None  # there is one for a projection of its own
            self.columns = made = layout, add
        return made[1]


class LinearHook(Hook):
    """The hook on an nn.Linear, which taps it directly where that can be done.

    That is in eager mode on the CPU where y gets a gradient and nobody has hooks on it yet. But where saved tensors are
    packed, as checkpointing does, what is kept here would not be.
    """

    def __init__(self, name: str, adapter: Adapter, probe: Probe, taps: TapState) -> None:
        super().__init__(name, adapter, probe, taps)
        self._made = _Prepared()  # replaced as a whole, and read once a call: there may be several threads

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, y: Tensor) -> Tensor | None:
        taps, x = self.taps, args[0] if args else kwargs.get("input")
        if (
            taps.active
            and not is_compiling()
            and not taps.in_graph
            and taps.mode is None
            and taps.offsets is None
            and taps.weights is None
            and y.requires_grad
            and plain(y)
            and self._tap(module._parameters.get("weight"), x, y)
        ):
            return None
        return super().__call__(module, args, kwargs, y)

    def _tap(self, weight: Tensor | None, x: Tensor | None, y: Tensor) -> bool:
        """Whether it could be done."""
        # in-place code writes to a view's base, and a gradient comes there past the view
        at = y._base if y._is_view() else y
        if (
            at is None
            or at._backward_hooks is not None
            or weight is None
            or type(x) is not Tensor
            or x.is_nested
            or not x.is_contiguous()
            or _saving_hooks(True) is not None
        ):
            return False
        made, probe = self._made, self.probe
        if (
            weight is not made.weight
            or weight.requires_grad is not made.learns
            or weight.dtype is not made.dtype
            or x.shape != made.x_shape
            or probe.k is not made.k  # other factors come with another
        ):
            self._made = made = self._prepare(weight, x, y)
        add = made.add
        if add is None or x.dtype is not made.dtype or y.dtype is not made.dtype:
            return False
        leaf = probe.leaf
        if leaf is None or leaf.shape[0] != x.shape[0]:
            try:
                leaf = self._leaf(x)
            except MisfitError:
                return False
            if len(leaf) != len(x):  # flattened
                return False
        kept = x
        if made.project is not None:
            shared = self.taps.shared
            columns = None
            if made.shares and shared is not None:
                columns = shared.project(self.adapter, probe, x, made.p_in, made.project)
            if columns is None:
                kept = made.project(x)
            else:
                kept, add = columns, made.adder_of(columns, y)
        # the two steps of Tensor.register_hook, without the handle it makes, which costs as much again
        at._backward_hooks = _LastHook({_OURS: partial(_gather, [kept], add, leaf, *made.source)})
        at.grad_fn._register_hook_dict(at)  # type: ignore[union-attr]
        return True

    def _prepare(self, weight: Tensor, x: Tensor, y: Tensor) -> _Prepared:
        made = _Prepared(weight, weight.requires_grad, weight.dtype, x.shape, self.probe.k)
        if (
            type(weight) is not nn.Parameter
            or x.layout is not torch.strided
            or not x.numel()
            or not x.dtype == y.dtype == weight.dtype
            or self.probe.device != y.device
        ):
            return made
        self.adapter.check(self.name, x)
        if accumulator_dtype(x.dtype) is not self.probe.dtype:
            return made  # a model in fp64 that was not when the taps were made
        kept = x.detach().reshape(len(x), -1, x.shape[-1])
        p_in, made.p_out = self.probe.factors(x.dtype, y.dtype)
        if made.learns:
            made.source = weight, get_gradient_edge(weight).node
        else:
            if p_in is None:  # x would be kept as it is, and autograd would not notice that it was written to
                return made
            made.kept = dtype = kept_dtype(y.dtype, made.p_out)
            made.project = row_projector(kept, p_in, dtype)
            made.shares = self.taps.shared is not None and self.taps.shared.serves(self.probe, x.device)
            if made.project is None:
                return made
            kept, made.p_in, p_in = kept.new_empty(*kept.shape[:2], len(p_in), dtype=dtype), p_in, None
        made.add = add_project_grad(kept, y.detach().reshape(*kept.shape[:2], -1), p_in, made.p_out)
        return made
