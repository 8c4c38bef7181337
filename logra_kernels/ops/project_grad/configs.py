"""Tile sizes of project_grad's Triton kernel, fixed for each kind of GPU and each class of shapes.

A row that LOGRA_KERNELS_AUTOTUNE=1 prints goes into `TILES` as it is.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

WIDTHS = (32, 64, 128)  # the classes of max(k_in, k_out); larger ones are cut into tiles of the widest


@dataclass(frozen=True)
class Tile:
    """What a program works on at a time.

    Attributes:
        block_t: Positions; halved by the launcher where that many would leave part of the chip without work.
        block_d: Features.
        block_k: Projected features of a side at most; a wider side takes more programs, each of which reads its x.
        warps, stages: Of the program, and of its software pipeline.
    """

    block_t: int
    block_d: int
    block_k: int
    warps: int
    stages: int


# (architecture, bytes an operand, width class) -> tile. 80 stands for sm_80 to sm_89, 90 for sm_90 and later.
TILES = {
    (80, 2, 32): Tile(64, 64, 32, 4, 4),
    (80, 2, 64): Tile(64, 64, 64, 4, 4),
    (80, 2, 128): Tile(64, 32, 128, 8, 4),
    (80, 4, 32): Tile(64, 32, 32, 4, 4),
    (80, 4, 64): Tile(32, 32, 64, 4, 3),
    (80, 4, 128): Tile(32, 32, 64, 4, 3),
    (80, 8, 32): Tile(32, 16, 32, 4, 2),
    (80, 8, 64): Tile(16, 16, 64, 4, 2),
    (80, 8, 128): Tile(16, 16, 64, 4, 2),
    (90, 2, 32): Tile(128, 64, 32, 4, 5),
    (90, 2, 64): Tile(128, 64, 64, 8, 4),
    (90, 2, 128): Tile(128, 64, 128, 8, 4),
    (90, 4, 32): Tile(64, 16, 32, 4, 4),
    (90, 4, 64): Tile(64, 16, 64, 8, 4),
    (90, 4, 128): Tile(64, 16, 64, 8, 4),
    (90, 8, 32): Tile(32, 16, 32, 4, 3),
    (90, 8, 64): Tile(32, 16, 64, 4, 3),
    (90, 8, 128): Tile(16, 16, 64, 4, 3),
}


def key_of(capability: tuple[int, int], size: int, width: int) -> tuple[int, int, int]:
    """The row of `TILES` for a device's compute capability, bytes an operand and max(k_in, k_out)."""
    return (90 if capability[0] >= 9 else 80), size, next((w for w in WIDTHS if width <= w), WIDTHS[-1])


def candidates(key: tuple[int, int, int]) -> Iterator[Tile]:
    """What tuning tries for a row: its tile first, then others around it."""
    yield TILES[key]
    _, size, width = key
    blocks_t, blocks_d = ((32, 64, 128, 256), (32, 64, 128)) if size < 8 else ((16, 32), (16, 32))
    for block_t, block_d, warps, stages in product(blocks_t, blocks_d, (4, 8), (3, 4, 5)):
        if block_t * width <= 128 * 128 and (block_t + width) * block_d * size * stages <= 200 << 10:
            yield Tile(block_t, block_d, width if size < 8 else min(width, 64), warps, stages)
