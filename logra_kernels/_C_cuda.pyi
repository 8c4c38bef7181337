from logra_kernels.ops._native import Encoded, Matrix  # noqa: N999

_Positions = tuple[int, ...]  # address, dtype code, strides of sample, row and column

def has_sm_90a() -> bool: ...
def project_grad_tiling(arch: int, dtype: int, k_in: int, k_out: int, dy_projected: bool) -> tuple[int, int, int]: ...
def project_grad(
    arch: int,
    dtype: int,
    positions: int,
    x: _Positions,
    dy: _Positions,
    p_in: Matrix | None,
    p_out: Matrix | None,
    weights: tuple[int, ...],  # address, strides of sample and row
    offsets: int,
    offset_stride: int,
    chunk_ends: int,
    out: int,
    partial: int,
    samples: int,
    length: int,
    chunk: int,
    chunks: int,
    d_in: int,
    d_out: int,
    k_in: int,
    k_out: int,
    blocks: int,
    stream: int,
) -> None: ...

_Scored = Matrix | Encoded

SCORE_TOPK_MOST_K: int

def score_tile(queries: _Scored, rows: _Scored, query_count: int) -> tuple[int, int, int]: ...
def score_block(
    arch: int,
    queries: _Scored,
    rows: _Scored,
    out: int,
    partial: int,
    query_count: int,
    row_count: int,
    d: int,
    piece: int,
    pieces: int,
    stream: int,
) -> None: ...
def score_topk(
    arch: int,
    queries: _Scored,
    rows: _Scored,
    row_scale: tuple[int, int],  # address, stride
    values: int,
    indices: int,
    candidates: int,
    counts: int,
    best: int,
    partial: int,
    query_count: int,
    row_count: int,
    d: int,
    k: int,
    largest: bool,
    first_block: int,
    capacity: int,
    piece: int,
    pieces: int,
    stream: int,
) -> None: ...
