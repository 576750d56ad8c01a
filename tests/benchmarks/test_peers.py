"""The loops that ours is measured against compute what they should, and keep the memory that they should."""

import copy
import os
import platform
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import prune

from benchmarks import compare, peers, peers_loops
from benchmarks.shared.models import NETWORKS, Network
from data.datasets.imagenet import MEAN, STD
from tests.data.photographs import make_tree
from trainer import engine

pytestmark = pytest.mark.usefixtures("uncompiled")
CPU = torch.device("cpu")
SMALL = Network("cifar10/memorisation_90", cpu_batch=4, gpu_batch=4, overrides=("engine.precision=fp32",))
FILES = Network("imagenet/mobilenetv1_90", cpu_batch=4, gpu_batch=4)


def small_model():
    torch.manual_seed(0)
    stem, depthwise = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, groups=16)
    body = [stem, nn.ReLU(), depthwise, nn.Conv2d(16, 32, 1)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def test_the_tuned_step_is_the_textbook_step(monkeypatch):
    """Uncompiled, NCHW, the unfused optimizer, masks multiplied one by one."""
    monkeypatch.setattr(peers_loops, "SPARSITY", 0.5)  # so few weights would not carry anything at 0.9
    book = small_model()
    ours = copy.deepcopy(book)
    step = peers_loops.tuned_step(ours, SMALL, CPU)
    weights = [layer.weight for layer in (book[0], book[2], book[3], book[6])]
    smallest = torch.cat([weight.detach().abs().flatten() for weight in weights]).sort().values
    masks = [weight.detach().abs() > smallest[round(0.5 * len(smallest)) - 1] for weight in weights]
    optimizer = peers_loops._sgd(SMALL, book)
    with torch.no_grad():
        for weight, mask in zip(weights, masks, strict=True):
            weight *= mask
    for _ in range(3):
        images = torch.randint(0, 256, (4, 12, 12, 3), dtype=torch.uint8)
        labels = torch.randint(0, 10, (4,))
        loss = step(images, labels)
        pixels = images.permute(0, 3, 1, 2).contiguous().float()
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
        expected = functional.cross_entropy(book((pixels / 255 - mean) / std), labels)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        with torch.no_grad():
            for weight, mask in zip(weights, masks, strict=True):
                weight *= mask
    for found, wanted in zip(ours.parameters(), book.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert ours[0].weight.is_contiguous(memory_format=torch.channels_last)
    kept = sum(int((layer.weight != 0).sum()) for layer in (ours[0], ours[2], ours[3], ours[6]))
    assert kept == sum(int(mask.sum()) for mask in masks) == len(smallest) - round(0.5 * len(smallest))


@pytest.mark.parametrize("able", [True, False])
def test_the_loops_compute_in_the_precision_of_ours(able, monkeypatch):
    monkeypatch.setattr(engine, "cpu_multiplies_bf16", lambda: able)
    with peers_loops._autocast(FILES, CPU):  # whose recipe says auto
        assert torch.is_autocast_enabled("cpu") is able
    with peers_loops._autocast(SMALL, CPU):
        assert not torch.is_autocast_enabled("cpu")


def test_the_plain_step_trains_what_its_masks_keep():
    model = small_model()
    step = peers_loops.plain_step(model, SMALL, CPU)
    before = model[0].weight_orig.detach().clone()
    step(torch.randn(4, 3, 12, 12), torch.randint(0, 10, (4,)))
    assert prune.is_pruned(model)
    assert not torch.equal(model[0].weight_orig, before)
    num_weights = sum(mask.numel() for mask in dict(model.named_buffers()).values() if mask.dim() > 1)
    kept = sum(int(mask.sum()) for mask in dict(model.named_buffers()).values() if mask.dim() > 1)
    assert kept == num_weights - round(0.9 * num_weights)


@pytest.mark.parametrize("network", [SMALL, FILES])
def test_both_loops_read_the_same_kind_of_images(network, tmp_path):
    side = 224 if network.of_files else 32
    if network.of_files:
        make_tree(tmp_path / "images", 2, 2)
        (tmp_path / "images" / "train" / "n9").mkdir()  # a class without images
    plain = peers_loops.images_of(network, tmp_path, CPU, peers_loops.plain_transform(network.of_files))
    tuned = peers_loops.images_of(network, tmp_path, CPU, peers_loops.tuned_transform(network.of_files))
    assert len(plain) == len(tuned) == (4 if network.of_files else 64)
    image, label = plain[3]
    assert (image.shape, image.dtype) == ((3, side, side), torch.float32)
    images, labels = peers_loops.stack([tuned[i] for i in range(4)])
    assert (images.shape, images.dtype) == ((4, side, side, 3), torch.uint8)
    assert images.permute(0, 3, 1, 2).is_contiguous(memory_format=torch.channels_last)
    assert labels[3] == label


def test_models_have_the_classes_of_their_data_set():
    heads = {name: list(network.model().parameters())[-1].numel() for name, network in NETWORKS.items()}
    assert heads == {"resnet50": 1000, "mobilenetv1": 1000, "wrn-28-10": 100, "resnet20": 10}


def test_the_tuned_loop_alone_keeps_freed_memory():
    given = {"PATH": "/bin", "MALLOC_ARENA_MAX": "4", "MALLOC_TRIM_THRESHOLD_": "0"}
    assert peers.variables("tuned", given) == {"PATH": "/bin", **peers.KEPT_MEMORY}
    assert peers.variables("plain", given) == peers.variables("ours", given) == {"PATH": "/bin"}


def test_the_c_library_understands_the_variables():
    if "glibc" not in platform.libc_ver():
        pytest.skip("the C library is not glibc")
    code = """
import ctypes
class Mallinfo(ctypes.Structure):  # of malloc.h; the ninth number is fordblks, free bytes that the heap keeps
    _fields_ = [("numbers", ctypes.c_int * 10)]
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes, libc.mallinfo.restype = ctypes.c_void_p, [ctypes.c_void_p], Mallinfo
libc.free(libc.malloc(100 << 20))
print(libc.mallinfo().numbers[8])
"""
    kept, given_back = (
        int(subprocess.check_output([sys.executable, "-c", code], env=peers.variables(who, os.environ)))
        for who in ("tuned", "plain")
    )
    assert kept >= 100 << 20
    assert given_back < 10 << 20


def test_the_summary_pairs_turns(capsys):
    turn = peers.Turn
    turns = {
        "ours": [turn(2.0, 0.0), turn(4.0, 0.4)],
        "tuned": [turn(2.0, 0.1), turn(5.0, 0.0)],
        "plain": [turn(4.0, 0.0), turn(6.0, 0.0)],
    }
    found = {"batch": 4, "bar": 1.2, **peers.summary(turns, images=40)}
    assert found["images_per_second"]["ours"] == {"median": 15, "min": 10, "max": 20}
    assert found["ours_over_tuned"] == {"median": 1.125, "min": 1.0, "max": 1.25}
    assert found["ours_over_plain"] == {"median": 1.75, "min": 1.5, "max": 2.0}
    assert found["refill"]["ours"]["max"] == pytest.approx(0.1)
    peers.show({"resnet20": found})
    header = capsys.readouterr().out
    assert header.index("ours / tuned") < header.index("ours / plain")
    content = {"environment": {}, "options": {"steps": 12}, "peers": {"resnet20": found}}
    names = {name.rpartition("resnet20/")[2] for name, *_ in compare.compare(content, content, 0.05)}
    rates = {f"images_per_second/{who}" for who in peers.CONTENDERS}
    assert names == rates | {"ours_over_tuned", "ours_over_plain"}


def test_before_is_the_trainer_of_another_tree(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "until_quiet", lambda process: time.perf_counter())
    tree, folder = tmp_path / "tree", tmp_path / "folder"
    (tree / "benchmarks").mkdir(parents=True)
    folder.mkdir()
    (tree / "benchmarks" / "__init__.py").touch()
    (tree / "benchmarks" / "peers_worker.py").write_text(
        "import sys, pathlib\n"
        "who, network, folder, steps = sys.argv[1:]\n"
        "for line in sys.stdin:\n"
        "    pathlib.Path(folder, 'said').write_text(f'{who} {network} {steps} {int(line)}')\n"
        "    print('done', flush=True)\n"
    )
    contender = peers._Contender("before", "resnet20", folder, 9, tree)
    contender.turn(3)
    contender.end()
    assert (folder / "before" / "said").read_text() == "ours resnet20 9 3"


def test_before_has_a_table_and_a_record_of_its_own(tmp_path, monkeypatch, capsys):
    made, turn = [], peers.Turn(2.0, 0.0)
    stub = SimpleNamespace(turn=lambda steps: turn, end=lambda: None)
    monkeypatch.setattr(peers, "_Contender", lambda *arguments: made.append(arguments) or stub)
    monkeypatch.setattr(peers, "RESULTS", tmp_path)
    written = {}
    monkeypatch.setattr(peers, "write_record", lambda path, content, **_: written.update({path: content}))
    checkout = tmp_path / "before"
    (checkout / "benchmarks").mkdir(parents=True)
    (checkout / "benchmarks" / "peers_worker.py").touch()
    given = ["--before", str(checkout), "--turns", "2", "--out", str(tmp_path / "peers.json")]
    monkeypatch.setattr(sys, "argv", ["peers", "resnet20", *given])
    assert peers.main() == 0
    assert [(who, before) for who, *_, before in made] == [("ours", checkout), ("before", checkout)]
    found = written[tmp_path / "before.json"]["peers"]["resnet20"]
    assert (found["ours_over_before"]["median"], found["bar"]) == (1, 0.99)
    assert "ours / before" in capsys.readouterr().out
