"""Whole runs on folders of image files."""

import json

import pytest
import torch

from data.dali.decode import DeviceJpeg
from data.images.files import EXCLUSIONS, load_image_files
from tests.data.images.test_records import first_shard, spoil
from tests.data.photographs import make_tree
from tests.slow import slow
from tests.trainer.runs import assert_equal_states, final_state, newest_run, records, tiny_images
from trainer.checkpoints import checkpoint
from trainer.cli.main import main as acdc_command
from trainer.config.data import ImageNetData
from trainer.loaders import find_source
from trainer.train import main

pytestmark = pytest.mark.usefixtures("needs_runs")
SHORT = ["epochs=2", "sparsity.schedule=dense 1, sparse 1"]  # 18 steps


@pytest.fixture
def tree(tmp_path):
    return make_tree(tmp_path / "tree", 3, 24, 5, around=40)  # 72 training images: 9 steps of 8


@pytest.mark.parametrize(
    ("place", "device", "decode_on"),
    [("auto", "cuda", "mixed"), ("cpu", "cuda", "cpu"), ("auto", "cpu", "cpu")],
)
def test_what_a_recipe_says_of_the_decoder_arrives(tree, place, device, decode_on):
    settings = {"decoder_engine_load": 0.9, "decoder_width_hint": 640, "decoder_height_hint": 480}
    data = ImageNetData(name="imagenet", root=str(tree), batch_size=8, device=place, **settings)
    share = {"global_batch": 8, "seed": 0, "rank": 0, "world_size": 1}
    loaders = find_source(data, torch.device(device)).loaders(share)
    for loader in (loaders.train, loaders.test):
        assert loader.decoder.backend == decode_on
        assert loader.decoder.jpeg == DeviceJpeg(engine_load=0.9, width_hint=640, height_hint=480)


def test_a_gpus_decoder_needs_a_gpu(tree):
    data = ImageNetData(name="imagenet", root=str(tree), batch_size=8, device="gpu")
    with pytest.raises(ValueError, match="this run has none; use auto or cpu"):
        find_source(data, torch.device("cpu")).test_loader()


def newest(tmp_path):
    return newest_run(tmp_path / "runs", "mobilenetv1_90")


@pytest.mark.parametrize("backend", ["dali", "synthetic", *slow("torch")])
def test_an_imagenet_recipe_runs(tree, tmp_path, backend, capsys):
    options = [f"data.backend={backend}", "data.num_threads=1", *SHORT]
    if backend == "synthetic":
        options += ["steps_per_epoch=9"]
    assert main(tiny_images(tree, tmp_path / "runs", *options)) == 0
    run = newest(tmp_path)
    result = json.loads((run / "result.json").read_text())
    assert result["sparse"]["num_images"] == (8 if backend == "synthetic" else 15)
    assert result["sparse"]["sparsity"] == pytest.approx(0.9, abs=1e-4)
    if backend == "dali":
        assert acdc_command(["eval", str(run)]) == 0
        assert f"{result['sparse']['top1']:.2f}" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["folders", *slow("webdataset")])
def test_resumed_within_an_epoch_equals_uninterrupted(tree, tmp_path, form):
    options = ["save.every=4st", "save.keep=20", "data.image_sizes=[[0, 24], [2, 32]]", f"data.format={form}"]
    options += ["data.augment=rand"]
    if form == "webdataset":
        packed = tmp_path / "packed"
        assert acdc_command(["prepare", "shards", str(tree), str(packed), "--workers", "1"]) == 0
        tree = packed
    assert main(tiny_images(tree, tmp_path / "runs", *options)) == 0
    run = newest(tmp_path)
    expected = final_state(run, 36)
    point = checkpoint.step_folder(run / "checkpoints", 16)
    assert main(tiny_images(tree, tmp_path / "runs", *options, f"resume={point}")) == 0
    assert_equal_states(expected, final_state(run, 36))


