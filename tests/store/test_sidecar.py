import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from store.samples import LAYERS, rows_of, tree, write

from logra_kernels.errors import StoreError
from logra_kernels.store import GradientStore

TENSORS = {
    "first": torch.arange(6.0).view(2, 3).T,
    "counts": torch.arange(5),
    "half": torch.ones(3, dtype=torch.bfloat16),
    "exact": torch.tensor(0.1, dtype=torch.float64),
    "mask": torch.tensor([True, False, True]),
    "none": torch.zeros(0, 4),
}


@pytest.fixture
def store(tmp_path):
    return GradientStore.open(write(tmp_path / "s"))


def test_round_trip(store):
    path = store.sidecar_write("curvature", TENSORS, {"rows": 20, "kind": "fisher"})
    tensors, metadata = store.sidecar_read("curvature")
    assert metadata == {"rows": 20, "kind": "fisher"}
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)
    plain = load_file(path)
    assert all(torch.equal(plain[name], tensor) for name, tensor in TENSORS.items())
    before = path.read_bytes()
    tensors["first"].zero_()
    assert path.read_bytes() == before
    assert store.sidecar_write("curvature", dict(reversed(TENSORS.items())), {"kind": "fisher", "rows": 20}) == path
    assert path.read_bytes() == before


def test_a_stale_one_is_not_returned_and_gives_way(store):
    assert store.sidecar_read("curvature") is None
    store.sidecar_write("curvature", TENSORS)
    store.sidecar_write("factors", TENSORS, key="0123456789abcdef")
    with GradientStore.open(store.path, mode="append") as writer:
        writer.append(rows_of(1), ["new"], {"source": ["x"], "span": [[0, 1]], "weight": [1.0]})
        assert writer.sidecar_read("curvature") is not None
        writer.flush()
        assert writer.sidecar_read("curvature") is None
        writer.sidecar_write("curvature", TENSORS, {"rows": 21})
    assert GradientStore.open(store.path).sidecar_read("curvature")[1] == {"rows": 21}
    assert store.sidecar_read("factors", key="0123456789abcdef") is not None
    assert store.sidecar_read("factors", key="0123456789abcdee") is None
    assert len(list((store.path / "sidecars").iterdir())) == 2


def test_every_flipped_byte_is_found(store):
    path = store.sidecar_write("curvature", TENSORS, {"rows": 20})
    good = path.read_bytes()
    for place in range(len(good)):
        path.write_bytes(good[:place] + bytes([good[place] ^ 0x10]) + good[place + 1 :])
        with pytest.raises(StoreError, match=r"curvature.*is damaged.*remove it"):
            store.sidecar_read("curvature")
    for length in (0, 1, 40, len(good) - 1):
        path.write_bytes(good[:length])
        with pytest.raises(StoreError, match=r"curvature.*is damaged"):
            store.sidecar_read("curvature")


def test_leftover_temporaries_are_removed_by_the_next_writer(store):
    store.sidecar_write("curvature", TENSORS)
    before = tree(store.path)
    (store.path / "sidecars" / ".tmp-123-curvature.x.safetensors").write_bytes(b"half")
    GradientStore.open(store.path, mode="append").close()
    assert tree(store.path) == before


def test_a_renamed_one_is_not_returned(store):
    path = store.sidecar_write("curvature", TENSORS, key="0123456789abcdef")
    path.rename(path.with_name(f"curvature.{store.content_hash}.safetensors"))
    assert store.sidecar_read("curvature") is None


def test_arguments_that_do_not_fit(store):
    with pytest.raises(StoreError, match="cannot name a sidecar"):
        store.sidecar_write("../x", TENSORS)
    with pytest.raises(StoreError, match="complex64"):
        store.sidecar_write("x", {"z": torch.zeros(2, dtype=torch.complex64)})
    with pytest.raises(StoreError, match="not JSON"):
        store.sidecar_write("x", {}, {"a": object()})
    with pytest.raises(StoreError, match="sidecar's key"):
        store.sidecar_read("x", key="..")


def test_it_needs_no_rows(tmp_path):
    with GradientStore.create(tmp_path / "s", LAYERS) as store:
        store.sidecar_write("x", {}, {"a": 1})
        assert store.sidecar_read("x") == ({}, {"a": 1})


def test_a_writer_that_died_leaves_nothing(store):
    store.sidecar_write("kept", {"x": torch.ones(3)})
    before = tree(store.path)
    dies = (
        "import os, signal, sys, torch; from logra_kernels.store import GradientStore;"
        "os.replace = lambda *a: os.kill(os.getpid(), signal.SIGKILL);"
        "GradientStore.open(sys.argv[1]).sidecar_write('fresh', {'x': torch.ones(3)})"
    )
    died = subprocess.run([sys.executable, "-c", dies, str(store.path)])
    assert died.returncode == -signal.SIGKILL
    assert set(tree(store.path)) - set(before), "the writer died before it had written anything"
    store.sidecar_write("kept", {"x": torch.ones(3)})
    assert tree(store.path) == before
