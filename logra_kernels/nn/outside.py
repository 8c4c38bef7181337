"""Uses of a tapped weight outside of the layers that hold it, which no tap sees.

A model may multiply with `layer.weight` itself, as an autoencoder does that decodes with its encoder's weight. If it
calls the layer as well, rows would lack a part of the gradient, and nothing would say so. So in a first batch, a tapped
weight that is given to a torch function outside of the forward of every module that holds it, is given under another
name, and a gradient that comes back to that is an error. A norm of a weight that is detached is none.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from logra_kernels.errors import LograError
from logra_kernels.nn.layers import Layer

_saving_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_VIEWS = {"T", "mT", "H", "mH"}  # of a tensor's properties, those that a gradient goes through
_OPERATORS = {"matmul", "rmatmul", "mul", "rmul", "add", "radd", "sub", "rsub", "truediv", "rtruediv", "neg", "getitem"}
_NO_PRODUCTS = {"backward", "grad", "detach", "register_hook", "register_post_accumulate_grad_hook", "retain_grad"}


class _Elsewhere(torch.autograd.Function):
    """A weight under another name, whose gradient is an error."""

    @staticmethod
    def forward(ctx, weight: Tensor, armed: Tensor, name: str, function: str) -> Tensor:
        ctx.use = name, function
        return weight.detach()

    @staticmethod
    def backward(ctx, dw: Tensor):
        name, function = ctx.use
        raise LograError(
            f"capture: the weight of layer {name!r} is used outside of the layer's own forward (by {function!r}),"
            " where no tap sees it, so its rows would lack a part of the gradient: call the layer itself, leave a"
            " penalty on weights out of the loss, or exclude the layer"
        )


class OutsideUses(TorchFunctionMode):
    """While it is on, a tapped weight that is used outside of its layers makes the backward raise LograError."""

    def __init__(self, model: nn.Module, layers: Iterable[Layer]) -> None:
        super().__init__()
        self._weights = {
            id(p): (layer.name, p)
            for layer in layers
            for module, adapter in layer.holders
            for p in adapter.parameters(module)
            if type(p) is nn.Parameter and p.is_floating_point() and module is not model
        }
        self._outside = dict(self._weights)
        self._inside: Counter[int] = Counter()
        owned = {module: [id(p) for p in module.parameters(recurse=False)] for module in model.modules()}
        self._owners = {
            module: ours for module, ids in owned.items() if (ours := [one for one in ids if one in self._weights])
        }
        self._handles: list = []

    def __enter__(self) -> "OutsideUses":
        for module in self._owners:
            self._handles.append(module.register_forward_pre_hook(self._enter))
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))
        return super().__enter__()

    def __exit__(self, *exc) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        super().__exit__(*exc)

    def _enter(self, module: nn.Module, args: tuple) -> None:
        for one in self._owners[module]:
            self._inside[one] += 1
            self._outside.pop(one, None)

    def _leave(self, module: nn.Module, args: tuple, y: object) -> None:
        for one in self._owners[module]:
            self._inside[one] -= 1
            if not self._inside[one]:
                self._outside[one] = self._weights[one]

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = (*args, *kwargs.values())
        if any(id(a) in self._outside for a in given) and _multiplies(func) and not _looks_away():
            args = tuple(self._renamed(a, func) for a in args)
            kwargs = {key: self._renamed(a, func) for key, a in kwargs.items()}
        return func(*args, **kwargs)

    def _renamed(self, value: object, func) -> object:
        found = self._outside.get(id(value))
        if found is None:
            return value
        name, weight = found
        armed = torch.zeros((), dtype=torch.float32, device=weight.device, requires_grad=True)
        of = func.__self__ if func.__name__ == "__get__" else func
        return _Elsewhere.apply(weight, armed, name, of.__name__)


def _multiplies(func) -> bool:
    """Whether its result may have a gradient by what it is given: no look at a dtype, no writing in place."""
    name: str = getattr(func, "__name__", "")
    if name == "__get__":
        return func.__self__.__name__ in _VIEWS
    if name.startswith("__"):
        return name.strip("_") in _OPERATORS
    return name not in _NO_PRODUCTS and not name.endswith("_")


def _looks_away() -> bool:
    return torch.compiler.is_compiling() or not torch.is_grad_enabled() or _saving_hooks(True) is not None


def anything_compiled() -> bool:
    """Whether torch.compile was asked for in this process, which compiles once more for a mode that comes and goes."""
    made = getattr(sys.modules.get("torch._dynamo.eval_frame"), "cached_backends", None) or {}
    return any(backend is not None for backend in made.values())


class Watch:
    """Has `OutsideUses` on while the model runs, with gradients and eagerly, from now on to `rest` or `close`.

    What is checkpointed is not looked at: it is computed again in the backward, where the mode is off.
    """

    def __init__(self, model: nn.Module, layers: Iterable[Layer]) -> None:
        self._uses = OutsideUses(model, layers)
        self._calls: list[bool] = []  # of the model, those that run: whether each has put the mode on
        self._resting = False
        self.seen = False  # whether the model ran
        self._handles = [
            model.register_forward_pre_hook(_Hook(self._begin)),
            model.register_forward_hook(_Hook(self._end), always_call=True),
        ]

    def _begin(self) -> None:
        if torch.compiler.is_compiling():
            return
        on = torch.is_grad_enabled() and not self._resting and not any(self._calls)
        self._calls.append(on)
        if on:
            self.seen = True
            self._uses.__enter__()

    def _end(self) -> None:
        if not torch.compiler.is_compiling() and self._calls and self._calls.pop():
            self._uses.__exit__(None, None, None)

    def rest(self) -> None:
        """Look no more. The hooks stay, for torch.compile would compile once more without them."""
        self._resting = True

    def close(self) -> None:
        while self._calls:  # KeyboardInterrupt goes past a module's hooks
            self._end()
        for handle in self._handles:
            handle.remove()


def _nothing(*args: object) -> None:
    """The hook in a copy of a model."""


def _no_hook() -> Callable[..., None]:
    return _nothing


class _Hook:
    """A hook on the model that a copy of it does not take along."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call

    def __reduce__(self):
        return _no_hook, ()

    def __call__(self, *args: object) -> None:
        self._call()
