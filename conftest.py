"""pytest-timeout and pytest-benchmark may be missing: their settings and marks are known all the same."""

from importlib.util import find_spec

TIMEOUT, BENCHMARK = (find_spec(name) is not None for name in ("pytest_timeout", "pytest_benchmark"))


def pytest_addoption(parser):
    if not TIMEOUT:
        parser.addini("timeout", "seconds of a test, by pytest-timeout")


def pytest_configure(config):
    if not TIMEOUT:
        config.addinivalue_line("markers", "timeout: seconds of a test, by pytest-timeout")
    if not BENCHMARK:
        config.addinivalue_line("markers", "benchmark: how long to measure, by pytest-benchmark")
