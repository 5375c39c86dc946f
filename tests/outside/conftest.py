"""refattn against software as the package index has it: docs/outside.md."""

import pytest
import threadpoolctl


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Arrays are small, and threads that wait for each other would take most of the time."""
    with threadpoolctl.threadpool_limits(1):
        yield
