from typing import NamedTuple

import pytest
import torch


class Target(NamedTuple):
    backend: str
    device: str


CUDA = torch.cuda.is_available()
TARGETS = {"cpp": Target("cpp", "cpu"), "reference": Target("reference", "cpu")}
if CUDA:
    TARGETS |= {"triton-cuda": Target("triton", "cuda"), "reference-cuda": Target("reference", "cuda")}
else:
    TARGETS["triton"] = Target("triton", "cpu")  # in its interpreter


def _param(name: str, value):
    return pytest.param(value, id=name, marks=pytest.mark.gpu if name.endswith("cuda") else ())


@pytest.fixture(params=[_param(name, target) for name, target in TARGETS.items()])
def target(request) -> Target:
    """Each backend on each device type of this machine."""
    return request.param


@pytest.fixture(params=[_param(name, target) for name, target in TARGETS.items() if target.backend != "reference"])
def kernel(request) -> Target:
    """Each backend that is not the reference."""
    return request.param


@pytest.fixture(params=[_param(name, name) for name in (["cpu", "cuda"] if CUDA else ["cpu"])])
def device(request) -> str:
    """Each device type of this machine, with the backend that `auto` takes there."""
    return request.param


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=lambda d: str(d)[6:])
def dtype(request) -> torch.dtype:
    return request.param
