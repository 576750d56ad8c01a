"""What TensorBoard shows of a run besides its curves."""

import io
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2, metadata
from tensorboard.plugins.hparams import plugin_data_pb2

from trainer.checkpoints.run_dir import RunDir
from trainer.cli import commands
from trainer.cli.main import main
from trainer.config.optimization import MixingConfig
from trainer.models.mixing import Mixer, mix
from trainer.monitor.pictures import as_seen, confused_table, grid, label_table
from trainer.monitor.records import Monitor
from trainer.monitor.screen import Screen

PHASES = ["dense", "sparse", "sparse", "dense"]


def record(i, phase):
    row = {"epoch": i, "step": 10 * i + 10, "phase": phase, "lr": 0.1, "train_loss": 1.0, "val_loss": 1.0}
    rates = {"images_per_second": 9.0, "data_wait": 0.1, "graphs": 2, "seconds": 1.0}
    return {**row, **rates, "val_top1": 50.0 + i, "val_top5": 90.0, "sparsity": 0.9 * (phase == "sparse")}


def a_batch(channels=1):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (20, channels, 32, 32), dtype=torch.uint8, generator=generator)
    return images, torch.arange(20) % 3


@pytest.fixture(scope="module")
def events(tmp_path_factory):
    """Of a run that was interrupted after two epochs, and again after its last words."""
    tmp_path = tmp_path_factory.mktemp("run")
    (tmp_path / "config.yaml").write_text("seed: 1\noptimizer:\n  lr: 0.1\n")
    for begin, end in ((0, 2), (2, 4), (4, 4)):
        monitor = Monitor(RunDir(tmp_path), Screen(0, 0, 0), 10 * begin, schedule="phase  ██")
        if monitor.wants_batch:
            monitor.batch(*a_batch(), None, ("a", "b", "c"))
        for i in range(begin, end):
            if i == 0 or PHASES[i] != PHASES[i - 1]:
                monitor.phase_begins(10 * i + 1, PHASES[i], 0.9 * (PHASES[i] == "sparse"))
            monitor.epoch(record(i, PHASES[i]), {"conv1": 0.5, "fc": 0.75})
        if end == 4:
            result = {"dense_twin": {"top1": 53.0}, "sparse": {"top1": 52.0}}
            monitor.confused(torch.tensor([[8, 2, 0], [0, 9, 1], [0, 0, 10]]), ("a", "b", "c"))
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


def test_a_switch_is_drawn_as_a_step_at_any_smoothing(events):
    """Logged at both ends of a phase."""
    for tag, high in (("phase/sparse", 1.0), ("sparsity/overall", 0.9)):
        found = events.Scalars(tag)
        assert [each.step for each in found] == [1, 10, 11, 20, 30, 31, 40]
        assert [each.value for each in found] == pytest.approx([0, 0, high, high, high, 0, 0])


def test_the_first_batch_is_there_once_pixel_for_pixel(events):
    (picture,) = events.Images("data/first_batch")
    shown = np.asarray(Image.open(io.BytesIO(picture.encoded_image_string)))
    images, _ = a_batch()
    assert shown.shape == (4 * 64 + 3 * 2, 4 * 64 + 3 * 2, 3)  # 16 of 20, enlarged twice
    for place in (0, 6, 15):
        top, left = place // 4 * 66, place % 4 * 66
        assert np.array_equal(shown[top : top + 64 : 2, left : left + 64 : 2, 0], images[place, 0].numpy())
    (labels,) = events.Tensors("data/labels_of_first_batch/text_summary")
    first = labels.tensor_proto.string_val[0].decode().splitlines()[0]
    assert (first, labels.step) == ("| a | b | c | a |", 0)


def test_mixed_images_are_shown_mixed():
    images, labels = a_batch(3)
    mixer = Mixer(MixingConfig(mixup=0.8), 1)
    draw = mixer.row(0, 0, images)
    seen, shown, share = as_seen(images, labels, draw)
    mean, std = torch.tensor([10.0, 20.0, 30.0])[:, None, None], 50.0
    model_sees, *_ = mix((images - mean) / std, labels, draw)
    assert torch.equal(seen, (model_sees[:16] * std + mean).round().to(torch.uint8))
    assert share == float(draw[5]) < 1
    assert grid(seen).shape == (4 * 64 + 6, 4 * 64 + 6, 3)
    assert "Mixed: each image's own label counts" in label_table(shown, share, ())


def test_confused_classes_come_in_the_order_of_how_often(events):
    (text,) = events.Tensors("test/most_confused/text_summary")
    lines = text.tensor_proto.string_val[0].decode().splitlines()
    assert lines[0] == "27 of 30 test images are right (90.00 %)."
    assert lines[4:] == ["| a | b | 2 | 20.0 % |", "| b | c | 1 | 10.0 % |"]
    assert "| 0 | 1 | 5 | 100.0 % |" in confused_table(torch.tensor([[0, 5], [0, 0]]), ())


def test_the_schedule_is_drawn_among_the_texts(events):
    (found,) = events.Tensors("schedule/text_summary")
    assert found.tensor_proto.string_val[0].decode() == "    phase  ██"


def test_the_pair_stands_beside_the_recipe(events):
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    start = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
    assert start.hparams["optimizer.lr"].number_value == pytest.approx(0.1)
    assert start.hparams["include"].string_value == "['*']"
    (score,) = events.Scalars("result/sparse_top1")
    assert (score.step, score.value) == (41, 52.0)


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
    assert "http://localhost:7007/?smoothing=0#custom_scalars&_smoothingWeight=0 " in capsys.readouterr().out


def test_a_picture_that_fails_ends_no_run_but_a_full_disk_does(tmp_path, monkeypatch, caplog):
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    monitor = Monitor(RunDir(tmp_path), Screen(0, 0, 0), 0)
    for failure in (ValueError("image too large"), OSError(28, "No space left on device")):

        def fail(*_, failure=failure):
            raise failure

        monkeypatch.setattr(monitor._board, "kept", fail)
        if isinstance(failure, OSError):
            with pytest.raises(OSError, match="No space left"):
                monitor.epoch({**record(0, "sparse"), "mask_difference": 0.1}, {"fc": 0.75})
        else:
            monitor.epoch(record(0, "sparse"), {"fc": 0.75})
            assert "TensorBoard lacks layers: image too large" in caplog.text
    monitor.close()
