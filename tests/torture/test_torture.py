"""The torture suite in short: `make torture` does far more of each."""

import pytest

from tests.torture.__main__ import main

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
pytest.importorskip("nvidia.dali", reason="DALI is not installed")


@pytest.mark.slow
def test_a_little_of_each(capsys):
    assert main(["--kills", "2", "--damages", "20", "--recipes", "40"]) == 0
    said = capsys.readouterr().out
    assert "killed at any moment" in said
    assert "damaged" in said
