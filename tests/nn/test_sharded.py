"""FSDP2 and tensor-parallel models in two processes: projected gradients equal those of the whole model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from nn.sharded import CHECKS


@pytest.fixture(scope="module")
def errors():
    """Largest relative error of a row over both processes, by check; all of them in one launch."""
    script = Path(__file__).with_name("sharded.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, env=alone, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CHECKS)
def test_equals_the_whole_model(errors, name):
    assert errors[name] < 1e-5