@pytest.mark.slow
def test_another_stream_is_refused_by_name(tree, tmp_path, capsys):
    assert main(tiny_images(tree, tmp_path / "runs", *SHORT, "save.every=4st")) == 0
    run = newest(tmp_path)
    for change, expected in (
        ("data.min_area=0.3", "min_area was 0.08, is 0.3"),
        ("data.backend=torch", "backend was 'dali', is 'torch'"),
        ("data.image_size=40", "sizes was [[0, 32]], is [[0, 40]]"),
        ("seed=3", "seed was 1, is 3"),
    ):
        assert main(tiny_images(tree, tmp_path / "runs", *SHORT, f"resume={run}", change)) == 2
        assert f"another stream of training data: {expected}" in capsys.readouterr().err


@pytest.mark.slow
def test_a_bad_file_saves_and_stops_and_can_be_excluded(tree, tmp_path, capsys):
    files = load_image_files(tree, "train")
    path = tree / files.files[30]
    path.write_bytes(path.read_bytes()[:100])
    assert main(tiny_images(tree, tmp_path / "runs", *SHORT)) == 2
    error = capsys.readouterr().err
    assert f"{files.files[30]} cannot be decoded" in error
    assert f"acdc verify-data {tree}" in error
    assert "data.on_error=skip" in error
    run = newest(tmp_path)
    assert f"resume={run}" in error
    (saved,) = checkpoint.training_checkpoints(run / "checkpoints")
    assert 1 <= checkpoint.read_info(saved)["step"] <= 9

    (tree / EXCLUSIONS).write_text(f"{files.files[30]}\ttruncated\n")
    assert main(tiny_images(tree, tmp_path / "runs", *SHORT, f"resume={run}")) == 0
    excluded = final_state(run, 18)
    (tree / EXCLUSIONS).unlink()
    assert main(tiny_images(tree, tmp_path / "runs", *SHORT, "data.on_error=skip")) == 0
    skipping = newest(tmp_path)
    assert skipping != run
    for key in ("model", "optimizer", "acdc"):  # stopping, excluding, skipping: the same training
        assert_equal_states(excluded[key], final_state(skipping, 18)[key], key)
    assert [record["bad_files"] for record in records(skipping)] == [1, 1]


@pytest.mark.rare
def test_a_bad_packed_image_saves_and_stops_and_can_be_skipped(tree, tmp_path, capsys):
    packed = tmp_path / "packed"
    assert acdc_command(["prepare", "shards", str(tree), str(packed), "--workers", "1"]) == 0
    tar = first_shard(packed)
    (image,) = spoil(tar, slice(4, 5))
    options = ["data.format=webdataset", "save.every=4st", *SHORT]
    assert main(tiny_images(packed, tmp_path / "runs", *options)) == 2
    error = capsys.readouterr().err
    assert f"{tar}:" in error
    assert f"{image} cannot be decoded" in error
    assert "data.on_error=skip" in error
    run = newest(tmp_path)
    assert f"resume={run}" in error
    assert main(tiny_images(packed, tmp_path / "runs", *options, "data.on_error=skip", f"resume={run}")) == 0
    stopped = final_state(run, 18)
    assert main(tiny_images(packed, tmp_path / "runs", *options, "data.on_error=skip")) == 0
    assert newest(tmp_path) != run
    for key in ("model", "optimizer", "acdc"):
        assert_equal_states({key: stopped[key]}, {key: final_state(newest(tmp_path), 18)[key]})


@pytest.mark.slow
def test_a_bad_file_in_evaluation_is_not_counted(tree, tmp_path, capsys):
    files = load_image_files(tree, "test")
    (tree / files.files[7]).write_bytes(b"no image")
    assert main(tiny_images(tree, tmp_path / "runs", *SHORT)) == 2
    assert f"{files.files[7]} cannot be decoded" in capsys.readouterr().err
    assert main(tiny_images(tree, tmp_path / "runs", *SHORT, "data.on_error=skip")) == 0
    result = json.loads((newest(tmp_path) / "result.json").read_text())
    assert result["sparse"]["num_images"] == 14
