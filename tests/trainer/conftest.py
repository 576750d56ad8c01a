"""Shared by the tests of runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def small_net(needs_runs: None) -> Iterator[None]:
    """Recipes may name the model "small" meanwhile."""
    from tests.trainer.distributed.small_net import SmallNet
    from trainer.models import MODELS

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "small", SmallNet)
        yield
