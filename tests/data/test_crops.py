"""Crops as torchvision's RandomResizedCrop draws them, down to images of one pixel, shared among ranks."""

import hashlib
import io

import numpy as np
import pytest
import torch
from PIL import Image

from data.crops import CropStream, window
from data.dali.decode import _window
from data.dali.files import DaliFileLoader
from data.dali.pipeline import dense, import_dali
from data.images.files import load_image_files
from data.stream import EvalStream
from data.torch_files import TorchFileLoader
from data.torchvision_import import import_torchvision, import_transforms
from tests.conftest import refuse

CPU = torch.device("cpu")
TINY = ((1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (2, 3), (1, 37), (500, 1), (1, 500), (3, 500))


def draws(count, seed=1, **arguments):
    return CropStream(count, count, seed=seed, sizes=((0, 8),), **arguments).draw(0, 0)


def distance(a, b):
    """Kolmogorov and Smirnov's: the largest difference between the distributions of two samples."""
    values = np.concatenate([a, b])
    below = [np.searchsorted(np.sort(sample), values, side="right") / len(sample) for sample in (a, b)]
    return np.abs(below[0] - below[1]).max()


def measures(windows, height, width):
    """What is compared of windows within an image; places only where there are many to choose from."""
    top, left, h, w = np.array(windows).T
    free_rows, free_columns = height - h, width - w
    return {
        "share of the area": h * w / (height * width),
        "logarithm of the ratio": np.log(w / h),
        "place down": (top / np.maximum(free_rows, 1))[free_rows > 20],
        "place right": (left / np.maximum(free_columns, 1))[free_columns > 20],
    }


@pytest.mark.parametrize(("height", "width", "min_area"), [(375, 500, 0.08), (400, 160, 0.25)])
def test_windows_are_distributed_as_torchvisions(height, width, min_area):
    """Two samples of 12000 from one law are 0.04 apart once in 10^8 times; these are 0.015 at most. Ratios
    drawn uniformly are 0.06 from torchvision's, squared areas and places 0.25."""
    count = 12000
    draw = draws(count, min_area=min_area)
    ours = measures([window(draw, i, height, width) for i in range(count)], height, width)
    get_params = import_torchvision().transforms.RandomResizedCrop.get_params
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        image = torch.empty(3, height, width)
        theirs = [get_params(image, [min_area, 1.0], [3 / 4, 4 / 3]) for _ in range(count)]
    apart = {
        name: (round(distance(ours[name], values), 3), len(values))
        for name, values in measures(theirs, height, width).items()
    }
    assert all(far < 0.04 for far, _ in apart.values()), apart
    assert all(num > 4000 for _, num in apart.values()), apart
    down, right, area = (*draw.place.T, draw.area[:, 0])
    assert np.abs(np.corrcoef([down, right, area]) - np.eye(3)).max() < 0.05


def test_windows_of_ordinary_images_stay_what_they_were():
    """Runs that were begun before tiny images were thought of go on with the same crops."""
    draw = draws(2000, seed=9)
    sizes = ((375, 500), (500, 375), (64, 64), (33, 47), (10, 1000))
    sizes += ((1000, 10), (17, 5), (4000, 3000), (9, 9), (7, 6))
    windows = [window(draw, 200 * k + i, *size) for k, size in enumerate(sizes) for i in range(200)]
    digest = hashlib.sha256(np.array(windows, "<i8").tobytes()).hexdigest()
    assert digest == "d4c28cfd14febe943289d008b2e43777df72578b0438b73f5fcba82dfa6190ea"


def test_an_image_too_long_for_any_attempt_gives_its_largest_central_window():
    draw = draws(50)
    assert (0, 493, 10, 13) in [window(draw, i, 10, 1000) for i in range(50)]
    assert window(draw._replace(area=np.ones_like(draw.area)), 0, 1000, 10) == (493, 0, 13, 10)


@pytest.mark.parametrize(("height", "width"), TINY)
def test_windows_have_at_least_a_pixel(height, width):
    draw = draws(500)
    for i in range(500):
        top, left, h, w = window(draw, i, height, width)
        assert 1 <= h <= height - top
        assert 1 <= w <= width - left
        assert min(top, left) >= 0


def encoded(height, width):
    random = np.random.default_rng((height, width))
    buffer = io.BytesIO()
    Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8)).save(buffer, "PNG")
    return np.frombuffer(buffer.getvalue(), np.uint8)


