import hashlib
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

import logra_kernels as lk
from logra_kernels.projection import draw, normal, orthonormal, philox
from logra_kernels.projection.philox import by_products

RANDOM = ["orthonormal", "gaussian", "rademacher", "kaiming", "mask", "sjlt"]


def test_same_settings_same_factors_in_another_process():
    code = (
        "import logra_kernels as lk, hashlib;"
        f"factors = [lk.Projection(rank=8, kind=kind, seed=5).factor('h.0.mlp', 'in', 33) for kind in {RANDOM}];"
        "print(*(hashlib.sha256(p.numpy().tobytes()).hexdigest() for p in factors))"
    )
    here = [lk.Projection(rank=8, kind=kind, seed=5).factor("h.0.mlp", "in", 33) for kind in RANDOM]
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert [hashlib.sha256(p.numpy().tobytes()).hexdigest() for p in here] == there


@pytest.mark.parametrize("kind", RANDOM)
def test_name_side_and_seed_each_change_the_factors(kind):
    base = lk.Projection(rank=4, kind=kind, seed=0).factor("a", "in", 32)
    for other in (
        lk.Projection(rank=4, kind=kind, seed=1).factor("a", "in", 32),
        lk.Projection(rank=4, kind=kind, seed=0).factor("b", "in", 32),
        lk.Projection(rank=4, kind=kind, seed=0).factor("a", "out", 32),
    ):
        assert not torch.equal(base, other)


