"""Stores that keep factors of each layer: what they hold, and that they are scored without being rebuilt."""

import json

import pytest
import torch

import logra_kernels as lk
from logra_kernels.errors import StoreError, StoreMismatch
from logra_kernels.ops import factored_dim
from logra_kernels.store import fsck, merge, quantization_loss, quantize

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
    assert store.manifest.width == (128 if store.format.scaled else 2 * (20 + 33)) + 2 * (16 + 16)
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


# norms of gradients that differ by orders of magnitude; u and v of unlike lengths
UNLIKE = {"loud": (6, 10), "faint": (40, 4), "whole": (48, 80), "tiny": (3, 64), "last": (12, 20)}
NORMS = [1e3, 1e-3, 1.0, 1e-1, 30.0]
EXACT = {"fp8": 0.999, "int8": 0.9995, "int4": 0.98, "int2": 0.4, "sign": 0.5}  # correlation of a layer's scores


def unlike(count=N):
    """Rows of rank 1 in each layer, and where each layer lies."""
    pieces = [
        norm * torch.einsum("no,ni->noi", torch.randn(count, o), torch.randn(count, i)).flatten(1)
        for (o, i), norm in zip(UNLIKE.values(), NORMS, strict=True)
    ]
    ends = torch.tensor([piece.shape[1] for piece in pieces]).cumsum(0).tolist()
    parts = dict(zip(UNLIKE, map(slice, [0, *ends[:-1]], ends), strict=True))
    return torch.cat(pieces, dim=1), parts


def written(path, rows, dtype, layers=None, rank_c=1, **settings):
    with lk.GradientStore.create(path, layers or UNLIKE, dtype, rank_c=rank_c, **settings) as store:
        store.append(rows, names(len(rows)))
    return lk.GradientStore.open(path)


def by_layer(queries, part):
    asked = torch.zeros_like(queries)
    asked[:, part] = queries[:, part]
    return asked


def correlation(a, b):
    return torch.corrcoef(torch.stack([a.double().flatten(), b.double().flatten()]))[0, 1].item()


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("block", [32, 128])
def test_no_layer_feels_its_neighbours(tmp_path, dtype, block):
    rows, parts = unlike()
    store = written(tmp_path / "s", rows, dtype, block=block, rows_per_shard=40)
    assert store.manifest.apart
    queries = torch.randn(7, rows.shape[1]) / rows.abs().mean(0)
    kept = store.read(0, N).double()
    for name, part in parts.items():
        asked = by_layer(queries, part)
        exact, scores = asked.double() @ rows.double().T, store.score(asked)
        assert correlation(scores, exact) >= EXACT[dtype], name
        stored = asked.double() @ kept.T
        torch.testing.assert_close(scores.double(), stored, rtol=1e-4, atol=1e-4 * stored.abs().max().item())
    exact = queries.double() @ kept.T
    values, index = store.topk(queries, 5)
    assert torch.equal(index, store.score(queries).topk(5).indices)
    torch.testing.assert_close(values.double(), exact.topk(5).values, rtol=1e-4, atol=1e-4 * exact.abs().max().item())
    torch.testing.assert_close(torch.cat([block for _, block in store.blocks(max_bytes=40_000)]).double(), kept)
    again = written(tmp_path / "again", rows[:1], dtype, block=block)
    assert torch.equal(again.read(0, 1), store.read(0, 1))  # however many rows it came with


@pytest.mark.parametrize("dtype", ["int4", "sign"])
def test_a_store_of_layers_side_by_side_is_read_and_continued(tmp_path, dtype, monkeypatch):
    """As versions 1 to 3 wrote them: blocks run on from a layer to the next, and u and v are of equal lengths."""
    rows, _ = unlike()
    with monkeypatch.context() as patch:
        patch.setattr("logra_kernels.store.writing.create.stored_width", lambda widths, form: sum(widths))
        written(tmp_path / "old", rows[:50], dtype, rows_per_shard=40)
    with lk.GradientStore.open(tmp_path / "old", mode="append") as store:
        store.append(rows[50:], names()[50:])
        store.delete(["r7"])
        store.compact()
    assert json.loads((tmp_path / "old" / "manifest.json").read_text())["version"] == 2
    (tmp_path / "old" / "manifest.json").unlink()
    assert fsck(tmp_path / "old", repair=True).left == 0
    store = lk.GradientStore.open(tmp_path / "old")
    layers = list(UNLIKE.values())
    kept = lk.rebuild_rows(lk.dequantize_rows(lk.quantize_rows(lk.factor_rows(rows, layers, 1), dtype)), layers, 1)
    kept = kept[[i for i in range(N) if i != 7]]
    assert torch.equal(store.read(0, N - 1), kept)
    queries = torch.randn(3, rows.shape[1])
    exact = queries.double() @ kept.double().T
    torch.testing.assert_close(store.score(queries).double(), exact, rtol=1e-4, atol=1e-4 * exact.abs().max().item())
    new = written(tmp_path / "new", rows[:3], dtype)
    assert json.loads((tmp_path / "new" / "manifest.json").read_text())["version"] == 4
    with pytest.raises(StoreMismatch, match="layers apart"):
        merge([tmp_path / "old", tmp_path / "new"], tmp_path / "both")
    plain = quantize(tmp_path / "old", tmp_path / "plain", "fp32", rank_c=1).read(0, 3)
    torch.testing.assert_close(plain, kept[:3], rtol=1e-4, atol=1e-4)
    assert new.manifest.width > store.manifest.width == factored_dim(layers, 1)


def test_layers_that_fill_their_blocks_lie_side_by_side(tmp_path):
    """And are kept as they were before layers could lie apart, u and v of equal lengths."""
    layers = {"a": (40, 88), "b": (64, 64), "c": (3, 9)}
    rows = torch.randn(9, 40 * 88 + 64 * 64 + 27)
    store = written(tmp_path / "s", rows, "int8", layers)
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    assert (manifest["version"], "layers_apart" in manifest) == (2, False)
    expected = lk.quantize_rows(lk.factor_rows(rows, list(layers.values()), 1), "int8")
    ((_, encoded),) = store.encoded_blocks()
    assert torch.equal(encoded.codes, expected.codes)
    assert torch.equal(encoded.scales, expected.scales)


def test_quantised_beside_as_written_at_once(tmp_path):
    rows, parts = unlike()
    written(tmp_path / "plain", rows, "fp32", rank_c=None)
    store = quantize(tmp_path / "plain", tmp_path / "q", "int8", rank_c=1)
    assert min(quantization_loss(store)["energy_kept"].values()) > 0.999
    written(tmp_path / "direct", rows, "int8")
    both = merge([tmp_path / "q"], tmp_path / "merged"), lk.GradientStore.open(tmp_path / "direct")
    assert torch.equal(both[0].read(0, N), both[1].read(0, N))
    lost = quantize(tmp_path / "q", tmp_path / "back", "fp32").read(0, N) - store.read(0, N)
    for name, part in parts.items():
        assert lost[:, part].norm() <= 1e-3 * store.read(0, N)[:, part].norm(), name


def test_factors_so_few_that_bf16_takes_less(tmp_path):
    with pytest.warns(UserWarning, match=r"take 300 bytes, more than the 192 of bf16: a layer has 32 numbers"):
        lk.GradientStore.create(tmp_path / "s", {str(i): (16, 16) for i in range(3)}, "int8", rank_c=1).close()
