"""Shared by all tests: recorded data, a tiny data set, an environment apart from the user's own files."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

if "ACDC_TEST_GPU" not in os.environ:  # make gpu-check sets it, for tests/gpu
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported: the others compare bits, on the CPU

if worker := os.environ.get("PYTEST_XDIST_WORKER"):  # gw0, gw1, ...
    # each on a core of its own: runs that share cores slow each other down far more than twofold
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker[2:]) % len(cores)]})

import hypothesis
import numpy as np
import pytest
from numpy.typing import NDArray

# Tests leave schedules unfinished, and the garbage collector would say so within another test
logging.getLogger("sparsity.guard.end").disabled = True

# No test asserts a time: the machine may be busy
hypothesis.settings.register_profile("busy", deadline=None)
hypothesis.settings.load_profile("busy")

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden() -> Path:
    return GOLDEN


@pytest.fixture(autouse=True)
def _own_data_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty $ACDC_DATA: the bundled subset is used, whatever is prepared on this machine."""
    monkeypatch.setenv("ACDC_DATA", str(tmp_path_factory.getbasetemp() / "data-home"))


def refuse(file: str, reason: str) -> None:
    """For loaders of images that can all be decoded."""
    raise AssertionError(f"{file}: {reason}")


def write_idx(path: Path, array: NDArray[np.uint8]) -> None:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(header + array.tobytes())


def write_fashion_idx(folder: Path, num_train: int, num_test: int) -> Path:
    """A folder with four idx files: real images of the bundled subset, a few of them."""
    from data.datasets import fashion_mnist
    from data.datasets.idx import IDX_FILES

    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", num_train), ("test", num_test)):
        arrays = fashion_mnist.load(None, "train" if split == "train" else "test")
        write_idx(folder / IDX_FILES[f"{split}_images"], arrays.images[:count, :, :, 0])
        write_idx(folder / IDX_FILES[f"{split}_labels"], arrays.labels[:count].astype(np.uint8))
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fashion-MNIST with 320 training and 150 test images, as idx files."""
    return write_fashion_idx(tmp_path_factory.mktemp("tiny-fashion"), 320, 150)


@pytest.fixture
def loads_anew() -> Iterator[None]:
    """The library of sparse kernels is loaded anew in this test, and after it."""
    from sparsity.kernels.unstructured import library

    library._load_once.cache_clear()
    yield
    library._load_once.cache_clear()


@pytest.fixture(scope="session")
def needs_runs() -> None:
    """Skips what trains where DeepSpeed or DALI is missing."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")


def pytest_collection_modifyitems(items):
    """The longest files first: no process is left with one when the others are done."""
    items.sort(key=lambda item: "tests/trainer/" not in item.path.as_posix())
