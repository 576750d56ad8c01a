"""Shared by the tests of benchmarks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """torch.compile does nothing meanwhile."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")
