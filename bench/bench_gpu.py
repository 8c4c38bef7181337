"""Everything that is to be measured on one CUDA device, in one call of at most eight minutes, the build before it
included.

    python bench/bench_gpu.py                                all parts
    python bench/bench_gpu.py --only project_grad,resident   some of them

Each provider's numbers are checked before they are timed; one that is wrong or fails has a row that says so in place of
its times, and the others go on. A part runs in a process of its own, so that a broken kernel takes no other part with
it, and is stopped when its seconds are over. Every row is written to bench/results/gpu-DEVICE.json as soon as it is
there, in place of the part's earlier ones; parts that are not whole are named at the end.

LogIX and Bergson are measured beside the package in the logging parts where they can be imported, from a folder on
PYTHONPATH say: pip install --no-deps --ignore-requires-python --target FOLDER logix-ai==0.1.1 bergson==2.5.1 datasets
multiprocess dill petname simple-parsing docstring-parser, wheels of 1.4 MB in all. They then need, beside torch,
transformers, accelerate, peft, pandas, pyarrow, xxhash, jaxtyping, ml-dtypes, einops and PyYAML.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import gpu_logging
import gpu_project_grad
import gpu_scoring
import pytest
import torch

SECONDS = 400


@dataclass(frozen=True)
class Part:
    """What is measured, a row at a time, and for how many seconds at most."""

    rows: Callable[[], Iterator[dict]]
    seconds: float


PARTS = {
    "project_grad": Part(lambda: gpu_project_grad.measure(), 130),
    "logging 8b": Part(lambda: gpu_logging.measure("8b"), 100),
    "resident": Part(lambda: gpu_scoring.resident("cuda", 65536, 8192, gpu_scoring.QUERIES), 80),
    "topk": Part(lambda: gpu_scoring.topk("cuda", 65536, 8192), 40),
    "streamed": Part(lambda: gpu_scoring.streamed("cuda", 8192, 98304), 60),
    "paper": Part(lambda: gpu_scoring.paper("cuda"), 50),
    "logging 160m": Part(lambda: gpu_logging.measure("160m", observed=True), 60),
    "logging 160m compiled": Part(
        lambda: chain.from_iterable(
            gpu_logging.measure("160m", compiler) for compiler in ("default", "reduce-overhead")
        ),
        120,
    ),
}


COMMAND = (sys.executable, __file__, "--child")


def run(
    part: str,
    begun: float,
    keep: Callable[[str, dict], None],
    seconds: float = SECONDS,
    command: tuple[str, ...] = COMMAND,
) -> bool:
    """Measures a part in a process of its own and gives each row to `keep`; whether all of them came.

    Args:
        begun: When the first part began, by time.monotonic(); `seconds` of it are for all parts.
        command: Prints the rows of the part that is its last argument, a JSON line each.
    """
    left = min(PARTS[part].seconds, begun + seconds - time.monotonic())
    if left <= 0:
        return False
    child = subprocess.Popen([*command, part], stdout=subprocess.PIPE, text=True)
    watch = threading.Timer(left, child.kill)
    watch.start()
    whole = True
    assert child.stdout is not None
    try:
        for line in child.stdout:
            if line.startswith("{"):
                row = json.loads(line)
                whole = whole and "error" not in row
                keep(part, row)
                print(f"{time.monotonic() - begun:5.0f} s  {row}", flush=True)
            else:
                print(line, end="", flush=True)
        return child.wait() == 0 and whole
    finally:
        watch.cancel()
        child.kill()
        child.wait()


def emit(part: str) -> None:
    """A part's rows, a JSON line each."""
    for row in PARTS[part].rows():
        print(json.dumps(row), flush=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("part", PARTS)
def bench_gpu(benchmark, part):
    assert benchmark.pedantic(run, args=(part, time.monotonic(), lambda *_: None), rounds=1)


class Results:
    """The file of a device, written anew with every row."""

    def __init__(self, path: Path, facts: dict) -> None:
        self.path, self.facts, self.begun = path, facts, set[str]()

    def keep(self, part: str, row: dict) -> None:
        from machine import commit
        from record import text

        rows = json.loads(self.path.read_text())["rows"] if self.path.exists() else []
        if part not in self.begun:
            rows = [old for old in rows if old["group"] != part]
            self.begun.add(part)
        written = self.path.with_suffix(".new")
        written.write_text(text({**self.facts, "rows": [*rows, {"group": part, **row, "commit": commit()}]}))
        os.replace(written, self.path)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Measures the package on this machine's CUDA device.")
    parser.add_argument("--only", metavar="PART,PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all parts (%(default)s)")
    parser.add_argument("--child", choices=PARTS, help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    parts = asked.only.split(",") if asked.only else list(PARTS)
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        sys.exit(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if asked.child:
        return emit(asked.child)
    if not torch.cuda.is_available():
        print("bench_gpu: skipped, there is no CUDA device")
        return
    from machine import triton_version
    from record import RESULTS, slug

    begun = time.monotonic()
    RESULTS.mkdir(exist_ok=True)
    device = torch.cuda.get_device_name()
    facts = {"op": "gpu", "machine": device, "torch": torch.__version__, "triton": triton_version()}
    results = Results(RESULTS / f"gpu-{slug(device)}.json", facts)
    left = [part for part in parts if not run(part, begun, results.keep, asked.seconds)]
    print(f"{time.monotonic() - begun:.0f} s; {results.path}")
    if left:
        sys.exit(f"not whole, by an error above or for lack of time: {', '.join(left)}")


if __name__ == "__main__":
    main(sys.argv[1:])
