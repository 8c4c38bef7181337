"""What only Triton's project_grad does: samples cut into chunks, operands through tensor descriptors, tuned tiles."""

import pytest
import torch
from ops.test_project_grad import case, exactly, position_weights, ragged
from tolerance import assert_as_good_as_naive

import logra_kernels as lk
from logra_kernels.ops import _tune
from logra_kernels.ops.project_grad import reference
from logra_kernels.ops.project_grad import triton as implementation
from logra_kernels.ops.project_grad.configs import TILES, Tile, candidates, key_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = Tile(16, 32, 64, 4, 2)
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
DESCRIBED = torch.cuda.is_available() is False or torch.cuda.get_device_capability()[0] >= 9


def filled(args, tile=SMALL, *, described=False, programs=64, most_partials=1000):
    """launch_tile on the arguments of the op, into memory that holds NaN."""
    x, dy, p_in, p_out, offsets, weights = (*args, None, None)[:6]
    n = x.shape[0] if offsets is None else len(offsets) - 1
    k_out, k_in = (v.shape[-1] if p is None else p.shape[0] for p, v in ((p_out, dy), (p_in, x)))
    dtype = torch.float64 if dy.dtype == torch.float64 else torch.float32
    g = torch.full((n, k_out, k_in), float("nan"), dtype=dtype, device=dy.device)
    how = {"described": described, "programs": programs, "most_partials": most_partials}
    implementation.launch_tile(x, dy, p_in, p_out, offsets, weights, g, tile, **how)
    return g


def check(args, **how):
    got = filled(args, **how)
    assert_as_good_as_naive(got, exactly(*args), reference.project_grad(*args))
    return got


@pytest.fixture
def chunks(monkeypatch):
    """(block_t, positions of a chunk) of each launch."""
    cuts = []

    def cut(*args):
        cuts.append(original(*args))
        return cuts[-1]

    original = implementation.cut
    monkeypatch.setattr(implementation, "cut", cut)
    return cuts


@pytest.mark.parametrize("weighted", [False, True])
def test_one_long_sample_in_chunks(chunks, dtype, weighted):
    args = case(1, 203, 40, 24, 16, 10, dtype, DEVICE)
    weights = position_weights(1, 203, dtype=dtype, device=DEVICE) if weighted else None
    check((*args, None, weights))
    assert chunks == [(16, 16)]


def test_several_samples_in_chunks_and_tiles(chunks):
    check(case(3, 70, 31, 24, 140, 70, torch.float32, DEVICE), programs=100)
    assert chunks == [(16, 16)]


@pytest.mark.parametrize("weighted", [False, True])
def test_ragged_samples_in_chunks(chunks, dtype, weighted):
    args = ragged(dtype, DEVICE)
    weights = position_weights(75, dtype=dtype, device=DEVICE) if weighted else None
    got = check((*args, weights))
    assert chunks == [(16, 16)]
    assert not got[0].any()


def test_more_samples_than_are_searched_at_a_time(chunks, monkeypatch):
    monkeypatch.setattr(implementation, "SAMPLES_AT_ONCE", 16)
    lengths = torch.randint(0, 40, (50,))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(DEVICE)
    x, dy = torch.randn(int(offsets[-1]), 4, device=DEVICE), torch.randn(int(offsets[-1]), 3, device=DEVICE)
    check((x, dy, None, None, offsets), programs=99)


def test_chunks_keep_nan_in_its_sample(chunks):
    x, dy, p_in, p_out, offsets = ragged(device=DEVICE)
    x[41, 0] = float("nan")
    bad = filled((x, dy, p_in, p_out, offsets)).isnan()
    assert bad[3].all()
    assert bad.sum() == bad[3].numel()


def test_same_bits_again(chunks):
    args = case(2, 165, 70, 40, 20, 24, torch.float32, DEVICE)
    assert torch.equal(filled(args), filled(args))


