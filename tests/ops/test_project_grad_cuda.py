"""project_grad's CUDA C++ kernels: run on a CPU by tests/ops/cuda_on_cpu, and compiled where nvcc is."""

import contextlib
import ctypes
from types import SimpleNamespace

import pytest
import torch
from ops.cuda_sources import COMPILER, NVCC, OnCpu, is_built, machine_code, said_by_nvcc, stacks
from ops.test_project_grad import MIXED, case, exactly, position_weights, ragged
from ops.views import VIEWS
from tolerance import assert_as_good_as_naive

from logra_kernels.ops import _device, _dispatch
from logra_kernels.ops.project_grad import reference

HALVES = [torch.bfloat16, torch.float16]
ELEMENT = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
WIDTHS = [(dtype, width) for dtype in ELEMENT for width in (32, 64, 128) if dtype in HALVES or width < 128]
SM_80 = 0  # positions of a block, where the path knows but one
SM_90 = [(positions, width) for positions in (64, 128) for width in (32, 64, 128)]
LATE_COPIES = 4  # threads in ascending order; copies land when they are waited for, products are computed at once
DESCENDING = 5  # and else as LATE_COPIES
EARLY_COPIES = 3  # descending; copies land at once, products are computed when they are waited for
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return OnCpu("project_grad", tmp_path_factory.mktemp("cuda_on_cpu"))


def side(v, p, dtype):
    strides = v.stride() if v.dim() == 3 else (0, *v.stride())
    factor = (0, 0, 0, v.shape[-1]) if p is None else (p.data_ptr(), *p.stride(), p.shape[0])
    return (ctypes.c_int64 * 10)(v.data_ptr(), *strides, *factor[:3], v.shape[-1], factor[3], v.dtype != dtype)


def run(kernels, args, width, chunk=10**6, positions=SM_80, timing=LATE_COPIES, blocks=1):
    """The kernels' G, written over NaN; by clusters of so many blocks where the path has clusters."""
    x, dy, p_in, p_out, offsets, weights = (*args, None, None)[:6]
    n, length = (x.shape[0], x.shape[1]) if offsets is None else (len(offsets) - 1, x.shape[0])
    k_out, k_in = (v.shape[-1] if p is None else p.shape[0] for p, v in ((p_out, dy), (p_in, x)))
    out = torch.full((n, k_out, k_in), float("nan"))
    if offsets is None:
        ends, chunks = None, n * -(-length // chunk)
    else:
        ends = ((offsets.diff() + chunk - 1) // chunk).cumsum(0)
        chunks = n + x.shape[0] // chunk
    partial = torch.full((chunks, k_out, k_in), float("nan"))

    def pointer(t):
        return ctypes.c_void_p(None if t is None else t.data_ptr())

    w = (0, 0) if weights is None else (weights.stride() if weights.dim() == 2 else (0, *weights.stride()))
    kernels(
        ELEMENT[dy.dtype], positions, width, blocks, timing, side(x, p_in, dy.dtype), side(dy, p_out, dy.dtype),
        pointer(weights), *map(ctypes.c_int64, w), pointer(out), pointer(partial), ctypes.c_int64(n),
        ctypes.c_int64(length), pointer(offsets), pointer(ends), ctypes.c_int64(chunk), ctypes.c_int64(chunks),
    )  # fmt: skip
    return out


def check(kernels, args, width, chunk=10**6, positions=SM_80, blocks=1):
    got = run(kernels, args, width, chunk, positions, blocks=blocks)
    assert_as_good_as_naive(got, exactly(*args), reference.project_grad(*args))
    for timing in (EARLY_COPIES, DESCENDING):  # no race between barriers
        assert torch.equal(run(kernels, args, width, chunk, positions, timing, blocks), got)
    return got


@pytest.mark.parametrize(("dtype", "width"), WIDTHS, ids=str)
def test_matches_fp64(kernels, dtype, width):
    check(kernels, case(2, width + 5, 136, 72, width, width - 7, dtype), width)


@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize(("positions", "width"), SM_90)
def test_sm_90_matches_fp64(kernels, half, positions, width):
    check(kernels, case(2, positions + 5, 584, 72, width, width - 7, half), width, positions=positions)


def test_sm_90_tiles_chunks_and_weights(kernels):
    args = case(3, 150, 72, 136, 70, 40, torch.bfloat16)
    check(kernels, (*args, None, position_weights(3, 150)), 32, chunk=64, positions=64)
    check(kernels, (*args, None, position_weights(3, 150)), 64, chunk=128, positions=128)


@pytest.mark.parametrize("blocks", [2, 4])
class TestClusters:
    """The blocks of a cluster fetch shares of the factor for each other, to the bits of a block alone."""

    @pytest.mark.parametrize(("positions", "width"), SM_90)
    def test_dense(self, kernels, positions, width, blocks):
        args = case(2, 3 * positions - 20, 136, 40, width, width - 7, torch.bfloat16)  # six chunks: the last have none
        alone = run(kernels, args, width, positions, positions)
        assert torch.equal(check(kernels, args, width, positions, positions, blocks), alone)

    def test_several_rounds(self, kernels, blocks):
        args = case(3, 300, 72, 136, 32, 20, torch.float16)
        alone = run(kernels, args, 32, 128, 64)
        assert torch.equal(check(kernels, args, 32, 128, 64, blocks), alone)

    def test_tiles_and_weights(self, kernels, blocks):
        args = (*case(3, 150, 72, 136, 70, 40, torch.bfloat16), None, position_weights(3, 150))
        alone = run(kernels, args, 32, 64, 64)
        assert torch.equal(check(kernels, args, 32, 64, 64, blocks), alone)

    @pytest.mark.parametrize("weighted", [False, True])
    def test_ragged(self, kernels, blocks, weighted):
        x, dy, p_in, p_out, offsets = ragged(torch.bfloat16)
        args = (*map(apart, (x, dy, p_in, p_out)), offsets)
        args = (*args, position_weights(75)) if weighted else args
        alone = run(kernels, args, 32, 64, 64)
        assert torch.equal(check(kernels, args, 32, 64, 64, blocks), alone)

    def test_ragged_lengths_apart(self, kernels, blocks):
        """Beside a block of many rounds others have one, or none."""
        lengths = torch.tensor([3, 320, 0, 70, 1])
        x, dy, p_in, p_out = case(1, int(lengths.sum()), 72, 136, 32, 20, torch.bfloat16)
        args = (x[0], dy[0], p_in, p_out, torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]))
        alone = run(kernels, args, 32, 320, 64)
        assert torch.equal(check(kernels, args, 32, 320, 64, blocks), alone)

    def test_projected_x(self, kernels, blocks):
        _, dy, _, p_out = case(3, 70, 8, 24, 8, 16, torch.bfloat16)
        args = (torch.randn(3, 70, 12), dy, None, p_out)
        assert torch.equal(check(kernels, args, 32, 64, 64, blocks), run(kernels, args, 32, 64, 64))

    def test_nan_stays_where_it_is(self, kernels, blocks):
        x, dy, p_in, p_out, offsets = ragged(torch.bfloat16)
        x, dy, p_in, p_out = map(apart, (x, dy, p_in, p_out))
        clean = run(kernels, (x, dy, p_in, p_out, offsets), 32, 64, 64, blocks=blocks)
        x[41, 0] = dy[41, 1] = float("nan")
        bad = run(kernels, (x, dy, p_in, p_out, offsets), 32, 64, 64, blocks=blocks)
        assert bad[3].isnan().all()
        bad[3] = clean[3]
        assert torch.equal(bad, clean)


