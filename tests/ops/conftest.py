from typing import NamedTuple

import pytest
import torch

from logra_kernels.ops import _dispatch


class Target(NamedTuple):
    backend: str
    device: str


CUDA = torch.cuda.is_available()
TARGETS = {"cpp": Target("cpp", "cpu"), "reference": Target("reference", "cpu")}
if CUDA:
    TARGETS |= {name + "-cuda": Target(name, "cuda") for name in ("triton", "cuda", "reference")}
else:
    TARGETS["triton"] = Target("triton", "cpu")  # in its interpreter


def _param(name: str, value):
    return pytest.param(value, id=name, marks=pytest.mark.gpu if name.endswith("cuda") else ())


def _existing(request) -> Target:
    if request.param.backend == "cuda":
        op = request.module.__name__.rpartition("test_")[2]
        if op not in _dispatch._CUDA_OPS or _dispatch.cuda_error() is not None:
            pytest.skip(f"{op} has no kernel in CUDA C++ here")
        if "dtype" in request.fixturenames and request.getfixturevalue("dtype") == torch.float64:
            pytest.skip("the CUDA C++ kernels know no fp64")
    return request.param


@pytest.fixture(params=[_param(name, target) for name, target in TARGETS.items()])
def target(request) -> Target:
    """Each backend on each device type of this machine."""
    return _existing(request)


@pytest.fixture(params=[_param(name, target) for name, target in TARGETS.items() if target.backend != "reference"])
def kernel(request) -> Target:
    """Each backend that is not the reference."""
    return _existing(request)


@pytest.fixture(params=[_param(name, name) for name in (["cpu", "cuda"] if CUDA else ["cpu"])])
def device(request) -> str:
    """Each device type of this machine, with the backend that `auto` takes there."""
    return request.param


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=lambda d: str(d)[6:])
def dtype(request) -> torch.dtype:
    return request.param
