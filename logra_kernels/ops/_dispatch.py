"""The op library, and the one rule that picks an implementation behind the op boundary.

An op names its implementations per device type, best first. ``auto`` takes the first that works here; a backend asked
for by name is used or raises. When ``auto`` is left with the reference alone, it says once what is missing.
"""

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

LIB = torch.library.Library("logra_kernels", "DEF")
OPS = (
    "project_rows",
    "project_grad",
    "accumulate_gram",
    "quantize_rows",
    "dequantize_rows",
    "score_block",
    "score_topk",
    "factor_rows",
    "score_factored",
)
FORCED = os.environ.get("LOGRA_KERNELS_BACKEND", "auto")

_MODULE = {"cpp": "cpu", "triton": "triton", "cuda": "cuda", "reference": "reference"}
_ORDER = {"cpu": ("cpp", "reference", "triton"), "cuda": ("triton", "cuda", "reference")}
_CUDA_OPS = ("project_grad", "score_block", "score_topk")  # those that have kernels in CUDA C++
_SHARED_BYTES = 163 << 10  # of shared memory a block, that compute capability 8.0 gives and the kernels for it may take


class FallbackWarning(UserWarning):
    """The automatic choice is the reference implementation because the fast one is missing here."""


@dataclass(frozen=True)
class Backend:
    """One implementation of one op on one device type, and whether it works here."""

    op: str
    device: str
    name: str
    available: bool
    chosen: bool
    why: str


@cache
def native_error() -> str | None:
    """Why the C++ kernels cannot be used, or None when they can."""
    try:
        importlib.import_module("logra_kernels._C")
    except ImportError as error:
        return f"logra_kernels._C is not built ({error}); install with a C++17 compiler present"
    return None


@cache
def cuda_error() -> str | None:
    """Why the CUDA C++ kernels cannot be used, or None when they can."""
    try:
        importlib.import_module("logra_kernels._C_cuda")
    except ImportError as error:
        return f"logra_kernels._C_cuda is not built ({error}); install with nvcc present"
    if torch.version.hip is not None:
        return "they are for NVIDIA's devices"
    for device in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(device)
        shared: int = found.shared_memory_per_block_optin  # type: ignore[attr-defined]  # its stub lacks it
        if found.major < 8 or shared < _SHARED_BYTES:
            return (
                f"cuda:{device}, {found.name}, gives a block {shared >> 10} KiB of shared memory at compute capability"
                f" {found.major}.{found.minor}; these kernels take up to {_SHARED_BYTES >> 10} KiB, as an A100 has"
            )
    return None


@cache
def triton_error(device: str) -> str | None:
    """Why Triton kernels cannot be used on tensors of this device type, or None when they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton runs on CPU tensors only in its interpreter (TRITON_INTERPRET=1)"
    return None


def _order(op: str, device: str) -> tuple[str, ...]:
    """The op's implementations for a device type, best first."""
    return tuple(name for name in _ORDER.get(device, ("reference",)) if name != "cuda" or op in _CUDA_OPS)


def untransformed(tensor: torch.Tensor) -> bool:
    """Whether it is a tensor of no other class, that nothing transforms."""
    return type(tensor) is torch.Tensor and not _dispatch_modes() and _transforms() is None


def plain(tensor: torch.Tensor) -> bool:
    """Whether it is a plain tensor on the CPU that nothing transforms."""
    return type(tensor) is torch.Tensor and tensor.is_cpu and not _dispatch_modes() and _transforms() is None


def eager(tensor: torch.Tensor) -> bool:
    """Whether an op may call its launcher itself and save the dispatcher's microseconds, which tiny layers feel.

    Only for a plain tensor on the CPU, and while nothing traces, transforms or watches operators.
    """
    return (
        type(tensor) is torch.Tensor
        and tensor.is_cpu
        and not torch.compiler.is_compiling()
        and not _dispatch_modes()
        and _transforms() is None
        and _trace() is None
        and not _profiled()
    )


_dispatch_modes = torch._C._len_torch_dispatch_stack
_transforms = torch._C._functorch.peek_interpreter_stack
_trace = torch._C._get_tracing_state
_profiled = torch.autograd._profiler_enabled


def _missing(name: str, device: str) -> str | None:
    if name == "cpp":
        return native_error()
    if name == "cuda":
        return cuda_error()
    return triton_error(device) if name == "triton" else None


@cache
def launcher(op: str, device: str, asked: str, function: str = "launch") -> Callable:
    """The implementation of `op` for tensors on `device`; `asked` is a backend's name or "auto".

    `function` is the launcher's name in its module; in the reference, "launch" is the op's own.

    Raises:
        RuntimeError: The backend asked for (here or in LOGRA_KERNELS_BACKEND) is unknown or does not work here.
    """
    order = _order(op, device)
    name = FORCED if asked == "auto" else asked
    if name == "auto":
        name = next(candidate for candidate in order if _missing(candidate, device) is None)
        if name == "reference" and len(order) > 1:
            _warn_fallback(device, _missing(order[0], device) or "")
    why = _missing(name, device) if name in order else f"no such implementation for {device} tensors"
    if why is not None:
        have = ", ".join(candidate for candidate in order if _missing(candidate, device) is None)
        raise RuntimeError(f"{op}: backend {name!r} is not available here: {why} (have: {have})")
    module = importlib.import_module(f"logra_kernels.ops.{op}.{_MODULE[name]}")
    return getattr(module, op if name == "reference" and function == "launch" else function)


@cache
def is_native(op: str) -> bool:
    """Whether tensors on the CPU get the C++ implementation of `op`."""
    return launcher(op, "cpu", "auto").__module__ == f"logra_kernels.ops.{op}.{_MODULE['cpp']}"


@cache
def _warn_fallback(device: str, why: str) -> None:
    warnings.warn(
        f"logra_kernels uses the reference implementations on {device}, which are correct but slow: {why}",
        FallbackWarning,
        stacklevel=2,
    )


def backends() -> list[Backend]:
    """Every implementation of every op for this machine's device types: which works, which `auto` takes, and why."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    found = []
    for op in OPS:
        for device in devices:
            order = _order(op, device)
            works = [name for name in order if _missing(name, device) is None]
            chosen = FORCED if FORCED != "auto" else works[0]
            for name in order:
                why = _missing(name, device)
                reason = why or ("LOGRA_KERNELS_BACKEND" if name == FORCED else "first that works")
                found.append(Backend(op, device, name, why is None, name == chosen, reason))
    return found
