# ruff: noqa: N999
"""What the native library offers. Tensors are raw addresses with a dtype code and strides, see ops/_native.py."""

from collections.abc import Callable

from logra_kernels.ops._native import Encoded, Matrix, Positions

def isa() -> str: ...
def isas() -> list[str]: ...
def multiplies_bf16() -> bool: ...
def project_rows(x: Positions, p: Matrix, out: int, rows: int, d: int, k: int, n_threads: int) -> None: ...
def row_projector(
    x: Positions, p: Matrix, rows: int, d: int, k: int, rounded: bool
) -> Callable[[int, int, int], None]: ...
def project_grad(
    x: Positions,
    dy: Positions,
    p_in: Matrix | None,
    p_out: Matrix | None,
    weights: Positions | None,
    offsets: int,
    out: int,
    samples: int,
    length: int,
    rows: int,
    d_in: int,
    d_out: int,
    k_in: int,
    k_out: int,
    n_threads: int,
) -> None: ...
def project_grad_adder(
    x: Positions,
    dy: Positions,
    p_in: Matrix | None,
    p_out: Matrix | None,
    samples: int,
    length: int,
    d_in: int,
    d_out: int,
    k_in: int,
    k_out: int,
) -> Callable[[int, int, int, int, int, bool, int], None]: ...
def accumulate_gram(g: Matrix, out: int, rows: int, d: int, n_threads: int) -> None: ...
def quantize_rows(
    g: Matrix,
    codes: int,
    scales: int,
    rows: int,
    d: int,
    code: int,
    half_scales: bool,
    block: int,
    stochastic: bool,
    seed: int,
    first_row: int,
    n_threads: int,
) -> None: ...
def dequantize_rows(encoded: Encoded, out: int, rows: int, d: int, n_threads: int) -> None: ...
def score_block(
    queries: Matrix, rows: Matrix, out: int, n_queries: int, n_rows: int, d: int, n_threads: int
) -> None: ...
def score_block_encoded(
    queries: Matrix, rows: Encoded, out: int, n_queries: int, n_rows: int, d: int, digits: int, n_threads: int
) -> None: ...
def score_topk_encoded(
    queries: Matrix,
    rows: Encoded,
    row_scale: Matrix | None,
    values: int,
    indices: int,
    n_queries: int,
    n_rows: int,
    d: int,
    k: int,
    largest: bool,
    digits: int,
    n_threads: int,
) -> None: ...

class Scorer:
    def __init__(self, queries: Matrix, n_queries: int, d: int) -> None: ...
    def score(self, rows: Encoded, count: int, out: int, stride: int, digits: int, n_threads: int) -> None: ...

class Search:
    def __init__(self, queries: Matrix, n_queries: int, n_rows: int, d: int, k: int, largest: bool) -> None: ...
    def add(self, blocks: list[tuple[Matrix, Matrix | None, int]], n_threads: int) -> None: ...
    def add_encoded(self, blocks: list[tuple[Encoded, Matrix | None, int]], digits: int, n_threads: int) -> None: ...
    def found(self) -> int: ...
    def write(self, values: int, indices: int, n_threads: int) -> None: ...

def score_topk(
    queries: Matrix,
    rows: Matrix,
    row_scale: Matrix | None,
    values: int,
    indices: int,
    n_queries: int,
    n_rows: int,
    d: int,
    k: int,
    largest: bool,
    n_threads: int,
) -> None: ...
def populate(address: int, bytes: int, n_threads: int) -> int: ...
def resident(address: int, bytes: int) -> bool: ...
def let_go(address: int, bytes: int) -> None: ...
def take_rows(source: int, stride: int, out: int, dtype: int, rows: int, d: int) -> bool: ...
def largest_magnitude(source: int, stride: int, rows: int, d: int) -> float: ...

class IdTable:
    def __len__(self) -> int: ...
    def find(self, ids: list[str], places: int, room: int) -> None: ...
    def add(self, ids: list[str]) -> int: ...
    def add_arrow(self, offsets: int, data: int, n: int) -> int: ...
    def add_new(self, offsets: int, data: int, n: int, new: int) -> None: ...
    def drop(self, count: int) -> None: ...

class Writes:
    def add(self, fd: int, data: int, bytes: int, offset: int) -> int: ...
    def wait(self, number: int) -> int: ...

def pack_strings(strings: list[str], offsets: int, room: int) -> bytes | None: ...
def gather(parts: list[tuple[int, int]], out: int, room: int) -> int: ...
def factor_rows(rows: Matrix, sizes: list[tuple[int, int]], rank: int, out: int, n: int, n_threads: int) -> None: ...
def score_factored(
    queries: Matrix,
    factors: Matrix,
    sizes: list[tuple[int, int]],
    rank: int,
    align: int,
    out: int,
    n_queries: int,
    n_rows: int,
    n_threads: int,
) -> None: ...
def score_factored_encoded(
    queries: Matrix,
    factors: Encoded,
    sizes: list[tuple[int, int]],
    rank: int,
    align: int,
    out: int,
    n_queries: int,
    n_rows: int,
    n_threads: int,
) -> None: ...
