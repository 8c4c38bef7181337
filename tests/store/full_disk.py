"""A disk that fills while a store is written, for real. Run as a program: `full_disk.py size|manifest|mount SCRATCH`.

`size` and `manifest` limit the length of files (RLIMIT_FSIZE) so that a shard or the manifest cannot be written;
`mount` expects a small tmpfs at SCRATCH in a mount namespace of its own, and enlarges it. Prints what the writer said,
as JSON.
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from store.samples import tree

from logra_kernels.errors import StoreError
from logra_kernels.store import GradientStore

LAYERS = {"wide": (32, 32)}
COUNT = {"size": 83, "manifest": 50, "mount": 203}
ROW_BYTES = 4096
PER_SHARD = {"size": 8, "manifest": 1, "mount": 8}
LIMIT = {"size": 5 * ROW_BYTES, "manifest": ROW_BYTES + 1024}  # a short shard fits the first, a row's shard the second
LIMITED_FROM = 30


def rows_between(start: int, stop: int):
    rows = torch.arange(start, stop).float().view(-1, 1).expand(-1, 1024)
    return rows, [f"a row with a name of some length {i}" for i in range(start, stop)]


def write_all(path: Path, kind: str, step: int, limited: bool = False) -> None:
    if GradientStore.exists(path):
        store = GradientStore.open(path, mode="append")
    else:
        store = GradientStore.create(path, LAYERS, rows_per_shard=PER_SHARD[kind])
    with store:
        for start in range(0, COUNT[kind], step):
            if limited and start == LIMITED_FROM:
                store.flush()
                limit_file_size(LIMIT[kind])
            store.append(*rows_between(start, min(COUNT[kind], start + step)), skip_committed=True)


def limit_file_size(nbytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def main(kind: str, scratch: Path) -> None:
    path = scratch / "store"
    started = time.monotonic()
    try:
        write_all(path, kind, step=3, limited=kind in LIMIT)
    except StoreError as error:
        said = str(error)
    else:
        raise AssertionError("the disk was never full")
    took = time.monotonic() - started
    shown = GradientStore.open(path)
    rows = len(shown)
    assert torch.equal(shown.read(0, rows), rows_between(0, rows)[0])
    assert shown.ids == rows_between(0, rows)[1]
    if kind == "mount":
        subprocess.run(["mount", "-o", "remount,size=16m", str(scratch)], check=True)
    else:
        limit_file_size(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    write_all(path, kind, step=7)
    write_all(scratch / "whole", kind, step=COUNT[kind])
    assert tree(path) == tree(scratch / "whole")
    print(json.dumps({"said": said, "rows": rows, "seconds": took}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
