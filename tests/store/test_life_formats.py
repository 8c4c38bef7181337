"""Deleting, compacting, merging, rebuilding and searching in every form that rows are kept in."""

import pytest
import torch
from store.samples import ids_of

from logra_kernels.store import GradientStore, fsck, merge

LAYERS, DIM, COUNT = {"a": (16, 24), "b": (8, 8)}, 448, 30
FORMS = {
    "fp16": {"dtype": "fp16"},
    "int8": {"dtype": "int8", "block": 32},
    "int4": {"dtype": "int4"},
    "factors": {"rank_c": 2},
    "factors in int8": {"rank_c": 2, "dtype": "int8"},
    "factors in sign": {"rank_c": 2, "dtype": "sign", "block": 64},
}


@pytest.mark.parametrize("form", FORMS)
def test_rows_are_moved_and_never_rounded_again(tmp_path, form):
    rows = torch.randn(COUNT, DIM, generator=torch.Generator().manual_seed(0))
    for name, start, stop in (("a", 0, 17), ("b", 17, COUNT)):
        with GradientStore.create(tmp_path / name, LAYERS, rows_per_shard=8, **FORMS[form]) as store:
            store.append(rows[start:stop], ids_of(COUNT)[start:stop])
    stored = torch.cat([GradientStore.open(tmp_path / name).read(0, n) for name, n in (("a", 17), ("b", 13))])
    for name in ("a", "b"):
        with GradientStore.open(tmp_path / name, mode="append") as store:
            store.delete(["row-3", "row-9", "row-20"], missing_ok=True)
    with GradientStore.open(tmp_path / "a", mode="append") as store:
        store.compact()
    store = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    kept = [i for i in range(COUNT) if i not in (3, 9, 20)]
    assert torch.equal(store.read(0, len(kept)), stored[kept])
    (tmp_path / "out" / "manifest.json").unlink()
    assert fsck(tmp_path / "out", repair=True).left == 0
    store = GradientStore.open(tmp_path / "out")
    assert store.ids == [ids_of(COUNT)[i] for i in kept]
    assert torch.equal(store.read(0, len(kept)), stored[kept])
    store.build_index(DIM, k=3)
    query = stored[[5]]
    values, found = store.search(query, 2, shortlist=4)
    torch.testing.assert_close(values, store.score(query).gather(1, found), rtol=1e-4, atol=1e-3)
    assert store.ids_of(found[0])[0] == "row-5"
