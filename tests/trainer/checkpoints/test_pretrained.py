"""Weights that libraries publish, by name: found on this machine, or a message says how to bring them."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from data.datasets import imagenet
from data.torchvision_import import import_torchvision
from trainer.checkpoints import pretrained
from trainer.checkpoints.pretrained import fetch, find_published, wanted_statistics
from trainer.config.schema import ModelConfig
from trainer.errors import EnvironmentFailure

IMAGENET = (imagenet.MEAN, imagenet.STD)


@pytest.fixture(autouse=True)
def hub(tmp_path, monkeypatch):
    """Empty caches, and no network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def fail(url, *_, **__):
        raise OSError(f"no route to {url}")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    return tmp_path / "hub" / "checkpoints"


@pytest.mark.parametrize("model", ["resnet50", "torchvision:resnet50"])
def test_torchvisions_names(hub, model):
    published = find_published(model, "torchvision:IMAGENET1K_V2")
    enum = import_torchvision().models.ResNet50_Weights
    assert published.source is enum.IMAGENET1K_V2
    assert published.statistics == IMAGENET
    assert find_published(model, "torchvision:DEFAULT").source is enum.DEFAULT
    path = hub / Path(enum.IMAGENET1K_V2.url).name
    with pytest.raises(EnvironmentFailure) as caught:
        fetch(published)
    for part in ("weights torchvision:IMAGENET1K_V2 of resnet50 are not on this machine", "no route to"):
        assert part in str(caught.value)
    assert f"curl -LO {enum.IMAGENET1K_V2.url}" in str(caught.value)
    assert f"put it there as {path}" in str(caught.value)
    path.write_bytes(b"")
    assert fetch(published) == path


def test_what_can_be_fetched_is(hub, monkeypatch):
    published = find_published("resnet18", "torchvision:IMAGENET1K_V1")
    got = {}

    def download(url, path, digest, progress):
        got[url] = digest
        Path(path).write_bytes(b"weights")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    assert fetch(published).read_bytes() == b"weights"
    assert got == {published.source.url: "f37072fd"}  # whose SHA-256 begins with what the name says


@pytest.mark.parametrize(
    ("model", "weights", "expected"),
    [
        ("resnet18", "torchvision:IMAGENET1K_V3", r"no weights 'IMAGENET1K_V3' of resnet18; did you mean"),
        ("mobilenetv1", "torchvision:DEFAULT", r"of torchvision's models, and mobilenetv1 is not one"),
        ("timm:resnet18", "torchvision:DEFAULT", r"of torchvision's models, and timm:resnet18 is not one"),
    ],
)
def test_names_that_there_are_not(model, weights, expected):
    with pytest.raises(ValueError, match=expected):
        find_published(model, weights)


@pytest.mark.parametrize("weights", ["weights.pth", "/data/torchvision/w.pth", "C:weights.pth", "timm:"])
def test_paths_are_no_names(weights):
    assert find_published("resnet18", weights) is None


def test_statistics_of_what_a_run_begins_with(tmp_path, monkeypatch):
    def wanted(weights, began=None, name="resnet18"):
        return wanted_statistics(ModelConfig(name=name, weights=weights), began)

    known = {"model": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}}
    monkeypatch.setattr(pretrained.checkpoint, "read_info", lambda path: known)
    half = ((0.5,) * 3, (0.25,) * 3)
    assert wanted(None) is None
    assert wanted("file.pth") is None
    assert wanted("torchvision:DEFAULT") == IMAGENET
    assert wanted(str(tmp_path)) == half
    assert wanted("torchvision:DEFAULT", began=tmp_path) == half  # a resumed run goes on as it began


class Timm:
    """What is asked of timm, by two tags of one network."""

    CFG = SimpleNamespace(url="", hf_hub_id="timm/vit_x.augreg_in1k", hf_hub_filename=None, mean=(0.5,) * 3)
    CFGS = ("vit_x.augreg_in1k", "vit_x.dino")

    def list_models(self, pattern, pretrained):
        assert pretrained
        return list(self.CFGS) if pattern == "vit_x.*" else []

    @property
    def models(self):
        return SimpleNamespace(
            get_pretrained_cfg=lambda name: SimpleNamespace(**vars(self.CFG), std=(0.5,) * 3)
        )


def test_timms_tags(hub, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", Timm())
    published = find_published("timm:vit_x", "timm:augreg_in1k")
    assert published.statistics == ((0.5,) * 3, (0.5,) * 3)
    assert find_published("timm:vit_x.dino", "timm:augreg_in1k").source.hf_hub_id == "timm/vit_x.augreg_in1k"
    assert wanted_statistics(ModelConfig(name="timm:vit_x", weights="w.pth"), None) == published.statistics
    with pytest.raises(
        ValueError, match=r"no weights 'augreg' of vit_x.*There are: timm:augreg_in1k, timm:dino"
    ):
        find_published("timm:vit_x", "timm:augreg")
    url = "https://example.org/vit-12345678.pth"
    by_url = published._replace(source=SimpleNamespace(url=url, hf_hub_id=None))
    with pytest.raises(EnvironmentFailure, match=f"curl -LO {url}"):
        fetch(by_url)


def test_real_timm(hub, monkeypatch):
    import_torchvision()  # which timm imports, and which needs help on some machines
    timm = pytest.importorskip("timm", reason="timm is not installed")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # else it tries again and again
    published = find_published("timm:vit_tiny_patch16_224", "timm:augreg_in21k_ft_in1k")
    assert published.source == timm.models.get_pretrained_cfg("vit_tiny_patch16_224.augreg_in21k_ft_in1k")
    assert published.statistics == ((0.5,) * 3, (0.5,) * 3)
    with pytest.raises(EnvironmentFailure, match=r"curl -LO https://huggingface\.co/timm/vit_tiny"):
        fetch(published)