@pytest.mark.skipif(not DESCRIBED, reason="this GPU has no tensor descriptors")
@pytest.mark.parametrize("half", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cuts", [False, True], ids=["dense", "ragged"])
def test_operands_through_descriptors(chunks, half, cuts, monkeypatch):
    used = []
    descriptor = implementation.TensorDescriptor
    monkeypatch.setattr(implementation, "describable", lambda m: used.append(m) or m.data_ptr() % 16 == 0)
    x, dy, p_in, p_out = case(1 if cuts else 3, 75, 40, 24, 17, 10, half, DEVICE)
    offsets = torch.tensor([0, 0, 5, 5, 42, 70, 73], device=DEVICE) if cuts else None
    x, dy = (x[0], dy[0]) if cuts else (x, dy)
    weights = position_weights(*dy.shape[:-1], device=DEVICE)
    weights[..., 7] = 0
    got = check((x, dy, p_in, p_out, offsets, weights), described=True)
    assert len(used) == 4
    assert implementation.TensorDescriptor is descriptor
    x[..., 7, :] = float("nan")
    assert torch.equal(filled((x, dy, p_in, p_out, offsets, weights), described=True), got)


def test_descriptors_are_refused_where_they_do_not_fit():
    good = torch.zeros(8, 64, dtype=torch.bfloat16)
    assert implementation.describable(good)
    bad = [good[:, 1:], good[:, ::2], good.mT, torch.zeros(8, 63, dtype=torch.bfloat16), good.double()]
    assert not any(implementation.describable(m) for m in bad)


def test_projected_side_beside_a_described_one(chunks):
    x, dy, _, p_out = case(3, 40, 16, 24, 16, 8, torch.bfloat16, DEVICE)
    check((x.float(), dy, None, p_out), described=DESCRIBED)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [  # samples, positions, ragged, tiles, block_t, programs, partial sums at most
        ((64, 128, False, 1, 128, 264, 10**6), (64, 64)),
        ((1, 8192, False, 1, 128, 264, 10**6), (64, 64)),
        ((1, 65536, False, 1, 128, 264, 10**6), (128, 256)),
        ((1, 65536, False, 1, 128, 264, 8), (128, 8192)),
        ((1000, 512, False, 1, 128, 264, 10**6), (128, 512)),
        ((7, 65536, True, 1, 128, 264, 10**6), (128, 256)),
        ((1, 16, False, 1, 128, 264, 10**6), (16, 16)),
    ],
)
def test_cut(shape, expected):
    assert implementation.cut(*shape) == expected


def test_every_class_has_a_tile_and_candidates():
    for capability in ((8, 0), (8, 9), (9, 0), (10, 0)):
        for size in (2, 4, 8):
            for width in (1, 16, 33, 64, 96, 128, 256):
                key = key_of(capability, size, width)
                assert TILES[key] == next(candidates(key))
                assert len(list(candidates(key))) > 3


def test_tuning_takes_the_fastest_that_runs_and_prints_its_row(monkeypatch, capsys):
    monkeypatch.setattr(_tune, "AUTOTUNE", True)
    monkeypatch.setattr(_tune, "_tuned", {})
    args, tiles = case(2, 9, 12, 8, 4, 4, device=DEVICE), [Tile(16, 16, 16, 4, s) for s in (1, 2, 3)]
    ran = []

    def run(tile):
        if tile.stages == 3:
            raise RuntimeError("out of resource")
        ran.append(tile.stages)
        return filled(args, tile)

    def milliseconds(call):
        call()
        return {1: 5.0, 2: 3.0}[ran[-1]]

    chosen = [_tune.tile_for("op", {}, "row", lambda key: tiles, run, milliseconds) for _ in range(2)]
    assert chosen == [tiles[1]] * 2
    assert ran == [1, 2]
    assert capsys.readouterr().out.count("'row': Tile(block_t=16") == 1
    with pytest.raises(RuntimeError, match="no candidate tile runs"):
        _tune.tile_for("op", {}, "other", lambda key: tiles[2:], run, milliseconds)


def test_the_op_takes_this_path(monkeypatch):
    called = []
    original = implementation.launch_tile
    monkeypatch.setattr(implementation, "launch_tile", lambda *a, **k: called.append(a[7]) or original(*a, **k))
    lk.project_grad(*case(2, 9, 12, 48, 4, 40, torch.bfloat16, DEVICE), backend="triton")
    assert called == [TILES[key_of(torch.cuda.get_device_capability() if DEVICE == "cuda" else (8, 0), 2, 40)]]
