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
    stream: int,
) -> None: ...
def score_block_tile(queries: int) -> tuple[int, int, int]: ...
def score_block(
    queries: Matrix,
    rows: Matrix | Encoded,
    out: int,
    partial: int,
    query_count: int,
    row_count: int,
    d: int,
    piece: int,
    pieces: int,
    stream: int,
) -> None: ...
