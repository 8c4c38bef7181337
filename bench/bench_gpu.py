"""Everything that is to be measured on one CUDA device, in one call of at most eight minutes,
the build before it included.

    python bench/bench_gpu.py                            all parts
    python bench/bench_gpu.py project_grad resident      some of them

Each provider's numbers are checked before they are timed. A part's rows are written to bench/results/gpu-DEVICE.json as
soon as the part is done, in place of its earlier ones; parts that failed or found no time are named at the end.
"""

import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from itertools import chain

import gpu_logging
import gpu_project_grad
import gpu_scoring
import pytest
import torch

SECONDS = 400
PARTS: dict[str, Callable[[], Iterator[dict]]] = {
    "paper": lambda: gpu_scoring.paper("cuda"),
    "resident": lambda: gpu_scoring.resident("cuda", 65536, 8192, gpu_scoring.QUERIES),
    "topk": lambda: gpu_scoring.topk("cuda", 65536, 8192),
    "streamed": lambda: gpu_scoring.streamed("cuda", 8192, 98304),
    "logging 160m": lambda: chain.from_iterable(
        gpu_logging.measure("160m", compiler) for compiler in (None, "default", "reduce-overhead")
    ),
    "logging 8b": lambda: gpu_logging.measure("8b"),
    "project_grad": lambda: gpu_project_grad.measure(),
}


def run(parts: list[str], keep: Callable[[str, list[dict]], None], seconds: float = SECONDS) -> list[str]:
    """Measures the parts and gives each one's rows to `keep`; the names of those that are not whole.

    A part that fails keeps none of its rows, and the others go on.
    """
    begun, left = time.monotonic(), []

    def late() -> bool:
        return time.monotonic() - begun > seconds

    for part in parts:
        rows: list[dict] = []
        try:
            for row in iter(()) if late() else PARTS[part]():
                rows.append(row)
                print(row, flush=True)
                if late():
                    break
        except Exception:
            traceback.print_exc()
            left.append(part)
            continue
        if rows:
            keep(part, rows)
        if late():
            left.append(part)
    return left


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("part", PARTS)
def bench_gpu(benchmark, part):
    assert benchmark.pedantic(run, args=([part], lambda *_: None), rounds=1) == []


def main(parts: list[str]) -> None:
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        sys.exit(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if not torch.cuda.is_available():
        print("bench_gpu: skipped, there is no CUDA device")
        return
    from machine import commit, triton_version
    from record import RESULTS, slug, text

    RESULTS.mkdir(exist_ok=True)
    device = torch.cuda.get_device_name()
    path = RESULTS / f"gpu-{slug(device)}.json"

    def keep(part: str, rows: list[dict]) -> None:
        old = json.loads(path.read_text())["rows"] if path.exists() else []
        kept = [row for row in old if row["group"] != part] + [
            {"group": part, **row, "commit": commit()} for row in rows
        ]
        facts = {"op": "gpu", "machine": device, "torch": torch.__version__, "triton": triton_version()}
        path.write_text(text({**facts, "rows": kept}))

    left = run(parts or list(PARTS), keep)
    if left:
        sys.exit(f"not whole, by an error above or for lack of time: {', '.join(left)}")


if __name__ == "__main__":
    main(sys.argv[1:])