def apart(t):
    """A view in which rows are a multiple of 16 bytes, and something, apart."""
    view = t.new_full((*t.shape[:-1], t.shape[-1] + 8 + -t.shape[-1] % 8), float("nan"))[..., : t.shape[-1]]
    return view.copy_(t)


def test_sm_90_rows_apart(kernels):
    check(kernels, tuple(map(apart, case(3, 70, 72, 41, 17, 9, torch.bfloat16))), 32, positions=64)
    x, dy, p_in, p_out = map(apart, case(3, 90, 72, 41, 17, 9, torch.bfloat16))
    check(kernels, (x[:, :70], dy[:, 20:], p_in, p_out), 32, positions=64)


@pytest.mark.parametrize("weighted", [False, True])
def test_sm_90_ragged(kernels, weighted):
    x, dy, p_in, p_out, offsets = ragged(torch.bfloat16)
    args = (*map(apart, (x, dy, p_in, p_out)), offsets)
    got = check(kernels, (*args, position_weights(75)) if weighted else args, 32, chunk=64, positions=64)
    assert not got[0].any()


def test_sm_90_nan_stays_where_it_is(kernels):
    x, dy, p_in, p_out, offsets = ragged(torch.bfloat16)
    x, dy, p_in, p_out = map(apart, (x, dy, p_in, p_out))
    clean = run(kernels, (x, dy, p_in, p_out, offsets), 32, 64, 64)
    x[41, 0] = dy[41, 1] = float("nan")
    bad = run(kernels, (x, dy, p_in, p_out, offsets), 32, 64, 64)
    assert bad[3].isnan().all()
    bad[3] = clean[3]
    assert torch.equal(bad, clean)


def test_sm_90_projected_x(kernels):
    _, dy, _, p_out = case(3, 37, 8, 24, 8, 16, torch.bfloat16)
    check(kernels, (torch.randn(3, 37, 12), dy, None, p_out), 32, positions=64)
    check(kernels, (torch.randn(3, 37, 36)[..., 12:24], dy, None, p_out), 32, positions=64)


