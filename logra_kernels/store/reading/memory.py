"""How much memory this process may use."""

import contextlib
import os
import resource
from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")


def memory_limit() -> int:
    """Bytes: the machine's memory, or less where a control group or what is left of a resource limit is less."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *_group_limits()]
    for kind, used in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        soft, _ = resource.getrlimit(kind)
        if soft != resource.RLIM_INFINITY:
            limits.append(max(0, soft - process_bytes(used)))
    return min(limits)


def process_bytes(name: str) -> int:
    """One of this process's sizes as /proc/self/status has it; 0 where that is not to be had."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))
    return 0


def outgrows_memory(nbytes: int) -> bool:
    """Whether a pass over so many bytes would push everything else, and its own first ones, out of the page cache."""
    return nbytes > memory_limit() // 2


def _group_limits() -> list[int]:
    """The limits of this process's memory control group and those above it, in either version of the interface."""
    found = []
    try:
        lines = _OWN_GROUPS.read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, name = _GROUPS, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = _GROUPS / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):  # not shown here, or "max"
                found.append(int((folder / name).read_text()))
            if folder == root:
                break
    return found