def test_orthonormal_rows():
    p = lk.Projection(rank=16).factor("a", "in", 100).double()
    torch.testing.assert_close(p @ p.T, torch.eye(16, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["gaussian", "rademacher", "mask", "sjlt"])
def test_random_factors_keep_norms_on_average(kind):
    x = torch.randn(64, dtype=torch.float64)
    norms = [
        (lk.Projection(rank=32, kind=kind, seed=s).factor("a", "in", 64).double() @ x).square().sum()
        for s in range(200)
    ]
    assert torch.stack(norms).mean() / x.square().sum() == pytest.approx(1.0, abs=0.06)  # s.e. sqrt(2/32/200) = 0.018


def test_gaussian_is_normal():
    p = lk.Projection(rank=64, kind="gaussian", seed=2).factor("a", "in", 4096).double() * 8
    assert p.mean().abs() < 0.01
    assert p.std() == pytest.approx(1.0, abs=0.01)
    assert (p**4).mean() == pytest.approx(3.0, abs=0.1)
    assert p.abs().max() < 7


def test_a_narrow_side_keeps_its_width():
    assert lk.Projection(rank=64).factor("a", "out", 10).shape == (10, 10)
    assert lk.Projection(kind="identity").factor("a", "out", 10) is None
    assert lk.Projection(kind="identity").width(10, "out") == 10


def test_settings_survive_the_manifest():
    projection = lk.Projection(rank=3, kind="gaussian", seed=9)
    assert lk.Projection.from_dict(projection.to_dict()) == projection
    for other in (lk.Projection(kind=("mask", "sjlt"), nonzeros=3), lk.Projection(kind="sjlt", nonzeros=2)):
        assert lk.Projection.from_dict(json.loads(json.dumps(other.to_dict()))) == other
    with pytest.raises(ValueError, match="generator 99"):
        lk.Projection.from_dict({**projection.to_dict(), "generator": 99})


def test_known_numbers():
    """The drawn numbers are part of the store's format: this may only change together with the generator's number."""
    known = [[0.4172852635, 0.1369137317, -0.2963460386], [-0.5518770218, -1.0385932922, -0.7111034393]]
    p = lk.Projection(rank=2, kind="gaussian", seed=0).factor("layer", "in", 3).numpy()
    r = lk.Projection(rank=1, kind="rademacher", seed=0).factor("layer", "in", 8).numpy()
    np.testing.assert_allclose(p, known, rtol=1e-6)
    np.testing.assert_array_equal(r, [[1, -1, -1, 1, -1, -1, 1, 1]])


def test_known_orthonormal_numbers():
    known = [
        [0.3234927356, 0.1061398536, -0.2297368199, -0.4278325140, -0.8051503897],
        [-0.8635117412, 0.3515067101, -0.3014976382, -0.1446580738, -0.1377089024],
    ]
    p = lk.Projection(rank=2, seed=0).factor("layer", "in", 5).numpy()
    np.testing.assert_allclose(p, known, rtol=1e-6)


def test_the_generator_gives_numpys_bits_by_torchs_products():
    for name, first, count in (("a", 0, 1), ("0/h.1.mlp/in", 0, 1003), ("b", 96, 30)):
        key = np.frombuffer(hashlib.sha256(name.encode()).digest()[:16], dtype="<u8").astype(np.uint64)
        expected = torch.from_numpy(np.random.Philox(key=key).random_raw(first + count).view(np.int64))[first:]
        assert torch.equal(by_products(key, first, count, torch.device("cpu")), expected)


def test_normal_variates_are_box_mullers_to_the_last_places():
    got = normal.normals("x", 100_003, torch.device("cpu")).numpy()
    u, v = (normal.uniform(philox.words(s, len(got), torch.device("cpu"))).numpy() for s in ("x", "x/angle"))
    expected = np.sqrt(-2 * np.log(u)) * np.cos(2 * np.pi * v)
    assert np.abs(got - expected).max() < 8e-15
    largest = np.array([0.5, 2.0**53 - 0.5]) * 2.0**-53  # the ends of a uniform variate's range
    ends = normal._ln(torch.from_numpy(largest)).numpy()
    np.testing.assert_allclose(ends, np.log(largest), rtol=1e-15)
    assert (-2 * ends[0]) ** 0.5 < normal.BOUND


def test_normal_variates_are_operations_that_ieee_754_defines():
    """Python's scalar arithmetic, one operation at a time in the same order, gives the bits of torch's kernels."""

    def polynomial(coefficients, z):
        value = z * coefficients[-1]
        for c in coefficients[-2:0:-1]:
            value = (value + c) * z
        return value + coefficients[0]

    cpu = torch.device("cpu")
    u, v = (normal.uniform(philox.words(s, 2001, cpu)).tolist() for s in ("y", "y/angle"))
    expected = []
    for a, b in zip(u, v, strict=True):
        m, e = math.frexp(a)
        m, e = (m, e) if m >= math.sqrt(0.5) else (2 * m, e - 1)
        s = (m - 1.0) / (m + 1.0)
        ln = polynomial(normal._LN, s * s) * s + e * math.log(2.0)
        y = (abs(b - 0.5) - 0.25) * 4.0
        expected.append(math.sqrt(ln * -2.0) * (polynomial(normal._SIN, y * y) * y))
    assert normal.normals("y", 2001, cpu).tolist() == expected


@pytest.mark.parametrize(("k", "d"), [(1, 1), (7, 7), (16, 300), (40, 90), (64, 5000)])
def test_orthonormal_rows_do_not_depend_on_the_order_of_sums(k, d, monkeypatch):
    """Products summed in another order, blocked otherwise, or in integers give the same bits."""
    rows = normal.normals(f"{k}/{d}", k * d, torch.device("cpu")).reshape(k, d)
    expected = orthonormal.orthonormalise(rows.clone(), normal.BOUND)
    q, r = np.linalg.qr(rows.numpy().T)
    np.testing.assert_allclose(expected.numpy(), (q * np.sign(np.diag(r))).T, rtol=0, atol=1e-9)
    torch.testing.assert_close(expected @ expected.T, torch.eye(k, dtype=torch.float64), rtol=0, atol=2.0**-30)

    def in_integers(a, b):
        assert torch.equal(a, a.round())
        assert torch.equal(b, b.round())
        assert (a.abs() @ b.abs()).max() <= 2.0**53
        return (a.long() @ b.long()).double()

    def backwards(a, b):
        return a.flip(1).contiguous() @ b.flip(0).contiguous()

    for product in (in_integers, backwards):
        monkeypatch.setattr(orthonormal, "product", product)
        assert torch.equal(orthonormal.orthonormalise(rows.clone(), normal.BOUND), expected)
    monkeypatch.setitem(normal.PIECE, "cpu", 1)
    assert torch.equal(orthonormal.orthonormalise(rows.clone(), normal.BOUND), expected)


@pytest.mark.parametrize("apart", [1e-3, 1e-6, 1e-8, 1e-10])
def test_nearly_dependent_rows_are_made_orthonormal(apart):
    rows = torch.randn(12, 12, dtype=torch.float64)
    rows[-1] = rows[0] + apart * torch.randn(12, dtype=torch.float64)
    p = orthonormal.orthonormalise(rows, normal.BOUND)
    torch.testing.assert_close(p @ p.T, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", RANDOM)
def test_factors_made_as_a_device_makes_them_are_the_hosts(kind, monkeypatch):
    """Words by integer products, in pieces of other sizes: what a CUDA device runs, run here."""
    settings = (kind, 3, "h.0.mlp", "in", 16, 301, 4)
    expected = draw.draw(*settings)
    monkeypatch.setattr(philox, "HOST", "none")
    monkeypatch.setitem(normal.PIECE, "cpu", 1000)
    assert torch.equal(draw.draw(*settings), expected)
    assert draw.draw(*settings, torch.device("meta")).shape == (16, 301)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", RANDOM)
def test_factors_are_the_same_bits_on_a_gpu(kind):
    projection = lk.Projection(rank=16, kind=kind, nonzeros=4)
    assert torch.equal(projection.factor("a", "in", 300, "cuda").cpu(), projection.factor("a", "in", 300))


def test_a_mask_picks_different_features():
    p = lk.Projection(rank=16, kind="mask").factor("a", "in", 50)
    assert (p != 0).sum(1).tolist() == [1] * 16
    assert (p != 0).sum(0).max() == 1
    assert p.unique().tolist() == pytest.approx([0.0, (50 / 16) ** 0.5])
    assert torch.equal(lk.Projection(rank=16, kind="mask").factor("a", "in", 9), torch.eye(9))


@pytest.mark.parametrize(("k", "s"), [(16, 1), (16, 4), (10, 3), (8, 8)])
def test_sjlt_has_its_nonzeros_in_every_column(k, s):
    p = lk.Projection(rank=k, kind="sjlt", nonzeros=s).factor("a", "in", 4000)
    assert (p != 0).sum(0).unique().tolist() == [s]
    torch.testing.assert_close(p.abs().unique(), torch.tensor([0.0, s**-0.5]) if s < k else torch.tensor([s**-0.5]))
    expected = 4000 * s / k  # entries a row, and as many signs of either kind
    assert ((p != 0).sum(1) - expected).abs().max() < 6 * expected**0.5 + expected / 4 * (k % s > 0)
    assert p.sign().sum(1).abs().max() < 6 * expected**0.5


def test_kaiming_is_logixs():
    for side, bound in (("in", 300**-0.5), ("out", 16**-0.5)):
        p = lk.Projection(rank=16, kind="kaiming").factor("a", side, 300).double()
        assert p.abs().max() <= bound
        assert p.abs().max() > 0.99 * bound
        assert p.std() == pytest.approx(bound / 3**0.5, rel=0.03)


def test_bad_settings():
    with pytest.raises(ValueError, match="kind is 'pca2'"):
        lk.Projection(kind="pca2")
    with pytest.raises(ValueError, match="rank is 0"):
        lk.Projection(rank=0)
    with pytest.raises(ValueError, match="nonzeros is 9"):
        lk.Projection(rank=8, kind="sjlt", nonzeros=9)
    with pytest.raises(ValueError, match="one kind, or those of P_in and P_out"):
        lk.Projection(kind=("mask", "mask", "mask"))
