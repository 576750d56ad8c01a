"""What TensorBoard shows of a run besides its curves."""

import subprocess

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2, metadata
from tensorboard.plugins.hparams import plugin_data_pb2

from trainer.checkpoints.run_dir import RunDir
from trainer.cli import commands
from trainer.cli.main import main
from trainer.monitor.records import Monitor
from trainer.monitor.screen import Screen

PHASES = ["dense", "sparse", "sparse", "dense"]


def record(i, phase):
    row = {"epoch": i, "step": 10 * i + 10, "phase": phase, "lr": 0.1, "train_loss": 1.0, "val_loss": 1.0}
    rates = {"images_per_second": 9.0, "data_wait": 0.1, "graphs": 2, "seconds": 1.0}
    return {**row, **rates, "val_top1": 50.0 + i, "val_top5": 90.0, "sparsity": 0.9 * (phase == "sparse")}


@pytest.fixture
def events(tmp_path):
    """Of a run that was interrupted after two epochs."""
    (tmp_path / "config.yaml").write_text("seed: 1\noptimizer:\n  lr: 0.1\n")
    for begin, end in ((0, 2), (2, 4)):
        monitor = Monitor(RunDir(tmp_path), Screen(0, 0, 0), 10 * begin)
        for i in range(begin, end):
            monitor.epoch(record(i, PHASES[i]), {"conv1": 0.5, "fc": 0.75})
        if end == 4:
            result = {"dense_twin": {"top1": 53.0}, "sparse": {"top1": 52.0}}
            monitor.scores({"seed": 1, "optimizer.lr": 0.1, "resume": None, "include": ["*"]}, result)
        monitor.close()
    return EventAccumulator(str(tmp_path / "tb"), {"tensors": 0, "images": 0, "scalars": 0}).Reload()


def test_dense_and_sparse_evaluations_are_two_lines(events):
    lines = {
        kind: [(e.step, e.value) for e in events.Scalars(f"test/top1_{kind}")] for kind in ("dense", "sparse")
    }
    assert lines == {"dense": [(10, 50.0), (40, 53.0)], "sparse": [(20, 51.0), (30, 52.0)]}


def test_the_page_names_tags_that_there_are(events):
    (found,) = events.Tensors(metadata.CONFIG_SUMMARY_TAG)
    layout = layout_pb2.Layout.FromString(found.tensor_proto.string_val[0])
    (category,) = layout.category
    assert category.title == "AC/DC"
    tags = {tag for chart in category.chart for tag in chart.multiline.tag}
    assert tags - set(events.Tags()["scalars"]) == {"sparsity/mask_difference"}  # from the second compression


def test_the_recipe_is_there_once_as_it_is_written(events):
    (found,) = events.Tensors("recipe/text_summary")
    assert found.tensor_proto.string_val[0].decode() == "    seed: 1\n    optimizer:\n      lr: 0.1"


def test_each_compression_has_a_picture_of_what_is_kept(events):
    assert [each.step for each in events.Images("sparsity/kept_by_layer")] == [20]


def test_the_pair_stands_beside_the_recipe(events):
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    start = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
    assert start.hparams["optimizer.lr"].number_value == pytest.approx(0.1)
    assert start.hparams["include"].string_value == "['*']"
    assert events.Scalars("result/sparse_top1")[0].value == 52.0


def test_acdc_board_opens_a_folder_without_smoothing(tmp_path, monkeypatch, capsys):
    assert main(["board", str(tmp_path)]) == 2
    assert "has records for TensorBoard" in capsys.readouterr().err
    (tmp_path / "a" / "tb").mkdir(parents=True)
    (tmp_path / "a" / "tb" / "events.out.tfevents.1").touch()
    started = []

    def run(command, check):
        started.append(command[1:])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(commands.subprocess, "run", run)
    assert main(["board", str(tmp_path), "--port", "7007"]) == 0
    assert started == [["-m", "tensorboard.main", "--logdir", str(tmp_path), "--port", "7007"]]
    assert "http://localhost:7007/?smoothing=0#custom_scalars" in capsys.readouterr().out
