"""How samples are cut into chunks of positions, so that one long sample and many short ones both fill a GPU."""

from torch import Tensor

from logra_kernels.ops._device import PROGRAMS_PER_PROCESSOR

SHARE_OF_PARTIALS = 16  # partial sums are at most what is read over this
LEAST_BLOCK_T = 16
BUSY = 0.9  # the share of processors with work that is good enough not to halve the blocks


def cut(
    n: int,
    t: int,
    ragged: bool,
    tiles: int,
    block_t: int,
    programs: int,
    most_partials: int,
    least_block_t: int = LEAST_BLOCK_T,
) -> tuple[int, int]:
    """(block_t, positions of a chunk) for n samples of t positions, or t positions in all where ragged.

    A chunk is a whole number of blocks. Samples are cut, and blocks halved down to `least_block_t`, only while that
    gives idle processors work.
    """
    samples = 1 if ragged else n
    least = programs / PROGRAMS_PER_PROCESSOR * BUSY
    while block_t > least_block_t and samples * -(-t // block_t) * tiles < least:
        block_t //= 2
    pieces = min(-(-programs // (samples * tiles)), -(-t // block_t), max(1, most_partials // samples))
    return block_t, -(-t // (pieces * block_t)) * block_t


def partials_of(x: Tensor, dy: Tensor, g: Tensor) -> int:
    """How many partial sums of one sample's size a call may write."""
    return max(1, (x.nbytes + dy.nbytes) // (SHARE_OF_PARTIALS * max(1, g[0].nbytes)))
