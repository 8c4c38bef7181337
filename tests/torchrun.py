"""Scripts that torchrun runs in two processes."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import torch.distributed as dist

TESTS = Path(__file__).parent


def launch(script: Path, *arguments: str) -> str:
    """What the script prints; each of the two processes has one thread."""
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(script), *arguments], env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def leave() -> None:
    """The script's last line. Does not return: a worker of gloo that lets go of a tensor while the interpreter is taken
    down aborts the process (https://github.com/pytorch/pytorch/issues/190489), so it is not taken down."""
    dist.barrier()
    dist.destroy_process_group()
    gc.collect()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
