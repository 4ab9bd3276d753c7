import os

# Ranks run as threads and processes on a few cores here: torch's own thread pools would only oversubscribe them.
# Set before anything imports torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# torch looks up the name of each peer it connects to, and waits 5 s when DNS does not answer. No test here needs DNS.
os.environ.setdefault("RES_OPTIONS", "attempts:0")

import pytest
from hypothesis import settings

# Wall-clock deadlines fail on a busy machine; a CI run draws the same examples each time.
settings.register_profile("dscheck", deadline=None, print_blob=True, derandomize="CI" in os.environ)
settings.load_profile("dscheck")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--heavy", action="store_true", help="run what is marked as heavy, and nothing else")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    heavy = config.getoption("--heavy")
    kept = [item for item in items if (item.get_closest_marker("heavy") is not None) == heavy]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is None:
        return
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
