"""acdc predict: the answers are those of evaluation, with the names of the run's classes."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from data.datasets import fashion_mnist
from data.datasets.classes import CLASSES
from data.torch_files import central_crop, decode
from tests.trainer.runs import run_here, tiny_images
from trainer.checkpoints.saved_model import load_model
from trainer.cli.main import main
from trainer.train import main as train


def answers(text):
    """File -> class -> percent."""
    found = {}
    for line in text.splitlines():
        file, _, rest = line.partition("  ")
        pairs = (re.fullmatch(r"(.+) ([\d.]+) %", part) for part in rest.strip().split(", "))
        found[file] = {pair[1]: float(pair[2]) for pair in pairs}
    return found


def test_names_of_data_sets_are_as_many_as_their_classes():
    assert {name: len(set(names)) for name, names in CLASSES.items()} == {
        "fashion_mnist": 10,
        "mnist": 10,
        "cifar10": 10,
        "cifar100": 100,
    }
    assert all(list(CLASSES[name]) == sorted(CLASSES[name]) for name in ("cifar10", "cifar100"))


def test_answers_are_those_of_the_model(tiny_data, tmp_path, monkeypatch, capsys):
    run = run_here(tiny_data, tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    images = fashion_mnist.load(None, "test").images[:40, :, :, 0]
    for number, image in enumerate(images):
        Image.fromarray(image).save(f"{number}.png")
    Image.fromarray(np.repeat(images[0].repeat(3, 0).repeat(3, 1)[:, :, None], 3, 2)).save("large.png")
    (tmp_path / "damaged.png").write_bytes(b"not an image")
    capsys.readouterr()
    assert main(["predict", str(run), *(f"{number}.png" for number in range(40)), "large.png"]) == 0
    found = answers(capsys.readouterr().out)
    model, info = load_model(run / "checkpoints" / "sparse")
    mean, std = info["model"]["mean"][0], info["model"]["std"][0]
    pixels = (torch.from_numpy(images[:, None].copy()) / 255 - mean) / std
    with torch.no_grad():
        shares = model.eval()(pixels).softmax(1)
    for number, share in enumerate(shares):
        values, order = share.topk(5)
        assert list(found[f"{number}.png"]) == [CLASSES["fashion_mnist"][i] for i in order]
        assert list(found[f"{number}.png"].values()) == pytest.approx((100 * values).tolist(), abs=0.011)
    assert found["large.png"].keys() == found["0.png"].keys()

    assert main(["predict", str(run / "checkpoints" / "dense_twin"), "damaged.png", "0.png", "no.png"]) == 2
    out = capsys.readouterr()
    assert list(answers(out.out)) == ["0.png"]
    assert "2 of the images cannot be read:\n  damaged.png: cannot identify" in out.err
    assert "no.png: " in out.err
    assert main(["predict", str(tmp_path), "0.png"]) == 2


def test_classes_of_folders_go_by_their_names(tmp_path, capsys):
    """Images of any shape, by the run's own resizing and crop; a model without names has numbers."""
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for place, name in enumerate(("daisy", "rose, red", "tulip")):
            folder = tmp_path / "flowers" / split / name
            folder.mkdir(parents=True)
            for number in range(8):
                pixels = generator.integers(0, 256, (40 + number, 60, 3), np.uint8)
                pixels[:, :, place] = 255
                Image.fromarray(pixels).save(folder / f"{number}.png")
    arguments = tiny_images(tmp_path / "flowers", tmp_path / "runs", "data.backend=torch")
    assert train(arguments) == 0
    (run,) = (tmp_path / "runs" / "mobilenetv1_90").iterdir()
    capsys.readouterr()
    file = tmp_path / "flowers" / "val" / "tulip" / "3.png"
    assert main(["predict", str(run), str(file)]) == 0
    out = capsys.readouterr().out
    model, info = load_model(run / "checkpoints" / "sparse")
    assert info["model"]["classes"] == ["daisy", "rose, red", "tulip"]
    assert all(f"{name} " in out for name in info["model"]["classes"])
    pixels = central_crop(decode(file), (36, 32))[None]
    mean, std = (torch.tensor(info["model"][key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        share = model.eval()((pixels / 255 - mean) / std).softmax(1)[0]
    (percent,) = re.findall(r"tulip ([\d.]+) %", out)
    assert float(percent) == pytest.approx(100 * share[2].item(), abs=0.011)
