import pytest


@pytest.fixture(autouse=True)
def one_thread(threads):
    """The tensors here are tiny, and waiting for a second thread on a busy machine takes longer than the work."""
    threads(1)
