import itertools

import pytest
import torch
from ops.views import VIEWS, far_apart
from tolerance import assert_as_good_as_naive

import logra_kernels as lk
from logra_kernels import _C
from logra_kernels.ops import row_projector
from logra_kernels.ops.project_grad import op, reference

SHAPES = [  # N T d_in d_out k_in k_out
    (1, 1, 16, 16, 16, 16),
    (3, 37, 40, 32, 16, 24),
    (2, 70, 131, 96, 33, 17),
    (2, 9, 24, 33, 1, 1),
    (1, 5, 1, 1, 1, 1),
    (2, 6, 145, 133, 140, 130),
]
MIXED = [  # dtype of the rows, and of the projections that they are multiplied with
    pytest.param(torch.float32, torch.bfloat16, id="rounded"),
    pytest.param(torch.bfloat16, torch.float32, id="bf16-wide"),
    pytest.param(torch.float16, torch.float32, id="fp16-wide"),
]
CUTS = [0, 0, 5, 5, 42, 70, 73]  # samples of 0, 5, 0, 37, 28, 3 positions


def case(n, t, d_in, d_out, k_in, k_out, dtype=torch.float32, device="cpu"):
    def draw(*shape):
        return torch.randn(*shape, device=device)

    x, dy, p_in, p_out = draw(n, t, d_in), draw(n, t, d_out), draw(k_in, d_in) / d_in**0.5, draw(k_out, d_out)
    return tuple(v.to(dtype) for v in (x, dy, p_in, p_out / d_out**0.5))


def ragged(dtype=torch.float32, device="cpu", offsets=torch.int64):
    """75 positions, of which the last two belong to no sample."""
    x, dy, p_in, p_out = case(1, 75, 40, 24, 16, 10, dtype, device)
    return x[0], dy[0], p_in, p_out, torch.tensor(CUTS, dtype=offsets, device=device)