@pytest.mark.parametrize("dtype", ELEMENT, ids=str)
def test_columns_of_a_shared_projection(kernels, dtype):
    _, dy, _, p_out = case(2, 37, 8, 41, 8, 9, dtype)
    check(kernels, (torch.randn(2, 37, 50)[..., 17:34], dy, None, p_out), 32)


@pytest.mark.parametrize("dtype", ELEMENT, ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_strides(kernels, dtype, view):
    x, dy, p_in, p_out = map(VIEWS[view], case(2, 37, 72, 41, 17, 9, dtype))
    check(kernels, (x, dy, p_in, p_out, None, VIEWS[view](position_weights(2, 37))), 32)


@pytest.mark.parametrize("dtype", ELEMENT, ids=str)
def test_tiles_and_chunks(kernels, dtype):
    check(kernels, case(2, 100, 24, 16, 40, 70, dtype), 32, chunk=64)


@pytest.mark.parametrize("dtype", ELEMENT, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_ragged_in_chunks(kernels, dtype, weighted):
    args = ragged(dtype)
    got = check(kernels, (*args, position_weights(75)) if weighted else args, 32, chunk=32)
    assert not got[0].any()


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_fp32_x_beside_half_dy(kernels, half):
    _, dy, _, p_out = case(3, 37, 8, 24, 8, 16, half)
    check(kernels, (torch.randn(3, 37, 12), dy, None, p_out), 32)
    check(kernels, (torch.randn(3, 37, 40), dy, None, None), 64)


def test_nan_stays_where_it_is(kernels):
    x, dy, p_in, p_out, offsets = ragged(torch.bfloat16)
    weights = position_weights(75)
    weights[10], weights[41] = 0, 1
    clean = run(kernels, (x, dy, p_in, p_out, offsets, weights), 32, chunk=32)
    x[10], dy[10], x[41, 0] = float("nan"), float("inf"), float("nan")
    bad = run(kernels, (x, dy, p_in, p_out, offsets, weights), 32, chunk=32)
    assert bad[3].isnan().all()
    bad[3] = clean[3]
    assert torch.equal(bad, clean)


@pytest.mark.skipif(_dispatch.cuda_error() is not None, reason="logra_kernels._C_cuda is not built")
class TestLauncher:
    """ops/project_grad/cuda.py on CPU tensors, its kernels' binding replaced by the kernels on a CPU."""

    @pytest.fixture(params=[(8, 0), (9, 0)], ids=["sm_80", "sm_90"])
    def launch(self, kernels, monkeypatch, request):
        from logra_kernels.ops.project_grad import cuda

        def bound(arch, dtype, positions, x, dy, p_in, p_out, weights, offsets, offset_stride, ends, out, partial, n,
                  length, chunk, chunks, d_in, d_out, k_in, k_out, blocks, stream):  # fmt: skip
            assert offset_stride in (0, 1)
            assert stream == 7
            assert chunk % positions == 0
            assert x[1] == dtype if p_in else x[1] in (dtype, 0)
            assert dy[1] == dtype if p_out else dy[1] in (dtype, 0)
            assert all(p is None or p[1] == dtype for p in (p_in, p_out))
            width, _, _ = tiling(80, dtype, k_in, k_out, p_out is None)
            archs.append(arch)
            sides = [
                (ctypes.c_int64 * 10)(v[0], *v[2:], *((0, 0, 0) if p is None else (p[0], *p[2:])), d, k, v[1] == 0)
                for v, p, d, k in ((x, p_in, d_in, k_in), (dy, p_out, d_out, k_out))
            ]
            numbers = (*weights, out, partial, n, length, offsets, ends, chunk, chunks)
            kernels(
                dtype,
                positions if arch == 90 else SM_80,
                width,
                blocks or 4,
                LATE_COPIES,
                *sides,
                *map(ctypes.c_int64, numbers),
            )

        tiling, archs = cuda._C_cuda.project_grad_tiling, []
        built = SimpleNamespace(project_grad=bound, project_grad_tiling=tiling, has_sm_90a=lambda: True)
        monkeypatch.setattr(cuda, "_C_cuda", built)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: request.param)
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
        monkeypatch.setattr(cuda, "programs_of", lambda tensor: 8)
        monkeypatch.setattr(cuda, "partials_of", lambda x, dy, g: 8)
        return SimpleNamespace(call=cuda.launch, archs=archs, capability=request.param)

    def check(self, launch, args):
        got = launch.call(*args, *[None] * (6 - len(args)))
        assert_as_good_as_naive(got, exactly(*args), reference.project_grad(*args))

    @pytest.mark.parametrize("dtype", ELEMENT, ids=str)
    def test_dense(self, launch, dtype):
        self.check(launch, case(2, 170, 24, 16, 40, 70, dtype))
        self.check(launch, (*case(2, 37, 24, 16, 20, 10, dtype), None, position_weights(2, 37)))
        assert launch.archs == [90 if launch.capability == (9, 0) and dtype in HALVES else 80] * 2

    @pytest.mark.parametrize("view", VIEWS)
    def test_views(self, launch, view):
        """What no tensor map describes goes to the kernels of sm_80."""
        self.check(launch, tuple(map(VIEWS[view], case(2, 37, 24, 16, 17, 9, torch.bfloat16))))

    def test_forced(self, launch, monkeypatch):
        args = case(1, 20, 16, 8, 8, 4, torch.bfloat16)
        monkeypatch.setattr(_device, "CUDA_PATH", "sm_80")
        self.check(launch, args)
        assert launch.archs == [80]
        monkeypatch.setattr(_device, "CUDA_PATH", "sm_75")
        with pytest.raises(RuntimeError, match="LOGRA_KERNELS_CUDA_PATH is 'sm_75'; it must be"):
            launch.call(*args, None, None)

    @pytest.mark.parametrize("dtype", ELEMENT, ids=str)
    def test_ragged(self, launch, dtype):
        self.check(launch, ragged(dtype, offsets=torch.int32))
        self.check(launch, (*ragged(dtype), position_weights(75)))

    def test_projected(self, launch):
        _, dy, _, p_out = case(3, 37, 8, 24, 8, 16, torch.bfloat16)
        self.check(launch, (torch.randn(3, 37, 12), dy, None, p_out))

    @pytest.mark.parametrize(("rows", "p"), MIXED)
    def test_factors_of_another_dtype(self, launch, rows, p):
        x, dy, p_in, p_out = case(2, 37, 40, 24, 16, 10)
        x, dy, p_in, p_out = x.to(rows), dy.to(rows), p_in.to(p), p_out.to(p)
        for args in ((x, dy, p_in, p_out), (x.float(), dy, None, p_out), (x, dy, p_in, None), (x, dy, None, p_out)):
            got = launch.call(*args, None, None)
            narrow = [v if factor is None else v.to(p) for v, factor in zip(args, args[2:], strict=False)]
            assert_as_good_as_naive(got, exactly(*narrow, *args[2:]), reference.project_grad(*args))

    @pytest.mark.parametrize("dtype", HALVES, ids=str)
    def test_sides_of_different_dtypes(self, launch, dtype):
        x, dy, p_in, p_out = case(2, 37, 40, 24, 16, 10)
        for args in (
            (x, dy.to(dtype), p_in, p_out.to(dtype)),
            (x.to(dtype), dy, p_in.to(dtype), p_out),
            (x.to(dtype), dy, None, p_out),
            (x.to(dtype), dy, None, None),
        ):
            self.check(launch, args)

    def test_samples_that_overlap(self, launch):
        dy, p_in, p_out = case(3, 37, 24, 16, 20, 10, torch.bfloat16)[1:]
        x = torch.randn(60, 24).bfloat16().as_strided((3, 37, 24), (24 * 8, 24, 1))
        self.check(launch, (x, dy, p_in, p_out))
        assert launch.archs == [80]

    def test_empty(self, launch):
        x, dy, p_in, p_out = case(2, 3, 8, 6, 4, 5)
        assert launch.call(x[:0], dy[:0], p_in, p_out, None, None).shape == (0, 5, 4)
        assert not launch.call(x[:, :0], dy[:, :0], p_in, p_out, None, None).any()

    def test_fp64_is_refused(self, launch):
        with pytest.raises(RuntimeError, match="'cuda' has no fp64 kernel"):
            launch.call(*case(2, 3, 8, 6, 4, 5, torch.float64), None, None)


def test_the_library_imports_without_a_driver():
    if _dispatch.cuda_error() is not None and NVCC is None:
        pytest.skip("no nvcc")
    assert _dispatch.cuda_error() is None


@is_built
@pytest.mark.parametrize("arch", ["80", "90a"])
def test_sums_stay_in_registers(arch):
    spilled = stacks("project_grad", arch)
    assert len(spilled) == 12 + 12 + 1
    assert not any(spilled.values())


@is_built
def test_sm_90a_has_wgmma_and_the_copy_engine():
    bodies = machine_code([name for name in stacks("project_grad", "90a") if "Sm90" in name], "90a")
    assert len(bodies) == 12
    assert all("HGMMA" in body and "UTMALDG" in body and "SYNCS" in body for body in bodies)


@is_built
def test_nothing_waits_for_wgmma_at_once():
    assert "serialized" not in said_by_nvcc()  # ptxas's word for it