@pytest.mark.parametrize(("height", "width"), [*TINY, (33, 47), (10, 1000), (375, 500), (1000, 10)])
def test_dali_has_the_same_windows(height, width):
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    dali, count = import_dali(), 200
    draw, image = draws(count), encoded(height, width)
    pipeline = dali.Pipeline(batch_size=count, num_threads=1, device_id=None, exec_dynamic=True)
    with pipeline:
        inputs = dali.fn.external_source(
            source=iter([([image] * count, draw.area, draw.ratio, draw.place)]), num_outputs=4, batch=True
        )
        pipeline.set_outputs(*_window(dali, *inputs))
    pipeline.build()
    starts, shapes = (dense(output).tolist() for output in pipeline.run())
    theirs = [(*start, *shape) for start, shape in zip(starts, shapes, strict=True)]
    assert theirs == [window(draw, i, height, width) for i in range(count)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    for split in ("train", "val"):
        folder = root / split / "n0"
        folder.mkdir(parents=True)
        for size in TINY:
            with Image.open(io.BytesIO(encoded(*size).tobytes())) as image:
                image.save(folder / "{}x{}.png".format(*size))
                image.save(folder / "{}x{}.jpg".format(*size))
    return root


def test_both_backends_train_on_tiny_images(tiny):
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    files = load_image_files(tiny, "train")
    crops = CropStream(len(files), len(files), seed=3, flip=True, sizes=((0, 32),))
    ours = TorchFileLoader(files, crops, CPU, 0, refuse)
    dalis = DaliFileLoader(files, crops, CPU, 2, "cpu", refuse)
    for epoch in range(5):
        (a,), (b,) = ours.epoch(epoch), dalis.epoch(epoch)
        assert (a.images.int() - b.images.int()).abs().max() <= 2


def test_both_backends_evaluate_tiny_images_as_torchvision(tiny):
    """256 x 128000 pixels become of 1 x 500, as torchvision's Resize has it, before the crop."""
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    files, v2 = load_image_files(tiny, "test"), import_transforms()
    order, size = EvalStream(len(files), len(files)), (256, 224)
    (ours,) = TorchFileLoader(files, order, CPU, 0, refuse, size).epoch(0)
    (dalis,) = DaliFileLoader(files, order, CPU, 2, "cpu", refuse, size).epoch(0)
    assert (ours.images.int() - dalis.images.int()).abs().max() <= 2
    transform = v2.Compose([v2.PILToTensor(), v2.Resize(256, antialias=True), v2.CenterCrop(224)])
    for file, image in zip(files.files, ours.images, strict=True):
        with Image.open(tiny / file) as opened:
            assert (image.int() - transform(opened.convert("RGB")).int()).abs().max() <= 2, file


@pytest.mark.parametrize(("world_size", "micro_batches"), [(2, 1), (4, 1), (2, 3)])
def test_ranks_share_the_global_batch(world_size, micro_batches):
    """Every field of all ranks' draws, put together, is the draw of one rank alone."""

    def stream(rank, world_size, micro_batches):
        return CropStream(
            50, 12, seed=3, rank=rank, world_size=world_size, micro_batches=micro_batches, flip=True
        )

    ranks = [stream(rank, world_size, micro_batches) for rank in range(world_size)]
    for step in range(5):
        parts = [rank.draw(1, step * micro_batches + k) for k in range(micro_batches) for rank in ranks]
        whole = stream(0, 1, 1).draw(1, step)
        for field in ("indices", "counts", "area", "ratio", "place", "flip"):
            together = np.concatenate([getattr(part, field) for part in parts])
            assert np.array_equal(together, getattr(whole, field)), field
        counting = np.concatenate([part.indices[part.counts] for part in parts])
        assert len(set(counting.tolist())) == len(counting) == (12 if step < 4 else 2)
