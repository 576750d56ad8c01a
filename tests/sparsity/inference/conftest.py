import pytest

from sparsity.kernels.unstructured.family import SparseFamily
from sparsity.kernels.unstructured.library import find_compiler


@pytest.fixture
def forced(monkeypatch):
    """Kernels wherever they are right, faster or not."""
    if find_compiler() is None:
        pytest.skip("no C++ compiler")
    chosen = SparseFamily.choose
    monkeypatch.setattr(
        SparseFamily, "choose", staticmethod(lambda measured, required=False: chosen(measured, True))
    )
    monkeypatch.setattr("sparsity.kernels.choose.best_region", lambda choices, *_: choices)
