"""Image files through DALI and through torch: pixels, order, resumption, bad files."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from data.crops import CropStream, window
from data.dali.files import DaliFileLoader
from data.images.files import EXCLUSIONS, load_image_files
from data.loader import PADDING_LABEL
from data.stream import EvalStream
from data.torch_files import TorchFileLoader
from data.torchvision_import import import_transforms
from tests.conftest import refuse
from tests.data.photographs import make_tree, odd_size, photograph

pytest.importorskip("nvidia.dali", reason="DALI is not installed")
CPU = torch.device("cpu")
SIDE = 48


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return make_tree(tmp_path_factory.mktemp("tree"), 3, 15, 3)  # 45 training images


def stream(files, **arguments):
    return CropStream(len(files), 8, seed=5, flip=True, sizes=((0, SIDE),), **arguments)


def dali(root, on_bad=refuse, **arguments):
    files = load_image_files(root, "train", keep_excluded=True)
    return DaliFileLoader(files, stream(files, **arguments), CPU, 2, "cpu", on_bad)


def other(root, on_bad=refuse, workers=0, **arguments):
    files = load_image_files(root, "train", keep_excluded=True)
    return TorchFileLoader(files, stream(files, **arguments), CPU, workers, on_bad)


def difference(a, b):
    return (a.float() - b.float()).abs().mean().item()


@pytest.mark.parametrize("make", [dali, other])
def test_pixels_are_the_drawn_windows(tree, make):
    """Against Pillow's decoder and resize of the window that the draw means, flip included."""
    loader = make(tree)
    differences = []
    for epoch, (index, (images, labels)) in itertools.product((0, 1), enumerate(loader.epoch(0))):
        if epoch:
            continue
        draw = loader.stream.draw(0, index)
        assert images.shape == (8, 3, SIDE, SIDE)
        assert images.dtype == torch.uint8
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert np.array_equal(labels, np.where(draw.counts, loader.files.labels[draw.indices], PADDING_LABEL))
        for i, number in enumerate(draw.indices):
            with Image.open(tree / loader.files.files[number]) as file:
                image = file.convert("RGB")
            top, left, height, width = window(draw, i, image.height, image.width)
            box = (left, top, left + width, top + height)
            image = image.crop(box).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
            expected = np.asarray(image)[:, ::-1] if draw.flip[i] else np.asarray(image)
            differences.append(difference(images[i].permute(1, 2, 0), torch.from_numpy(expected.copy())))
    assert len(differences) == 48
    assert max(differences) < 1.5  # of 255, mean over an image; another window gives tens


def test_backends_give_the_same_samples(tree):
    for a, b in zip(dali(tree).epoch(1), other(tree).epoch(1), strict=True):
        assert torch.equal(a.labels, b.labels)
        assert difference(a.images, b.images) < 1


def ids(loader, epoch):
    draws = [loader.stream.draw(epoch, i) for i in range(loader.batches_per_epoch)]
    return list(itertools.chain.from_iterable(draw.indices[draw.counts].tolist() for draw in draws))


@pytest.mark.parametrize("backend", [dali, other])
def test_every_file_counts_once_an_epoch_over_ranks(tree, backend):
    seen, labels = [], []
    for rank in range(2):
        loader = backend(tree, rank=rank, world_size=2)
        assert loader.batches_per_epoch == 6
        seen += ids(loader, 3)
        for batch in loader.epoch(3):
            assert len(batch.images) == 4
            labels += batch.labels.tolist()
    assert sorted(seen) == list(range(45))
    assert labels.count(PADDING_LABEL) == 3
    assert [labels.count(label) for label in range(3)] == [15] * 3


def test_any_position_can_be_resumed_bit_for_bit(tree):
    """20 random stopping points in 3 epochs, over 1 and 2 shards: what follows is the same, ids and
    pixels."""
    random = np.random.default_rng(0)
    for world_size, rank in ((1, 0), (2, 0), (2, 1)):
        shard = {"world_size": world_size, "rank": rank}
        through = dali(tree, **shard)
        whole = [(e, i, batch) for e in range(3) for i, batch in enumerate(through.epoch(e))]
        assert len(whole) == 18
        for stop in set(random.choice(18, 10 if world_size == 2 else 20).tolist()):
            epoch, index, _ = whole[stop]
            resumed = dali(tree, **shard)
            for k, batch in enumerate(resumed.epoch(epoch, index)):
                assert torch.equal(batch.images, whole[stop + k][2].images)
                assert torch.equal(batch.labels, whole[stop + k][2].labels)


