"""For parametrised tests of which `make test` runs a part."""

from typing import Any

import pytest


def slow(*values: Any) -> list[Any]:
    """These parameters, each run by `make test-slow` alone."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]
