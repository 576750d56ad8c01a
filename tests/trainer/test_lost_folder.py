"""A run whose folder is removed while it is going ends with a message."""

import shutil

import pytest

from tests.trainer.runs import tiny
from trainer.loop import Trainer
from trainer.train import main

pytestmark = pytest.mark.usefixtures("needs_runs")


@pytest.mark.parametrize("log_every", ["2st", "99st"])
def test_a_removed_run_folder(log_every, tiny_data, tmp_path, monkeypatch, capsys):
    """99st: found as a checkpoint is saved, which must not make the folder anew."""
    train_batch = Trainer.train_batch

    def removing(self, batches):
        if self.acdc.step == 3:
            shutil.rmtree(self.run_dir.path)
        return train_batch(self, batches)

    monkeypatch.setattr(Trainer, "train_batch", removing)
    often = ["save.every=6st", f"log.every={log_every}", "log.weight_histograms=true"]
    assert main(tiny(tiny_data, tmp_path, *often)) == 3
    error = capsys.readouterr().err
    assert f"error: the run folder {tmp_path / 'quickstart'}" in error
    assert "is gone: it was removed, or its disk, while the run was going" in error
    assert "Traceback" not in error
    assert not list((tmp_path / "quickstart").iterdir())