def test_sizes_change_by_epoch(tree):
    files = load_image_files(tree, "train")
    crops = CropStream(len(files), 8, seed=5, sizes=((0, 16), (2, 24), (3, 32)))
    loaders = (
        DaliFileLoader(files, crops, CPU, 2, "cpu", refuse),
        TorchFileLoader(files, crops, CPU, 0, refuse),
    )
    for loader in loaders:
        shapes = [{batch.images.shape[2:] for batch in loader.epoch(epoch)} for epoch in range(4)]
        assert shapes == [{(16, 16)}, {(16, 16)}, {(24, 24)}, {(32, 32)}]


def evaluation(files, size=(64, 56), batch=4, on_bad=refuse, backend="dali", **arguments):
    order = EvalStream(len(files), batch, **arguments)
    if backend == "torch":
        return TorchFileLoader(files, order, CPU, 0, on_bad, size)
    return DaliFileLoader(files, order, CPU, 2, "cpu", on_bad, size)


@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_evaluation_sees_every_file_once(tree, backend):
    files = load_image_files(tree, "test")
    labels = []
    for rank in range(2):
        loader = evaluation(files, backend=backend, rank=rank, world_size=2)
        for epoch in range(2):
            seen = torch.cat([batch.labels for batch in loader.epoch(epoch)])
            labels += seen[seen != PADDING_LABEL].tolist() * (epoch == 0)
    assert sorted(labels) == sorted(files.labels.tolist())


