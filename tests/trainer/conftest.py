"""Shared by the tests of runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def recorded(golden: Path) -> dict[str, Any]:
    """The paper's experiments, by the name of their file."""
    return json.loads((golden / "recipes.json").read_text())["recipes"]


@pytest.fixture(scope="module")
def small_net(needs_runs: None) -> Iterator[None]:
    """Recipes may name the model "small" meanwhile."""
    from tests.trainer.distributed.small_net import SmallNet
    from trainer.models import MODELS

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "small", SmallNet)
        yield


@pytest.fixture(scope="module")
def finished(needs_runs: None, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that came to its end."""
    from tests.trainer.runs import run_here

    return run_here(tiny_data, tmp_path_factory.mktemp("runs"))
