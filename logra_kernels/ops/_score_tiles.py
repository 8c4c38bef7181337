"""Tile sizes of the Triton kernel that scores rows without scales, fixed for each kind of GPU and number of queries.

A row that LOGRA_KERNELS_AUTOTUNE=1 prints goes into `TILES` as it is.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

QUERIES = (16, 64, 128)  # the classes of the number of queries; more are cut into tiles of the last


@dataclass(frozen=True)
class ScoreTile:
    """What a program works on at a time.

    Attributes:
        block_q, block_n: Queries and rows at most.
        block_d: Numbers of each.
        warps, stages: Of the program, and of its software pipeline.
        at_once: Programs that a processor has room for, as which the work is cut.
    """

    block_q: int
    block_n: int
    block_d: int
    warps: int
    stages: int
    at_once: int


# (architecture, bytes an operand, class of queries) -> tile. 80 stands for sm_80 to sm_89, 90 for sm_90 and later.
TILES = {
    (80, 2, 16): ScoreTile(16, 64, 64, 4, 3, 2),
    (80, 2, 64): ScoreTile(64, 64, 64, 4, 3, 2),
    (80, 2, 128): ScoreTile(128, 128, 32, 8, 4, 1),
    (90, 2, 16): ScoreTile(16, 64, 64, 4, 4, 2),
    (90, 2, 64): ScoreTile(64, 128, 64, 4, 4, 2),
    (90, 2, 128): ScoreTile(128, 256, 64, 8, 3, 1),
    **{
        (arch, size, queries): ScoreTile(min(queries, 64), 64, 32, 4, 3, 2)
        for arch, size, queries in product((80, 90), (4, 8), QUERIES)
    },
    **{(90, 4, queries): ScoreTile(64, 64, 32, 8, 3, 2) for queries in QUERIES[1:]},  # four warps would spill registers
}


def key_of(capability: tuple[int, int], size: int, queries: int) -> tuple[int, int, int]:
    """The row of `TILES` for a device's compute capability, bytes an operand and the number of queries."""
    return (90 if capability[0] >= 9 else 80), size, next((most for most in QUERIES if queries <= most), QUERIES[-1])


def candidates(key: tuple[int, int, int]) -> Iterator[ScoreTile]:
    """What tuning tries for a row: its tile first, then others around it."""
    yield TILES[key]
    _, size, queries = key
    if size != 2:
        return
    for block_n, block_d, warps, stages in product((64, 128, 256), (32, 64, 128), (4, 8), (3, 4)):
        stage = (queries + block_n) * block_d * size
        if queries * block_n <= 128 * 128 * warps // 4 and stage * stages <= 200 << 10:
            yield ScoreTile(queries, block_n, block_d, warps, stages, 2 if stage * stages <= 100 << 10 else 1)