def position_weights(*shape, dtype=torch.float32, device="cpu"):
    weights = torch.rand(*shape, device=device, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return torch.where(weights < 0.3, 0, weights)


def exactly(*args):
    wide = (None if v is None else v.double() if v.is_floating_point() else v for v in args)
    return reference.project_grad(*wide)


def check(target, *args):
    got = lk.project_grad(*args, backend=target.backend)
    assert_as_good_as_naive(got, exactly(*args), reference.project_grad(*args))
    return got


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_matches_fp64(target, dtype, shape):
    got = check(target, *case(*shape, dtype, target.device))
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("given", ["p_in", "p_out", "neither"])
def test_projected_already(target, dtype, given):
    x, dy, p_in, p_out = case(3, 37, 21, 13, 10, 7, dtype, target.device)
    check(target, x, dy, p_in if given == "p_in" else None, p_out if given == "p_out" else None)


@pytest.mark.parametrize("ragged", [False, True])
def test_columns_of_a_shared_projection(target, dtype, ragged):
    _, dy, _, p_out = case(3, 37, 21, 40, 10, 7, dtype, target.device)
    a = torch.randn(3, 37, 30, dtype=torch.promote_types(dtype, torch.float32), device=target.device)
    for columns in (a[..., :11], a[..., 11:30]):
        if ragged:
            check(target, columns.flatten(0, 1), dy.flatten(0, 1), None, p_out, torch.arange(4, device=a.device) * 37)
        else:
            check(target, columns, dy, None, p_out)


@pytest.mark.parametrize(("rows", "p"), MIXED)
@pytest.mark.parametrize("cut", [False, True], ids=["dense", "ragged"])
def test_multiplies_in_the_dtype_of_the_projections(target, rows, p, cut):
    x, dy, p_in, p_out = case(3, 37, 40, 300, 16, 10, device=target.device)
    x, dy, p_in, p_out = x.to(rows), dy.to(rows), p_in.to(p), p_out.to(p)
    weights = position_weights(3, 37, device=target.device)
    rest = (None, weights)
    if cut:
        x, dy = x.flatten(0, 1), dy.flatten(0, 1)
        rest = (torch.tensor([0, 9, 9, 111], device=target.device), weights.flatten())
    got = lk.project_grad(x, dy, p_in, p_out, *rest, backend=target.backend)
    assert_as_good_as_naive(
        got, exactly(x.to(p), dy.to(p), p_in, p_out, *rest), reference.project_grad(x, dy, p_in, p_out, *rest)
    )
    rounded = lk.project_grad(x.to(p), dy.to(p), p_in, p_out, *rest, backend=target.backend)
    torch.testing.assert_close(got, rounded, rtol=1e-5, atol=1e-5)
    one, other = (lk.project_grad(x.float(), v, None, p_out, *rest, backend=target.backend) for v in (dy, dy.to(p)))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("project_out", [True, False])
def test_fp32_x_beside_half_dy(target, half, project_out):
    _, dy, _, p_out = case(3, 37, 8, 24, 8, 16, half, target.device)
    x = torch.randn(3, 37, 12, device=target.device)
    check(target, x, dy, None, p_out if project_out else None)


@pytest.mark.parametrize("rows", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("p", [torch.float32, torch.bfloat16], ids=["p-fp32", "p-bf16"])
def test_projected_x_kept_in_what_it_is_rounded_to_gives_the_same_bits(rows, p):
    x, dy, p_in, p_out = case(3, 37, 40, 300, 16, 10)
    x, dy, p_in, p_out = x.to(rows), dy.to(rows), p_in.to(p), p_out.to(p)
    dtype = op.kept_dtype(dy.dtype, p_out)
    assert dtype == (torch.bfloat16 if p == torch.bfloat16 and _C.multiplies_bf16() else torch.float32)
    kept = row_projector(x, p_in, dtype)(x)
    assert kept.dtype == dtype
    g, wide = torch.empty(2, 3, 10, 16)
    op.add_project_grad(kept, dy, None, p_out)(kept, dy.flatten(0, 1), g, False)
    a = lk.project_rows(x, p_in)
    op.add_project_grad(a, dy, None, p_out)(a, dy.flatten(0, 1), wide, False)
    assert torch.equal(g, wide)
    torch.testing.assert_close(g, lk.project_grad(x, dy, p_in, p_out), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("view", VIEWS)
def test_strides(target, dtype, view):
    x, dy, p_in, p_out = map(VIEWS[view], case(3, 19, 37, 21, 11, 9, dtype, target.device))
    check(target, x, dy, p_in, p_out, None, VIEWS[view](position_weights(3, 19, dtype=dtype, device=target.device)))
    check(target, x, dy[..., :11], None, None)


@pytest.mark.parametrize("view", VIEWS)
def test_ragged_strides(target, view):
    x, dy, p_in, p_out, offsets = ragged(device=target.device)
    offsets = torch.stack([offsets, offsets * 0 - 1], dim=1)[:, 0]
    weights = torch.stack([position_weights(75, device=target.device)] * 2, dim=1)[:, 0]
    check(target, *map(VIEWS[view], (x, dy, p_in, p_out)), offsets, weights)


def test_expanded(target):
    x, dy, p_in, p_out = case(1, 1, 40, 24, 16, 8, device=target.device)
    weights = torch.full((1, 1), 0.5, device=target.device).expand(3, 20)
    check(target, x.expand(3, 20, 40), dy.expand(3, 20, 24), p_in, p_out, None, weights)


def test_far_apart_rows(target):
    x, dy, p_in, p_out = case(1, 2100, 8, 8, 4, 4, device=target.device)
    offsets = torch.tensor([0, 2000, 2100], device=target.device)
    check(target, far_apart(x[0]), far_apart(dy[0]), p_in, p_out, offsets)


@pytest.mark.parametrize(
    "shape", [(0, 5, 8, 8, 4, 4), (2, 0, 8, 8, 4, 4), (2, 5, 8, 8, 0, 4), (2, 5, 8, 0, 4, 0)], ids=["N", "T", "k", "d"]
)
def test_empty(target, shape):
    n, t, d_in, d_out, k_in, k_out = shape
    x, dy = torch.zeros(n, t, d_in, device=target.device), torch.zeros(n, t, d_out, device=target.device)
    p_in, p_out = torch.zeros(k_in, d_in, device=target.device), torch.zeros(k_out, d_out, device=target.device)
    got = lk.project_grad(x, dy, p_in, p_out, backend=target.backend)
    assert got.shape == (n, k_out, k_in)
    assert not got.any()


@pytest.mark.parametrize("cuts", [[0], [0, 0], [3, 3, 3], [2, 5]], ids=str)
def test_ragged_and_nearly_empty(target, cuts):
    x, dy, p_in, p_out, _ = ragged(device=target.device)
    check(target, x, dy, p_in, p_out, torch.tensor(cuts, device=target.device))


@pytest.mark.parametrize("weighted", [False, True])
def test_ragged_is_a_loop_over_samples(target, dtype, weighted):
    x, dy, p_in, p_out, cuts = ragged(dtype, target.device, torch.int32 if weighted else torch.int64)
    weights = position_weights(75, dtype=dtype, device=target.device) if weighted else None
    got = check(target, x, dy, p_in, p_out, cuts, weights)
    for n, (a, b) in enumerate(itertools.pairwise(CUTS)):
        w = None if weights is None else weights[None, a:b]
        alone = lk.project_grad(x[None, a:b], dy[None, a:b], p_in, p_out, None, w, backend=target.backend)
        torch.testing.assert_close(got[n], alone[0], rtol=1e-5, atol=1e-5)


def test_weights_match_fp64(target, dtype):
    args = case(3, 37, 40, 24, 16, 10, dtype, target.device)
    check(target, *args, None, position_weights(3, 37, dtype=dtype, device=target.device) - 0.5)


def test_weights_of_zero_and_one_are_masking(target):
    x, dy, p_in, p_out = case(2, 21, 40, 24, 16, 8, device=target.device)
    kept = torch.rand(2, 21, device=target.device) < 0.5
    got = lk.project_grad(x, dy, p_in, p_out, None, kept.float(), backend=target.backend)
    for n in range(2):
        alone = lk.project_grad(x[n][kept[n]][None], dy[n][kept[n]][None], p_in, p_out, backend=target.backend)
        torch.testing.assert_close(got[n], alone[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("projected", [False, True])
def test_weight_zero_hides_whatever_is_there(target, dtype, poison, projected):
    x, dy, p_in, p_out = case(2, 21, 16, 12, 16, 12, dtype, target.device)
    weights = position_weights(2, 21, dtype=dtype, device=target.device)
    weights[0, 3] = 0
    factors = (None, None) if projected else (p_in, p_out)
    clean = lk.project_grad(x, dy, *factors, None, weights, backend=target.backend)
    x[weights == 0], dy[weights == 0] = poison, poison
    assert torch.equal(lk.project_grad(x, dy, *factors, None, weights, backend=target.backend), clean)


def test_nan_stays_in_its_sample(target):
    x, dy, p_in, p_out, offsets = ragged(device=target.device)
    x[41, 0] = float("nan")
    bad = lk.project_grad(x, dy, p_in, p_out, offsets, backend=target.backend).isnan()
    assert bad[3].all()
    assert bad.sum() == bad[3].numel()


@pytest.mark.parametrize("shape", [(1, 301, 64, 48, 32, 24), (5, 77, 64, 48, 32, 24)], ids=["one", "several"])
def test_same_bits_for_any_thread_count(dtype, threads, shape):
    args = case(*shape, dtype)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(lk.project_grad(*args, backend="cpp"))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_same_bits_again(target, dtype):
    args = case(2, 65, 70, 40, 20, 24, dtype, target.device)
    first, second = (lk.project_grad(*args, backend=target.backend) for _ in range(2))
    assert torch.equal(first, second)


def test_does_not_depend_on_the_batch(target):
    x, dy, p_in, p_out = case(4, 33, 40, 24, 16, 16, device=target.device)
    whole = lk.project_grad(x, dy, p_in, p_out, backend=target.backend)
    parts = [lk.project_grad(x[i : i + 1], dy[i : i + 1], p_in, p_out, backend=target.backend) for i in range(4)]
    torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-6, atol=1e-5)


def test_registration(device, dtype):
    torch.library.opcheck(op._op, (*case(3, 7, 20, 12, 5, 6, dtype, device), None, None, "auto"))
    args = ragged(dtype, device)
    torch.library.opcheck(op._op, (*args, position_weights(75, dtype=dtype, device=device), "auto"))


@pytest.mark.parametrize("cut", [False, True], ids=["dense", "ragged"])
def test_compiles_without_a_graph_break(device, cut):
    compiled = torch.compile(lk.project_grad, fullgraph=True, dynamic=True, backend="aot_eager")
    for n, t in ((2, 9), (3, 17)):
        x, dy, p_in, p_out = case(n, t, 16, 12, 5, 6, device=device)
        args = (x[0], dy[0], p_in, p_out, torch.tensor([0, n, t], device=device)) if cut else (x, dy, p_in, p_out)
        torch.testing.assert_close(compiled(*args), lk.project_grad(*args))


BAD = {  # what to change in (x, dy, p_in, p_out, offsets, weights), and what the message must name
    "T": (lambda a: a | {"dy": a["dy"][:, 1:]}, r"x \(2, 3, 8\) and dy \(2, 2, 6\)"),
    "layout": (lambda a: a | {"offsets": torch.tensor([0, 2])}, r"x \(2, 3, 8\) .* must both be \[R, d\]"),
    "p_in": (lambda a: a | {"p_in": a["p_in"][:, 1:]}, r"p_in \(4, 7\) must be \[k_in, 8\]"),
    "p_out": (lambda a: a | {"p_out": a["p_out"][0]}, r"p_out \(6,\) must be \[k_out, 6\]"),
    "p_in dtype": (lambda a: a | {"p_in": a["p_in"].half()}, "x is torch.float32 and p_in is torch.float16"),
    "p_out dtype": (lambda a: a | {"p_out": a["p_out"].half()}, "dy is torch.float32 and p_out is torch.float16"),
    "x dtype": (lambda a: a | {"x": a["x"].half(), "p_in": None}, "x is torch.float16 and dy is torch.float32"),
    "k_in": (lambda a: a | {"p_in": torch.ones(9, 8)}, r"p_in \(9, 8\) .* x \(2, 3, 8\) .* k_in <= d"),
    "k_out": (lambda a: a | {"p_out": torch.ones(7, 6)}, r"p_out \(7, 6\) .* dy \(2, 3, 6\) .* k_out <= d"),
    "complex": (lambda a: a | {"x": a["x"].to(torch.complex64)}, "x is torch.complex64"),
    "devices of the projection": (lambda a: a | {"p_out": a["p_out"].to("meta")}, "p_out is on meta"),
    "integer": (lambda a: a | {"dy": a["dy"].long()}, "dy is torch.int64"),
    "device": (lambda a: a | {"dy": a["dy"].to("meta")}, "dy is on meta"),
    "weights": (lambda a: a | {"weights": torch.ones(2, 4)}, r"weights \(2, 4\) must be \(2, 3\)"),
    "weights dtype": (lambda a: a | {"weights": torch.ones(2, 3).double()}, "weights is torch.float64"),
}
BAD_CUTS = {
    "decrease": (torch.tensor([0, 3, 2]), "must not decrease"),
    "below": (torch.tensor([-1, 3]), "stay within 0..3"),
    "beyond": (torch.tensor([0, 4]), "stay within 0..3"),
    "none": (torch.tensor([], dtype=torch.int64), r"offsets \(0,\)"),
    "two-dimensional": (torch.tensor([[0, 3]]), r"offsets \(1, 2\)"),
    "float": (torch.tensor([0.0, 3.0]), r"torch.float32 must be \[N\+1\] int32 or int64"),
    "complex": (torch.tensor([0j, 3]), r"torch.complex64 must be \[N\+1\] int32 or int64"),
    "bool": (torch.tensor([False, True]), r"torch.bool must be \[N\+1\] int32 or int64"),
    "device": (torch.tensor([0, 3], device="meta"), "offsets is on meta"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_raises(bad):
    change, message = BAD[bad]
    good = dict(zip(("x", "dy", "p_in", "p_out"), case(2, 3, 8, 6, 4, 5), strict=True))
    with pytest.raises(ValueError, match=f"project_grad: .*{message}"):
        lk.project_grad(**change(good))


@pytest.mark.parametrize("bad", BAD_CUTS)
def test_bad_offsets_raise(bad):
    offsets, message = BAD_CUTS[bad]
    x, dy, p_in, p_out = case(1, 3, 8, 6, 4, 5)
    with pytest.raises(ValueError, match=f"project_grad: .*{message}"):
        lk.project_grad(x[0], dy[0], p_in, p_out, offsets)


def test_offsets_that_were_changed_are_checked_again():
    x, dy, p_in, p_out = case(1, 3, 8, 6, 4, 5)
    offsets = torch.tensor([0, 3])
    lk.project_grad(x[0], dy[0], p_in, p_out, offsets)
    offsets[1] = 4
    with pytest.raises(ValueError, match="stay within 0..3"):
        lk.project_grad(x[0], dy[0], p_in, p_out, offsets)
    offsets[1] = 3
    lk.project_grad(x[0], dy[0], p_in, p_out, offsets)
    with pytest.raises(ValueError, match="stay within 0..2"):
        lk.project_grad(x[0, :2], dy[0, :2], p_in, p_out, offsets)


def test_unavailable_backend_raises():
    with pytest.raises(RuntimeError, match="project_grad: backend 'cublas' is not available here"):
        lk.project_grad(*case(2, 3, 8, 6, 4, 5), backend="cublas")
