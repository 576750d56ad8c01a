"""DALI on a GPU against DALI on the CPU and Pillow: pixels, bad files, resumption, order of streams.

Photographs are drawn here, so that nothing but DALI and Pillow is needed. pytest -s prints the differences.
"""

import numpy as np
import pytest
import torch

from data.augment import OPERATIONS, Augment, apply_to_batch
from data.crops import CropStream
from data.dali.decode import DeviceJpeg
from data.datasets.arrays import ImageArrays
from data.images.files import load_image_files
from data.stream import EvalStream, TrainStream
from tests.conftest import refuse

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
pytest.importorskip("nvidia.dali", reason="DALI is not installed")
Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")

from data.dali.arrays import DaliArrayLoader  # noqa: E402
from data.dali.files import DaliFileLoader  # noqa: E402

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
BATCH, SIDE = 8, 48
SLEEP = 50_000_000  # cycles: some 30 ms


def picture(number, width, height):
    """Smooth colours with sharp edges of colour between them, where chroma's interpolation shows."""
    random = np.random.default_rng(number)
    small = Image.fromarray(random.integers(0, 256, (9, 9, 3), dtype=np.uint8))
    pixels = np.array(small.resize((width, height), Image.Resampling.BICUBIC))
    for _ in range(6):
        top, left = random.integers(0, height - 8), random.integers(0, width - 8)
        tall, wide = random.integers(4, height // 2), random.integers(4, width // 2)
        pixels[top : top + tall, left : left + wide] = random.integers(0, 256, 3)
    return Image.fromarray(pixels)


def write(path, number, width, height, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"quality": 90, "subsampling": "4:2:0", **options}
    picture(number, width, height).save(path, "JPEG", **options)


def make_tree(root):
    """40 training images in two classes, of odd sizes; a progressive, a greyscale and a 4:4:4 one, a PNG."""
    for number in range(40):
        random = np.random.default_rng((number, 1))
        width, height = (int(side) * 2 + 1 for side in random.integers(40, 150, 2))
        path = root / "train" / f"n{number % 2}" / f"{number:03}.JPEG"
        kind = {3: {"progressive": True}, 5: {"subsampling": "4:4:4"}, 9: {"subsampling": "4:2:2"}}
        write(path, number, width, height, **kind.get(number, {}))
        if number == 7:
            picture(number, width, height).convert("L").save(path, "JPEG")
        elif number == 11:
            picture(number, width, height).save(path, "PNG")
    return root


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return make_tree(tmp_path_factory.mktemp("tree"))


def training(root, device=GPU, decode_on=None, on_bad=refuse, **jpeg):
    files = load_image_files(root, "train", keep_excluded=True)
    crops = CropStream(len(files), BATCH, seed=5, flip=True, sizes=((0, SIDE),))
    decode_on = decode_on or ("gpu" if device is GPU else "cpu")
    return DaliFileLoader(files, crops, device, 4, decode_on, on_bad, None, DeviceJpeg(**jpeg))


def evaluation(files, size, device=GPU, on_bad=refuse, **jpeg):
    decode_on, order = ("gpu" if device is GPU else "cpu"), EvalStream(len(files), BATCH)
    return DaliFileLoader(files, order, device, 4, decode_on, on_bad, size, DeviceJpeg(**jpeg))


def images_of(loader, epoch=0):
    return torch.cat([batch.images.cpu() for batch in loader.epoch(epoch)])


def differences(a, b):
    """Mean absolute difference of each image, of 255."""
    return (a.float() - b.float()).abs().mean(dim=(1, 2, 3))


def told(name, values, worst):
    print(f"\n{name}: mean {values.mean():.4f}, worst image {values.max():.4f}, worst pixel {worst} of 255")


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    """24 JPEGs of 301 x 301 in 4:2:0: evaluated at (301, 301), pixels are the decoder's, not resized."""
    root = tmp_path_factory.mktemp("squares")
    for number in range(24):
        write(root / "val" / "n0" / f"{number:03}.JPEG", number, 301, 301)
    files = load_image_files(root, "test")
    pillow = [np.asarray(Image.open(root / file).convert("RGB")) for file in files.files]
    return files, torch.from_numpy(np.stack(pillow)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("load", [0.0, 0.65, 1.0])
def test_decoded_pixels_are_pillows(squares, load):
    """Within 0.5 of 255 on average: the inverse transform's rounding, not another chroma."""
    files, pillow = squares
    ours = images_of(evaluation(files, (301, 301), engine_load=load))
    values = differences(ours, pillow)
    told(f"decoder, engine load {load}", values, (ours.int() - pillow.int()).abs().max())
    assert values.max() < 0.5


def test_chroma_is_interpolated(squares, monkeypatch):
    """What the test above would miss if its images did not show it: repeated chroma is far off."""
    files, pillow = squares
    options = DeviceJpeg.options
    ours = differences(images_of(evaluation(files, (301, 301))), pillow)
    monkeypatch.setattr(DeviceJpeg, "options", lambda self: {**options(self), "jpeg_fancy_upsampling": False})
    repeated = differences(images_of(evaluation(files, (301, 301))), pillow)
    told("chroma repeated", repeated, "?")
    assert repeated.mean() > 3 * ours.mean()


def test_how_far_engines_and_kernels_differ(squares, tree):
    """Printed: at 0, decoder_engine_load would not belong into the fingerprint."""
    files, _ = squares
    for name, make in (
        ("whole images", lambda load: evaluation(files, (301, 301), engine_load=load)),
        ("windows", lambda load: training(tree, engine_load=load)),
    ):
        engines, kernels = (images_of(make(load)) for load in (1.0, 0.0))
        values = differences(engines, kernels)
        told(f"engines and kernels, {name}", values, (engines.int() - kernels.int()).abs().max())
        assert values.max() < 0.5


@pytest.mark.parametrize("decode_on", ["cpu", "gpu"])
def test_training_pixels_are_the_cpus(tree, decode_on):
    """Crops, flips and resizing included: within 1 of 255 on average over an image."""
    on_gpu, on_cpu = training(tree, decode_on=decode_on), training(tree, CPU)
    for ours, theirs in zip(on_gpu.epoch(1), on_cpu.epoch(1), strict=True):
        assert torch.equal(ours.labels.cpu(), theirs.labels)
        values = differences(ours.images.cpu(), theirs.images)
        told(decode_on, values, (ours.images.cpu().int() - theirs.images.int()).abs().max())
        assert values.max() < 1


def test_edges_of_windows_are_right(tree):
    """nvJPEG before 13.2 interpolated chroma wrongly in the outermost pixels of a window."""
    ours, theirs = images_of(training(tree)), images_of(training(tree, CPU))
    rows = torch.cat([(ours.float() - theirs.float()).abs()[:, :, edge] for edge in (0, -1)], dim=1)
    columns = torch.cat([(ours.float() - theirs.float()).abs()[..., edge] for edge in (0, -1)], dim=1)
    worst = max(rows.mean(dim=(1, 2)).max(), columns.mean(dim=(1, 2)).max())
    print(f"\nedges: worst of an image {worst:.3f} of 255")
    assert worst < 3


def test_evaluation_pixels_are_the_cpus(tree):
    files = load_image_files(tree, "train")
    ours, theirs = (images_of(evaluation(files, (64, 56), device)) for device in (GPU, CPU))
    values = differences(ours, theirs)
    told("evaluation, resized", values, (ours.int() - theirs.int()).abs().max())
    assert values.max() < 1


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "text"])
def test_the_same_files_are_bad_and_the_same_stand_in(tmp_path, damage):
    root = make_tree(tmp_path)
    files = load_image_files(root, "train")
    number = int(training(root).stream.draw(0, 1).indices[3])
    path = root / files.files[number]
    content = path.read_bytes()
    path.write_bytes(
        {
            "truncated": content[: len(content) // 8],
            "garbage": b"\xff\xd8" + bytes(500),
            "empty": b"",
            "text": b"no image" * 100,
        }[damage]
    )
    bad, batches = {}, {}
    for device in (CPU, GPU):
        names = bad[device] = []
        loader = training(root, device, on_bad=lambda file, reason, to=names: to.append((file, reason)))
        batches[device] = [(images.cpu(), labels.cpu()) for images, labels in loader.epoch(0)]
    print(f"\n{damage}: {bad}")
    assert [file for file, _ in bad[GPU]] == [file for file, _ in bad[CPU]] == [files.files[number]]
    assert all(why for _, why in bad[GPU])
    for (ours, our_labels), (theirs, their_labels) in zip(batches[GPU], batches[CPU], strict=True):
        assert torch.equal(our_labels, their_labels)
        assert differences(ours, theirs).max() < 1


def test_a_bad_file_does_not_count_in_evaluation(tmp_path):
    root = make_tree(tmp_path)
    files = load_image_files(root, "train")
    (root / files.files[6]).write_bytes(b"no image")
    names = []
    loader = evaluation(files, (64, 56), on_bad=lambda file, _: names.append(file))
    labels = torch.cat([batch.labels.cpu() for batch in loader.epoch(0)])
    assert names == [files.files[6]]
    assert (labels >= 0).sum() == 39
    assert labels[6] < 0


def test_any_position_can_be_resumed_bit_for_bit(tree):
    through = training(tree)
    whole = [[(i.cpu(), n.cpu()) for i, n in through.epoch(epoch)] for epoch in range(3)]
    for epoch, index in ((0, 0), (0, 3), (1, 2), (2, 4)):
        resumed = list(training(tree).epoch(epoch, index))
        for (images, labels), (then, labels_then) in zip(resumed, whole[epoch][index:], strict=True):
            assert torch.equal(images.cpu(), then)
            assert torch.equal(labels.cpu(), labels_then)


def arrays():
    from data.datasets import fashion_mnist

    return fashion_mnist.load(None, "test")


def test_small_images_are_the_cpus_bit_for_bit():
    data = arrays()
    order = TrainStream(len(data), 32, seed=7, crop_padding=4, flip=True)
    loaders = [DaliArrayLoader(data, order, device) for device in (GPU, CPU)]
    for _, ours, theirs in zip(range(20), *(loader.epoch(0) for loader in loaders), strict=False):
        assert torch.equal(ours.images.cpu(), theirs.images)
        assert torch.equal(ours.labels.cpu(), theirs.labels)


@pytest.mark.parametrize("decode_on", ["cpu", "gpu"])
def test_batches_are_channels_last_bytes_on_the_device(tree, decode_on):
    images, labels = next(training(tree, GPU, decode_on).epoch(0))
    assert images.shape == (BATCH, 3, SIDE, SIDE)
    assert (images.device, labels.device) == (GPU, GPU)
    assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert labels.shape == (BATCH,)


def test_batches_stay_as_they_are_while_the_pipeline_goes_on(tree):
    loader = training(tree)
    kept = [(images, images.clone()) for images, _ in loader.epoch(0)]
    for epoch in range(1, 6):
        for _ in loader.epoch(epoch):
            pass
    torch.cuda.synchronize()
    assert all(torch.equal(now, then) for now, then in kept)


def weighed(images):
    """One number that any changed pixel changes."""
    flat = images.permute(0, 2, 3, 1).flatten().long()
    return (flat * torch.arange(1, len(flat) + 1, device=flat.device)).sum()


@pytest.mark.parametrize("own_stream", [False, True])
def test_a_device_that_lags_behind_sees_every_batch_whole(tree, own_stream):
    """The host is many batches ahead of the device and has let go of them: none may be written over before
    it was read, nor read before it was written."""
    expected = []
    for epoch in range(4):
        for images, _ in training(tree).epoch(epoch):
            torch.cuda.synchronize()
            expected.append(weighed(images).item())
    stream = torch.cuda.Stream() if own_stream else torch.cuda.current_stream()
    found, loader = [], training(tree)
    with torch.cuda.stream(stream):
        for epoch in range(4):
            for i, (images, _) in enumerate(loader.epoch(epoch)):
                if i % 2:
                    torch.cuda._sleep(SLEEP)
                found.append(weighed(images))
                del images
    torch.cuda.synchronize()
    assert [value.item() for value in found] == expected


def test_the_host_does_not_wait_for_the_devices_work(tree):
    """In a stream of its own, as a run has it: see trainer.distributed.ranks.start."""
    with torch.cuda.stream(torch.cuda.Stream()):
        loader = training(tree)
        for batch in loader.epoch(0):  # memory is allocated, for which the host does wait
            del batch
        batches = loader.epoch(1)
        for _ in range(3):
            next(batches)
        torch.cuda.synchronize()
        torch.cuda._sleep(60 * SLEEP)  # seconds
        busy = torch.cuda.Event()
        busy.record()
        next(batches)
        assert not busy.query()
        torch.cuda.synchronize()


@pytest.mark.parametrize("channels", [3, 1])
def test_operations_are_torchvisions(channels):
    """To 2 of 255, but for pixels that come from the very edge between two, where rounding decides which."""
    images = np.stack([np.array(picture(i, 48, 40)) for i in range(64)])
    images = np.ascontiguousarray(images[..., :channels])
    arrays = ImageArrays(images, np.arange(64) % 10, 10, (0.5,) * channels, (0.5,) * channels, "pictures")
    augment, worst = Augment("trivial"), {}
    order = TrainStream(64, 64, seed=3, augment=augment)
    on_gpu = DaliArrayLoader(arrays, order, GPU)
    plain = DaliArrayLoader(arrays, TrainStream(64, 64, seed=3), CPU)
    for epoch in range(8):
        ours, expected = images_of(on_gpu, epoch), images_of(plain, epoch)
        draw = order.draw(epoch, 0)
        magnitudes = augment.magnitudes(draw.operations, draw.levels, 40, 48)
        expected = apply_to_batch(expected, draw.operations, magnitudes)
        far = ((ours.int() - expected.int()).abs() > 2).float().mean(dim=(1, 2, 3))
        for (operation,), share in zip(draw.operations, far.tolist(), strict=True):
            worst[OPERATIONS[operation]] = max(share, worst.get(OPERATIONS[operation], 0))
    print(f"augmentation, {channels} channels, share of pixels that differ, worst image: {worst}")
    assert len(worst) == len(OPERATIONS)
    assert max(worst.values()) < 0.1
