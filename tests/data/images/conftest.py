"""Shared by the tests of shards."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.data.images.packing import make_tree, write


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return make_tree(tmp_path_factory.mktemp("images"), 61)


@pytest.fixture(scope="module")
def written(tree, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write(tree, folder)
    return folder


@pytest.fixture
def copy(written, tmp_path):
    return Path(shutil.copytree(written, tmp_path / "copy"))
