"""PCA of wide sides: what one pass captures of the exact eigenvectors' energy, and what it holds in memory."""

import weakref

import pytest
import torch
from stories260k import data_dir, load, stories
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from logra_kernels.nn import capture
from logra_kernels.projection import (
    Learned,
    Projection,
    SecondMoment,
    SideSpectrum,
    SketchedMoment,
    moment,
    side_spectra,
)

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    """Small eigendecompositions wait for each other's threads longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Held(TorchDispatchMode):
    """Bytes of the storages that operations made and that are still alive, and the most of them at any time."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {
            t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs or {})) if isinstance(t, torch.Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in known | self.known:
                storage = t.untyped_storage()
                self.known.add(storage.data_ptr())
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._gone, storage.data_ptr(), storage.nbytes())
        return out

    def _gone(self, address, nbytes):
        self.known.discard(address)
        self.now -= nbytes


def captured(rows, k, batch=256):
    """Energy of the sketch's k directions over that of the exact ones, and the moment."""
    sketch = SketchedMoment(rows.shape[1], k, CPU, torch.float32)
    for part in rows.split(batch):
        sketch.add(part)
    vectors, values = sketch.leading(k)
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(k), rtol=0, atol=1e-5)
    c = rows.double().T @ rows.double()
    exact = torch.linalg.eigvalsh(c).flip(0)[:k]
    assert bool((values <= exact * (1 + 1e-4) + 1e-6 * exact[0]).all())
    assert sketch.trace() == pytest.approx(float(c.trace()), rel=1e-5)
    return float((vectors.double() @ c * vectors.double()).sum() / exact.sum())


@pytest.mark.skipif(data_dir() is None, reason="needs the stories260K model (LOGRA_DATA)")
def test_real_activations_keep_99_percent_of_the_exact_energy():
    pytest.importorskip("transformers")
    model, tokenizer = load(data_dir())
    seen = {}
    for name, module in model.named_modules():
        if name in ("model.layers.1.mlp.down_proj", "model.layers.2.mlp.down_proj"):  # of the flattest spectra
            module.register_forward_hook(
                lambda m, x, y, name=name: seen.setdefault(name, []).append(x[0].flatten(0, 1))
            )
    with torch.no_grad():
        for story in stories(data_dir())[:20]:
            model(torch.tensor([[1, *tokenizer.encode(story)[:255]]]))
    assert len(seen) == 2
    for name, parts in seen.items():
        for k in (8, 32):
            assert captured(torch.cat(parts), k) >= 0.998, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_wide_side_needs_at_most_five_k_d_numbers(dtype):
    d, k, batch = 14336, 32, 64
    scale = torch.arange(1, d + 1, dtype=dtype) ** -0.7
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(batch, d, dtype=dtype, generator=generator) * scale for _ in range(6)]
    with Held() as held:
        wide = moment(d, k, CPU, dtype)
        for rows in batches:
            wide.add(rows)
        side = SideSpectrum.of(wide, k)
    assert side.factor.shape == (k, d)
    assert held.most <= 5 * k * d * dtype.itemsize
    assert held.most >= 3 * k * d * dtype.itemsize  # it did see the sketch


def test_narrow_sides_are_exact_and_wide_ones_sketched():
    assert isinstance(moment(1024, 64, CPU, torch.float32), SecondMoment)
    assert isinstance(moment(1025, 64, CPU, torch.float32), SketchedMoment)
    assert isinstance(moment(1500, 512, CPU, torch.float32), SecondMoment)


def test_fewer_directions_than_asked_for_are_filled_with_others():
    rows = torch.randn(20, 2000, generator=torch.Generator().manual_seed(1))
    assert captured(rows, 32) == pytest.approx(1.0, abs=1e-4)


def test_a_sketch_of_a_sketch_joins_two():
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(600, 1200, generator=generator) * torch.arange(1, 1201) ** -0.5
    whole, first, second = (SketchedMoment(1200, 16, CPU, torch.float32) for _ in range(3))
    whole.add(rows)
    first.add(rows[:300])
    second.add(rows[300:])
    first.join(second.parts)
    c = rows.double().T @ rows.double()
    mine, other = (float((v @ c * v).sum()) for v in (m.leading(16)[0].double() for m in (first, whole)))
    assert mine == pytest.approx(other, rel=0.01)


def test_nan_is_said():
    sketch = SketchedMoment(1200, 4, CPU, torch.float32)
    sketch.add(torch.full((3, 1200), torch.nan))
    assert not sketch.isfinite()
    with pytest.raises(ValueError, match="made for 4 eigenvectors"):
        sketch.leading(5)


def test_a_wide_layer_is_observed_by_its_sketch():
    torch.manual_seed(3)
    layer = nn.Linear(1300, 6)
    x = torch.randn(50, 3, 1300) * torch.arange(1, 1301) ** -0.8
    with capture(nn.Sequential(layer), Projection(4)) as taps, taps.covariances(whole=("in", "out"), rank=4) as seen:
        nn.functional.mse_loss(layer(x), torch.zeros(50, 3, 6), reduction="sum").backward()
    spectra = seen.spectra()
    flat = x.flatten(0, 1).double()
    p = spectra["0", "in"].factor.double()
    exact = torch.linalg.eigvalsh(flat @ flat.T).flip(0)[:4].sum()
    assert float((flat @ p.T).square().sum()) >= 0.99 * float(exact)


