"""Two-stage search: exact values, the recall that was promised, never over other rows."""

import shutil

import pytest
import torch
from store.samples import ids_of

from logra_kernels.errors import StoreError
from logra_kernels.store import GradientStore, fsck
from logra_kernels.store.reading.coarse import Spread

COUNT, LAYERS, DIM = 1200, {"a": (16, 16), "b": (16, 16)}, 512


def topics(count, seed=0):
    """Rows of 40 topics, so that the best rows stand out."""
    draw = torch.Generator().manual_seed(seed)
    centres = torch.randn(40, DIM, generator=torch.Generator().manual_seed(99))
    near = centres[torch.randint(40, (count,), generator=draw)]
    return near + 0.7 * torch.randn(count, DIM, generator=draw)


@pytest.fixture(scope="module", params=["fp32", "int8"])
def path(tmp_path_factory, request):
    path = tmp_path_factory.mktemp("index") / "s"
    with GradientStore.create(path, LAYERS, request.param, rows_per_shard=100) as store:
        store.append(topics(COUNT), ids_of(COUNT))
        store.delete(["row-7", "row-250"])
    GradientStore.open(path).build_index(64, k=10)
    return path


@pytest.fixture
def store(path):
    return GradientStore.open(path)


def shared(found, exact):
    """Share of each query's exact rows that were found, mean."""
    pairs = zip(found.tolist(), exact.tolist(), strict=True)
    return sum(len({*a} & {*b}) / len(b) for a, b in pairs) / len(exact)


def test_short_rows_keep_products_in_the_mean():
    draw = torch.Generator().manual_seed(1)
    rows, queries = torch.randn(6, DIM, generator=draw), torch.randn(5, DIM, generator=draw)
    products = torch.stack([(lambda s: s(queries) @ s(rows).T)(Spread(DIM, 64, seed)) for seed in range(600)])
    error = products.double().mean(0) - queries.double() @ rows.double().T
    expected = queries.norm(dim=1, keepdim=True) * rows.norm(dim=1) / (64 * 600) ** 0.5  # one standard error
    assert bool((error.abs() < 4.5 * expected).all())
    assert 0.5 < float((products.std(0) * 8 / (queries.norm(dim=1, keepdim=True) * rows.norm(dim=1))).mean()) < 1.5


def test_dims_that_do_not_divide_the_row():
    rows = torch.randn(3, 509)
    assert torch.allclose(Spread(509, 509, 0)(rows).norm(dim=1), rows.norm(dim=1))
    assert Spread(509, 100, 0)(rows).shape == (3, 100)


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
def test_values_are_exact_and_the_recall_is_the_promised_one(store, largest, scaled):
    queries = topics(24, seed=5) if largest else -topics(24, seed=5)  # the end that stands out
    scale = torch.rand(len(store)) + 0.5 if scaled else None
    exact_values, exact = store.topk(queries, 10, scale, largest)
    values, found = store.search(queries[:1], 10, scale, largest, shortlist=100)
    every = store.score(queries[:1]) * (scale if scaled else 1)
    torch.testing.assert_close(values, every.gather(1, found), rtol=1e-5, atol=1e-4)
    assert store.index.recall[299] >= 0.99
    parts = [store.search(query[None], 10, scale, largest, shortlist=300)[1] for query in queries]
    assert shared(torch.cat(parts), exact) >= 0.97
    assert torch.equal(
        store.search(queries, 10, scale, largest)[0], exact_values
    )  # their shortlists are half the store


def test_what_is_kept_with_it(store):
    info = store.index
    assert (info.dims, info.dtype, info.k, info.queries) == (64, "bf16", 10, 32)
    lengths = sorted(info.recall)
    assert lengths == [10, 20, 40, 80, 160, 299]
    shares = [info.recall[length] for length in lengths]
    assert shares == sorted(shares)
    assert info.recall[info.shortlist] >= 0.99
    assert fsck(store.path).faults == []


@pytest.mark.parametrize(("count", "k"), [(1, 1), (19, 1), (40, 4), (1200, 100)])
def test_recall_is_of_a_choice_among_the_rows(tmp_path, count, k):
    with GradientStore.create(tmp_path / "s", LAYERS) as store:
        store.append(topics(count), ids_of(count))
    store = GradientStore.open(tmp_path / "s")
    info = store.build_index(8)
    assert info.k == store.index.k == k
    assert min(info.recall) == k
    assert store.build_index(8, k=2000).k == count


def test_only_the_rows_of_the_shortlist_are_read_and_each_is_verified(path, tmp_path):
    copy = shutil.copytree(path, tmp_path / "s")
    query = topics(1, seed=3)
    before = GradientStore.open(copy).search(query, 5, shortlist=20)
    hit = int(before[1][0, 0])
    files = sorted(copy.glob("rows-*.safetensors"))
    for file in files:  # the last row of every shard, whose checksum as a whole then does not fit
        data = bytearray(file.read_bytes())
        data[-3] ^= 64
        file.write_bytes(data)
    store = GradientStore.open(copy)
    with pytest.raises(StoreError, match="damaged"):
        store.read(0, 1)
    after = store.search(query, 5, shortlist=20)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    last = [end - 1 for end in torch.tensor([s.shown for s in store.manifest.shards]).cumsum(0).tolist()]
    assert hit not in last
    with pytest.raises(StoreError, match="is damaged: a row is not the one"):
        GradientStore.open(copy).search(torch.from_numpy(topics(COUNT)[[99]].numpy()), 5, shortlist=20)


def test_an_index_of_other_rows_is_refused(path, tmp_path):
    copy = shutil.copytree(path, tmp_path / "s")
    with GradientStore.open(copy, mode="append") as store:
        store.compact()
        assert store.search(topics(1), 3)[0].shape == (1, 3)  # the same rows
        store.append(topics(1, seed=9), ["new"])
        store.flush()
        with pytest.raises(StoreError, match="built over other rows than it has now; call store.build_index"):
            store.search(topics(1), 3)
    store = GradientStore.open(copy)
    store.build_index(32, dtype="int8")
    assert store.search(topics(2), 3)[1].shape == (2, 3)
    assert store.index.dims == 32


def test_arguments_that_do_not_fit(store, tmp_path):
    with pytest.raises(StoreError, match="must be floating point"):
        store.search(torch.randn(1, 3), 5)
    with pytest.raises(StoreError, match="both must be at least 1"):
        store.search(topics(1), 0)
    with pytest.raises(StoreError, match="row_scale"):
        store.search(topics(1), 1, torch.ones(3))
    with pytest.raises(StoreError, match="dims is 513"):
        store.build_index(513)
    with pytest.raises(StoreError, match="index: format 'int3'"):
        store.build_index(8, "int3")
    with GradientStore.create(tmp_path / "e", LAYERS) as empty:
        with pytest.raises(StoreError, match="no rows to build an index"):
            empty.build_index()
        with pytest.raises(StoreError, match="was not built"):
            empty.search(topics(1), 1)
