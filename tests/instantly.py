"""A plugin of pytest: failures are printed as they come, so that a run which is stopped has told what it knows."""

import os

MOST = 2500  # characters of each, the last ones


def pytest_runtest_logreport(report):
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        print(f"\nFAILED {report.nodeid} ({report.when})\n{report.longreprtext[-MOST:]}", flush=True)