@pytest.mark.parametrize("dim", [96, 1500])
def test_moments_of_two_processes_joined_are_that_of_all_rows(dim):
    rows = torch.randn(400, 12) @ torch.randn(12, dim) + 0.05 * torch.randn(400, dim)
    first, second = (moment(dim, 8, CPU, torch.float32) for _ in range(2))
    assert isinstance(first, SketchedMoment) == (dim > 1024)
    first.add(rows[:250])
    second.add(rows[250:])
    first.join([part.clone() for part in second.parts])
    assert first.trace() == pytest.approx(float(rows.double().square().sum()), rel=1e-5)
    vectors, values = first.leading(8)
    exact = torch.linalg.svdvals(rows.double())[:8].square()
    torch.testing.assert_close(values, exact, rtol=1e-3, atol=0)
    kept = (rows.double() @ vectors.double().T).square().sum()
    assert float(kept / exact.sum()) >= 0.999


@pytest.mark.parametrize("batch", [8, 100, 2400])
@pytest.mark.parametrize("kind", ["one direction outweighs all", "classes in turn", "the same row", "nothing"])
def test_rows_of_every_kind(kind, batch):
    generator = torch.Generator().manual_seed(4)
    d, k = 1200, 16
    rows = torch.randn(2400, d, generator=generator) * torch.arange(1, d + 1) ** -0.5
    if kind == "one direction outweighs all":
        rows[:, 7] += 300
    elif kind == "classes in turn":  # the later ones are not to be seen in what came before
        rows *= 0.1
        for i in range(4):
            part = slice(600 * i, 600 * (i + 1))
            rows[part, :300], rows[part, 300 * i : 300 * (i + 1)] = 0, rows[part, :300].clone()
            rows[part, 300 * i : 300 * i + 3] += torch.randn(600, 3, generator=generator) * (1 + i)
    else:
        rows[:] = rows[0] if kind == "the same row" else 0
    sketch = SketchedMoment(d, k, CPU, torch.float32)
    for part in rows.split(batch):
        sketch.add(part)
    vectors, values = sketch.leading(k)
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(k), rtol=0, atol=1e-5)
    exact, directions = torch.linalg.eigh(rows.double().T @ rows.double())
    energy = exact.flip(0)[:k]
    assert bool((values <= energy * (1 + 1e-4) + 1e-6 * energy[0]).all())
    mine = (rows.double() @ vectors.double().T).square().sum()
    if kind == "one direction outweighs all":  # which hides no other
        mine = mine - energy[0] * (vectors.double() @ directions[:, -1]).square().sum()
        energy = energy[1:]
    assert float(mine) >= 0.99 * float(energy.sum())


def test_nothing_hangs_on_chance():
    rows = torch.randn(500, 1100, generator=torch.Generator().manual_seed(5))
    first, second = (SketchedMoment(1100, 8, CPU, torch.float32) for _ in range(2))
    for part in rows.split(30):
        first.add(part)
        torch.randn(3)
        second.add(part)
    assert first.equals(second)
    assert torch.equal(first.leading(8)[0], second.leading(8)[0])
    second.add(rows[:1])
    assert not first.equals(second)


@pytest.mark.parametrize("dim", [96, 1500])
def test_moments_of_the_same_numbers_are_solved_once(dim, monkeypatch):
    rows, solved = torch.randn(100, dim), []
    moments = {(name, "in"): moment(dim, 8, CPU, torch.float32) for name in "qkvo"}
    kind = type(moments["q", "in"])
    leading = kind.leading
    monkeypatch.setattr(kind, "leading", lambda self, k: (solved.append(k), leading(self, k))[1])
    for (name, _), one in moments.items():
        one.add(rows.flip(1) if name == "o" else rows)  # of the same trace
    sides = side_spectra(moments, 8)
    assert solved == [8, 8]
    assert sides["q", "in"] is sides["k", "in"] is sides["v", "in"]
    for key, one in moments.items():
        assert torch.equal(sides[key].factor, SideSpectrum.of(one, 8).factor)
    learned = Learned.restore(Learned.of(sides, {}).state(), {})
    assert learned["q", "in"] is learned["v", "in"]
    assert learned["q", "in"] is not learned["o", "in"]


def test_a_process_that_saw_nothing_joins_others():
    rows = torch.randn(300, 1100) * torch.arange(1, 1101) ** -1.0
    nothing, some, whole = (SketchedMoment(1100, 4, CPU, torch.float32) for _ in range(3))
    nothing.add(rows[:0])
    some.add(rows)
    whole.add(rows)
    some.join(nothing.parts)
    nothing.join(whole.parts)
    exact = torch.linalg.svdvals(rows.double())[:4].square()
    for one in (some, nothing):
        torch.testing.assert_close(one.leading(4)[1], exact, rtol=1e-2, atol=0)
        assert one.trace() == pytest.approx(whole.trace())


def test_numbers_too_large_for_the_sums_are_said():
    sketch = SketchedMoment(1200, 4, CPU, torch.float32)
    sketch.add(torch.full((3, 1200), 1e18))
    assert not sketch.isfinite()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu():
    device = torch.device("cuda")
    scale = torch.arange(1, 1501) ** -0.6
    batches = [torch.randn(500, 1500) * scale for _ in range(6)]
    sketch = SketchedMoment(1500, 32, device, torch.float32)
    for rows in batches:
        sketch.add(rows.to(device))
    vectors, values = sketch.leading(32)
    rows = torch.cat(batches).double()
    exact = torch.linalg.svdvals(rows)[:32].square()
    assert bool((values <= exact * (1 + 1e-3)).all())
    assert float((rows @ vectors.double().T).square().sum()) >= 0.99 * float(exact.sum())
