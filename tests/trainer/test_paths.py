"""A home folder that there is not ends in a message, wherever a path may be given."""

from pathlib import Path

import pytest

from data.places import data_home
from tests.trainer.runs import tiny
from trainer.cli.main import main as acdc_command
from trainer.errors import UserError
from trainer.paths import user_path
from trainer.train import main

NOBODY = "~nobody-of-this-name/x"
SAID = f"{NOBODY}: there is no home folder ~nobody-of-this-name here"


@pytest.mark.parametrize(
    "key", ["run_root", "resume", "checkpoint", "data.root", "engine.deepspeed", "model.weights"]
)
def test_in_a_recipe(key, tiny_data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(tiny(tiny_data, tmp_path, f"{key}={NOBODY}")) == 2
    assert SAID in capsys.readouterr().err
    assert not list(tmp_path.glob("~*"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "quickstart", f"run_root={NOBODY}"],
        ["train", "quickstart", "--hostfile", NOBODY],
        ["eval", NOBODY],
        ["report", NOBODY],
        ["predict", NOBODY, "image.png"],
        ["export", NOBODY, "--format", "torch"],
        ["import", NOBODY],
        ["verify-data", NOBODY],
        ["prepare", "shards", NOBODY, "out"],
        ["prepare", "fashion-mnist", NOBODY],
    ],
)
def test_in_a_command(arguments, capsys):
    assert acdc_command(arguments) == 2
    assert SAID in capsys.readouterr().err


def test_in_the_environment(monkeypatch):
    monkeypatch.setenv("ACDC_DATA", NOBODY)
    with pytest.raises(FileNotFoundError, match=f"ACDC_DATA={NOBODY}: there is no such home folder here"):
        data_home()


def test_homes_that_there_are(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/runs") == tmp_path / "runs"
    assert user_path("runs/~x") == Path("runs/~x")
    with pytest.raises(UserError, match="write the path without it"):
        user_path(NOBODY)
