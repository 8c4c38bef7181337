import pytest
import torch

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else ["cpu"]


@pytest.fixture(params=DEVICES)
def each_device(request):
    """What a test makes without saying where is on each device type of this machine in turn."""
    if request.param == "cpu":
        yield
        return
    if "compiled" in request.node.name:
        pytest.skip("torch.compile does not trace a default device; tests/nn/test_gpu.py compiles there")
    torch.set_default_device(request.param)
    yield
    torch.set_default_device(None)
