"""FSDP2 and tensor-parallel models in two processes: projected gradients equal those of the whole model."""

import json
from pathlib import Path

import pytest
from nn.sharded import CHECKS
from torchrun import launch


@pytest.fixture(scope="module")
def errors():
    """Largest relative error of a row over both processes, by check; all of them in one launch."""
    out = launch(Path(__file__).with_name("sharded.py"))
    return json.loads(out.splitlines()[-1])


@pytest.mark.parametrize("name", CHECKS)
def test_equals_the_whole_model(errors, name):
    assert errors[name] < 1e-5