def test_evaluation_is_torchvisions(tmp_path):
    """100 photographs, 256 and 224: mean absolute difference of at most 2 of 255 a pixel to torchvision's
    transform on Pillow images."""
    transforms = import_transforms()
    reference = transforms.Compose(
        [transforms.Resize(256), transforms.CenterCrop(224), transforms.PILToTensor()]
    )
    folder = tmp_path / "val" / "n0"
    folder.mkdir(parents=True)
    for i in range(100):
        photograph(i, *odd_size(i, 400)).save(folder / f"{i:03}.JPEG", quality=90)
    files = load_image_files(tmp_path, "test")
    differences, worst = [], 0
    for index, batch in enumerate(evaluation(files, (256, 224), 10).epoch(0)):
        for i, image in enumerate(batch.images):
            with Image.open(tmp_path / files.files[index * 10 + i]) as file:
                expected = reference(file.convert("RGB"))
            differences.append(difference(image, expected))
            worst = max(worst, int((image.int() - expected.int()).abs().max()))
    print(f"mean {np.mean(differences):.3f}, worst image {max(differences):.3f}, worst pixel {worst}, of 255")
    assert len(differences) == 100
    assert max(differences) <= 2


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "missing"])
@pytest.mark.parametrize("make", [dali, other])
def test_another_file_stands_in_for_a_bad_one(tmp_path, make, damage):
    root = make_tree(tmp_path, 2, 10)
    good = [batch.labels.clone() for batch in make(root).epoch(0)]
    files = load_image_files(root, "train")
    number = int(make(root).stream.draw(0, 1).indices[3])
    path = root / files.files[number]
    content = path.read_bytes()
    path.write_bytes(
        {"truncated": content[: len(content) // 8], "garbage": b"\xff\xd8" + bytes(500)}.get(damage, b"")
    )
    if damage == "missing":
        path.unlink()
        path.symlink_to("nowhere")
    told = []
    loader = make(root, on_bad=lambda file, reason: told.append((file, reason)))
    batches = list(loader.epoch(0))
    assert [file for file, _ in told] == [files.files[number]]
    assert told[0][1]
    assert len(batches) == len(good) == 3
    for index, (ours, then) in enumerate(zip(batches, good, strict=True)):
        differ = (ours.labels != then).nonzero().flatten().tolist()
        assert set(differ) <= ({3} if index == 1 else set())
        assert ours.labels[3] == (files.labels[(number + 1) % 20] if index == 1 else then[3])
    # excluding it changes nothing but that nothing is reported
    (root / EXCLUSIONS).write_text(f"{files.files[number]}\treason\n")
    for a, b in zip(make(root).epoch(0), batches, strict=True):
        assert torch.equal(a.images, b.images)


@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_a_bad_file_does_not_count_in_evaluation(tmp_path, backend):
    root = make_tree(tmp_path, 2, 2, 5)
    files = load_image_files(root, "test")
    (root / files.files[6]).write_bytes(b"no image")
    told = []
    loader = evaluation(files, on_bad=lambda *what: told.append(what), backend=backend)
    labels = torch.cat([batch.labels for batch in loader.epoch(0)])
    assert [file for file, _ in told] == [files.files[6]]
    assert (labels != PADDING_LABEL).sum() == 9
    assert labels[6] == PADDING_LABEL


def test_the_fingerprint_names_what_shapes_the_stream(tree):
    loader = dali(tree)
    assert loader.fingerprint() == dali(tree, rank=1, world_size=2).fingerprint()
    files = load_image_files(tree, "train")
    for changed in (
        CropStream(len(files), 8, seed=6, flip=True, sizes=((0, SIDE),)),
        CropStream(len(files), 4, seed=5, flip=True, sizes=((0, SIDE),)),
        CropStream(len(files), 8, seed=5, flip=True, sizes=((0, SIDE + 1),)),
        CropStream(len(files), 8, seed=5, flip=True, sizes=((0, SIDE),), min_area=0.2),
    ):
        assert DaliFileLoader(files, changed, CPU, 2, "cpu", refuse).fingerprint() != loader.fingerprint()
    assert other(tree).fingerprint() != loader.fingerprint()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more processes than cores
def test_worker_processes_give_the_same(tree):
    alone, workers = other(tree), other(tree, workers=2)
    for a, b in zip(alone.epoch(0), workers.epoch(0), strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)


@pytest.mark.rare
def test_a_damaged_part_counts_only_where_it_is_needed(tmp_path):
    """Truncated files serve crops above the damage: what a batch holds depends on its own draw, not on what
    was met before, nor on the number of ranks. Portraits, squares, landscapes."""
    folder = tmp_path / "train" / "n0"
    folder.mkdir(parents=True)
    for i, size in enumerate([(60, 90), (64, 64), (90, 60)] * 4):
        path = folder / f"{i:02}.JPEG"
        photograph(i, *size).save(path, quality=90)
        if i < 6:
            path.write_bytes(path.read_bytes()[: -150 * (i + 1)])
    told = []
    make = lambda **shard: dali(tmp_path, on_bad=lambda file, _: told.append(file), **shard)  # noqa: E731
    through = make()
    whole = [list(through.epoch(epoch)) for epoch in range(2)]
    assert {f"train/n0/{i:02}.JPEG" for i in range(6)} >= set(told)
    assert len(told) == len(set(told)) >= 3
    for epoch in (0, 1):
        alone = make().epoch(epoch)
        halves = [make(rank=rank, world_size=2).epoch(epoch) for rank in range(2)]
        for batch, same, *parts in zip(whole[epoch], alone, *halves, strict=True):
            assert torch.equal(same.images, batch.images)
            assert torch.equal(torch.cat([part.images for part in parts]), batch.images)


def test_padding_reads_no_bad_file(tmp_path):
    root = make_tree(tmp_path, 2, 2, 3)
    files = load_image_files(root, "test")
    (root / files.files[0]).write_bytes(b"no image")
    labels = []
    for rank in range(2):
        loader = evaluation(files, on_bad=lambda *_: None, rank=rank, world_size=2)
        for batch in loader.epoch(0):
            labels += batch.labels[batch.labels != PADDING_LABEL].tolist()
    assert labels == files.labels[1:].tolist()


def test_a_lost_mount_is_told_at_once(tmp_path):
    root = make_tree(tmp_path / "tree", 2, 8)
    loader = dali(root)
    root.rename(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="no file of a whole batch is there"):
        list(loader.epoch(0))


@pytest.mark.slow
def test_a_process_ends_though_its_loader_is_in_use(tree):
    program = (
        "import sys, torch\n"
        "from tests.data.test_file_loaders import other\n"
        "from pathlib import Path\n"
        "if __name__ == '__main__':\n"
        "    batches = other(Path(sys.argv[1]), workers=1).epoch(0)\n"
        "    print(next(batches).labels.shape)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tree)], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (0, "torch.Size([8])\n"), done.stderr


KILLED = """
import sys, time
from pathlib import Path
import torch
from data.crops import CropStream
from data.images.files import load_image_files
from data.torch_files import TorchFileLoader

if __name__ == "__main__":
    files = load_image_files(Path(sys.argv[1]), "train")
    loader = TorchFileLoader(files, CropStream(len(files), 8, seed=5), torch.device("cpu"), 2, print)
    next(loader.epoch(0))
    print("decoding", flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_workers_end_when_the_trainer_is_killed(tree, tmp_path):
    """Two that decode, and the two processes that multiprocessing has beside them."""
    program = tmp_path / "program.py"
    program.write_text(KILLED)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, program, tree], env=environment, stdout=subprocess.PIPE)
    with process.stdout as said:
        assert said.readline() == b"decoding\n"
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=20)
    for child in alive:
        child.kill()
    assert len(children) == 4
    assert not alive
