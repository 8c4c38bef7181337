"""Asks a store for its best rows under a limit of memory and says what that took.

`limited.py STORE HEADROOM [GROUP]`: RLIMIT_DATA lets HEADROOM bytes be added to what the imports take; with GROUP, a
memory control group's directory, its limit does, page cache included. Prints one line of JSON.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path

import torch

from logra_kernels.plan import peak_bytes, plan, reset_peak
from logra_kernels.store import GradientStore, process_bytes


def group_bytes(group: Path) -> int:
    return int((group / "memory.usage_in_bytes").read_text())


def main(path: str, headroom: int, group: Path | None) -> None:
    torch.set_num_threads(2)
    queries = torch.randn(4, GradientStore.open(path).dim, generator=torch.Generator().manual_seed(1))
    with_small = torch.randn(9, 3) @ torch.randn(3, 9)  # starts the threads
    assert with_small.isfinite().all()
    if group is not None:
        (group / "cgroup.procs").write_text(str(os.getpid()))
        (group / "memory.limit_in_bytes").write_text(str(group_bytes(group) + headroom))
        limit = int((group / "memory.limit_in_bytes").read_text())
    else:
        limit = process_bytes("VmData") + headroom
        resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))
    planned = plan(path, queries=4, k=20)
    reset_peak()
    begun = time.perf_counter()
    values, index = GradientStore.open(path).topk(queries, 20)
    seconds = time.perf_counter() - begun
    (cost,) = planned.formats.values()
    print(
        json.dumps(
            {
                "index": index.tolist(),
                "values": values.tolist(),
                "planned": cost.topk_bytes,
                "peak": peak_bytes(),
                "store": cost.disk_bytes,
                "limit": limit,
                "seconds": seconds,
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]) if len(sys.argv) > 3 else None)
