"""Stores that keep factors of each layer: what they hold, and that they are scored without being rebuilt."""

import pytest
import torch

import logra_kernels as lk
from logra_kernels.errors import StoreError, StoreMismatch
from logra_kernels.store import merge, quantization_loss, quantize

LAYERS = {"a": (20, 33), "b": (16, 16)}
DIM, N = 20 * 33 + 16 * 16, 90
FORMATS = {"fp32": 1e-3, "bf16": 1e-2, "fp16": 2e-3, "int8": 3e-2, "int4": 0.4}  # error of a row against its factors'


def rows_of(n=N):
    return torch.randn(n, DIM)


def names(n=N):
    return [f"r{i}" for i in range(n)]


def made(path, rows, dtype="fp32", rank_c=2, **settings):
    with lk.GradientStore.create(path, LAYERS, dtype, rank_c=rank_c, **settings) as store:
        store.append(rows, names(len(rows)))
    return lk.GradientStore.open(path)


@pytest.mark.parametrize("dtype", FORMATS)
def test_holds_the_best_factors_in_any_format(tmp_path, dtype):
    rows = rows_of()
    store = made(tmp_path / "s", rows, dtype)
    layers = list(LAYERS.values())
    best = lk.rebuild_rows(lk.factor_rows(rows, layers, 2, backend="reference"), layers, 2)
    error = (store.read(0, N) - best).norm() / best.norm()
    assert error <= FORMATS[dtype]
    assert (store.rank_c, store.dim, len(store)) == (2, DIM, N)
    assert store.manifest.width == 2 * (20 + 33 + 16 + 16)
    assert store.nbytes < 0.5 * N * DIM * store.format.bits / 8 + 8192
    found = torch.cat([block for _, block in store.blocks(max_bytes=20 * DIM * 4)])
    assert torch.equal(found, store.read(0, N))


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("q", [1, 30])
def test_scores_are_those_of_the_rows_it_stands_for(tmp_path, dtype, q):
    store = made(tmp_path / "s", rows_of(), dtype, rows_per_shard=40)
    queries, scale = torch.randn(q, DIM), torch.rand(N) + 0.5
    exact = queries.double() @ store.read(0, N).double().T
    torch.testing.assert_close(store.score(queries).double(), exact, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(store.score(queries, scale).double(), exact * scale, rtol=1e-4, atol=1e-3)
    for largest in (True, False):
        for row_scale in (None, scale):
            scores = store.score(queries, row_scale)
            order = torch.sort(scores if largest else -scores, dim=1, descending=True, stable=True).indices[:, :7]
            for max_bytes in (None, 11 * store.manifest.row_bytes):
                values, index = store.topk(queries, 7, row_scale, largest, max_bytes=max_bytes)
                assert torch.equal(index, order)
                assert torch.equal(values, scores.gather(1, order))


def test_topk_of_ties_and_zeros_goes_by_row(tmp_path):
    rows = torch.zeros(N, DIM)
    rows[30] = rows[70] = torch.randn(DIM)
    store = made(tmp_path / "s", rows)
    query = rows[30:31]
    assert store.topk(query, 4)[1].tolist() == [[30, 70, 0, 1]]
    assert store.topk(-query, 4)[1].tolist() == [[0, 1, 2, 3]]
    assert store.topk(query, 200)[1].shape == (1, N)
    bad = query.clone()
    bad[0, 0] = float("nan")
    values, index = store.topk(bad, 3)
    assert values.isnan().all()
    assert index.tolist() == [[0, 1, 2]]


def test_is_appended_to_deleted_from_and_compacted(tmp_path):
    rows = rows_of()
    made(tmp_path / "s", rows[:50], rows_per_shard=32)
    with lk.GradientStore.open(tmp_path / "s", mode="append") as store:
        store.append(rows[50:], names()[50:])
        store.delete(["r3", "r60"])
        before = store.read(0, N - 2)
        store.compact()
        assert torch.equal(store.read(0, N - 2), before)
    whole = made(tmp_path / "t", rows)
    kept = [i for i in range(N) if i not in (3, 60)]
    assert torch.equal(before, whole.read(0, N)[kept])


def test_what_is_not_finite_is_refused(tmp_path):
    rows = rows_of(5)
    rows[2, 700] = float("inf")
    with (
        lk.GradientStore.create(tmp_path / "s", LAYERS, rank_c=1) as store,
        pytest.raises(StoreError, match="1 rows hold NaN or Inf: ids 'r2', layers b"),
    ):
        store.append(rows, names(5))


def test_rank_is_checked(tmp_path):
    for rank in (0, 9, 1.0):
        with pytest.raises(StoreError, match=f"rank_c is {rank!r}; it must be 1 to 8"):
            lk.GradientStore.create(tmp_path / "s", LAYERS, rank_c=rank)
    with pytest.raises(StoreError, match="rank_c 8 keeps 512 numbers of rows of 512"):
        lk.GradientStore.create(tmp_path / "s", {"a": (16, 16), "b": (16, 16)}, rank_c=8).close()


def test_rank_is_part_of_what_a_store_is(tmp_path):
    rows = rows_of(3)
    one, two, dense = (made(tmp_path / str(rank), rows, rank_c=rank) for rank in (1, 2, None))
    assert len({one.content_hash, two.content_hash, dense.content_hash}) == 3
    assert dense.rank_c is None
    with pytest.raises(StoreMismatch, match=r"rank_c \(1 in .*, 2 in .*\)"):
        merge([tmp_path / "1", tmp_path / "2"], tmp_path / "m")


def test_quantize_to_factors_records_what_it_keeps(tmp_path):
    rows = rows_of()
    made(tmp_path / "dense", rows, rank_c=None)
    store = quantize(tmp_path / "dense", tmp_path / "q", "int8", rank_c=2)
    loss, kept = quantization_loss(store), store.read(0, N).double()
    assert (store.rank_c, store.dtype, store.ids) == (2, "int8", names())
    assert loss["relative_l2"] == pytest.approx(((kept - rows).norm() / rows.double().norm()).item())
    for name, part in store.slices.items():
        lost = (kept - rows)[:, part].square().sum() / rows[:, part].double().square().sum()
        assert loss["energy_kept"][name] == pytest.approx(1 - lost.item())
    again = quantize(tmp_path / "q", tmp_path / "again", "fp32")
    assert again.rank_c == 2
    torch.testing.assert_close(again.read(0, N), store.read(0, N), rtol=1e-3, atol=1e-4)


def test_run_keeps_factors_and_goes_on_with_them(tmp_path):
    model = torch.nn.Linear(30, 24)
    projection = lk.Projection(rank=16, kind="orthonormal")
    x = torch.randn(12, 30)

    def log(run, part, ids):
        with run.log(ids=ids):
            model(x[part]).square().sum().backward()

    with lk.Run(tmp_path / "s", model, projection=projection, rank_c=1) as run:
        log(run, slice(0, 6), names(6))
    with lk.Run(tmp_path / "s", model) as run:
        log(run, slice(6, 12), [f"q{i}" for i in range(6)])
        run.finalize()
        with run.query(ids=["q"]) as query:
            model(x[:1]).square().sum().backward()
        top = run.topk(query, k=3, mode="dot")
    assert lk.GradientStore.open(tmp_path / "s").rank_c == 1
    assert top.values.shape == (1, 3)
    # one position a sample: G has rank 1, and nothing is lost
    with lk.Run(tmp_path / "dense", model, projection=projection) as run:
        log(run, slice(0, 12), names(12))
    stored, dense = (lk.GradientStore.open(tmp_path / name).read(0, 12) for name in ("s", "dense"))
    torch.testing.assert_close(stored, dense, rtol=1e-3, atol=1e-4 * dense.abs().max().item())
    with pytest.raises(StoreMismatch, match=r"rank_c \(1 there, 2 here\)"):
        lk.Run(tmp_path / "s", model, rank_c=2)
