"""Augmentation in DALI's pipelines: what loaders apply on a CPU, and the graph for a GPU, run on a CPU."""

import itertools

import numpy as np
import pytest
import torch

from data.augment import BINS, OPERATIONS, Augment, apply, apply_to_batch
from data.crops import CropStream
from data.dali.arrays import DaliArrayLoader
from data.dali.augment import augmented, prepared
from data.dali.files import DaliFileLoader
from data.datasets.arrays import ImageArrays
from data.images.files import load_image_files
from data.stream import TrainStream
from data.torch_files import TorchFileLoader
from tests.conftest import refuse
from tests.data.dali.test_device_graph import operators
from tests.data.photographs import make_tree, photograph

dali = pytest.importorskip("nvidia.dali", reason="DALI is not installed")
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SIDE = 40
MOVING = ("ShearX", "ShearY", "Rotate")
SPLIT = "split"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return load_image_files(make_tree(tmp_path_factory.mktemp("tree"), 2, 10, 2), "train")


@pytest.fixture(scope="module")
def arrays():
    images = np.stack([np.array(photograph(i, 28, 20)) for i in range(20)])
    return ImageArrays(images, np.arange(20) % 10, 10, (0.5,) * 3, (0.5,) * 3, "test")


def loader(kind, request, augment, device=CPU, **share):
    if kind == "arrays":
        data = request.getfixturevalue("arrays")
        order = TrainStream(20, 8, seed=4, crop_padding=2, flip=True, augment=augment, **share)
        return DaliArrayLoader(data, order, device)
    data = request.getfixturevalue("files")
    sizes = ((0, SIDE), (1, SIDE + 8))
    order = CropStream(20, 8, seed=4, flip=True, sizes=sizes, augment=augment, **share)
    if kind == "torch":
        return TorchFileLoader(data, order, device, 0, refuse)
    return DaliFileLoader(data, order, device, 2, "cpu", refuse)


@pytest.mark.parametrize("kind", ["arrays", "files", "torch"])
def test_batches_are_those_without_it_after_the_draws_operations(request, kind):
    """In the second epoch images are larger. Its second batch on, shared by ranks, is the same."""
    augment, changed = Augment("rand", 2, 12), 0
    through = loader(kind, request, augment)
    whole = [list(through.epoch(epoch)) for epoch in range(2)]
    plain = loader(kind, request, None)
    for epoch, index in itertools.product(range(2), range(3)):
        draw = through.stream.draw(epoch, index)
        expected = next(plain.epoch(epoch, index)).images.clone()
        magnitudes = augment.magnitudes(draw.operations, draw.levels, *expected.shape[2:])
        changed += int((apply_to_batch(expected.clone(), draw.operations, magnitudes) != expected).any())
        apply_to_batch(expected, draw.operations, magnitudes)
        assert torch.equal(whole[epoch][index].images, expected)
        assert whole[epoch][index].images.is_contiguous(memory_format=torch.channels_last)
    assert changed == 6
    ranks = [loader(kind, request, augment, rank=rank, world_size=2).epoch(1, 1) for rank in range(2)]
    for batch, *parts in zip(whole[1][1:], *ranks, strict=True):
        assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
        assert torch.equal(torch.cat([part.labels for part in parts]), batch.labels)


def by_dali(images, operations, magnitudes):
    """What the graph for a GPU makes of images, (N, height, width, channels), on a CPU."""
    inputs = images, *prepared(operations, magnitudes, *images.shape[1:3])

    def graph():
        nodes = dali.fn.external_source(
            source=iter([inputs]), num_outputs=4, batch=True, layout=["HWC", "", "", ""]
        )
        return augmented(dali, nodes[0], nodes[1:], operations.shape[1], images.shape[3] == 1)

    options = {"batch_size": len(images), "num_threads": 1, "device_id": None, "exec_dynamic": True}
    pipeline = dali.pipeline_def(graph, enable_conditionals=True, **options)()
    pipeline.build()
    (output,) = pipeline.run()
    return torch.from_numpy(output.as_array()).int()


@pytest.mark.parametrize(
    ("law", "height", "width", "channels"), [("trivial", 64, 64, 3), ("rand", 28, 20, 1)]
)
def test_the_graph_for_a_gpu_computes_what_torchvision_does(law, height, width, channels):
    """To 1 of 255. Where a pixel comes from the very edge between two, the nearest of shears and rotations is
    a matter of rounding: it is one that torchvision takes for a magnitude 0.0001 less or more."""
    operations, levels = np.meshgrid(range(len(OPERATIONS)), (-BINS + 1, 9, 20), indexing="ij")
    operations, levels = (part.reshape(-1, 1).astype(np.int32) for part in (operations, levels))
    images = np.stack([np.array(photograph(i, width, height)) for i in range(len(operations))])
    images = np.ascontiguousarray(images[..., :channels])
    images[0::4, :, :, 0] = 77  # one shade, which no histogram spreads
    magnitudes = Augment(law).magnitudes(operations, levels, height, width)
    ours = by_dali(images, operations, magnitudes)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    for i, (operation,) in enumerate(operations.tolist()):
        nudges = (0, -1e-4, 1e-4) if OPERATIONS[operation] in MOVING else (0,)
        theirs = [apply(pixels[i], operations[i], magnitudes[i] + np.float32(nudge)) for nudge in nudges]
        far = [(ours[i] - each.permute(1, 2, 0)).abs() for each in theirs]
        assert torch.stack(far).amin(0).max() <= 1, (OPERATIONS[operation], levels[i])


def test_operations_follow_each_other():
    """Such as are exact."""
    exact = np.array(
        [OPERATIONS.index(name) for name in ("TranslateX", "TranslateY", "Posterize", "Solarize")]
    )
    operations = np.array(list(itertools.product(exact, exact)), np.int32)
    levels = np.full(operations.shape, 17, np.int32)
    images = np.stack([np.array(photograph(i, 32, 32)) for i in range(len(operations))])
    magnitudes = Augment("trivial").magnitudes(operations, levels, 32, 32)
    expected = apply_to_batch(torch.from_numpy(images.copy()).permute(0, 3, 1, 2), operations, magnitudes)
    assert torch.equal(by_dali(images, operations, magnitudes), expected.permute(0, 2, 3, 1).int())


@pytest.mark.parametrize("kind", ["arrays", "files"])
def test_a_device_augments_pixels_by_numbers_from_the_cpu(request, kind):
    """As its graph shows, without a GPU: which branch and which matrix stay where DALI reads them."""
    num_ops = 2 if kind == "arrays" else 1
    found = operators(loader(kind, request, Augment("rand", num_ops, 9), GPU))
    branching = [
        inputs for name, arguments, inputs in found if arguments["device"] == "gpu" and SPLIT in name
    ]
    assert len(branching) >= 8 * num_ops
    for name in ("warp_affine", "filter", "equalize"):
        places = [(arguments["device"], inputs[0]) for op, arguments, inputs in found if op == name]
        assert places == [("gpu", "gpu")] * num_ops, name


@pytest.mark.parametrize("kind", ["arrays", "files"])
@pytest.mark.parametrize("device", [CPU, GPU])
def test_where_it_is_off_the_graph_has_no_word_of_it(request, kind, device):
    ours, on = (loader(kind, request, augment, device) for augment in (None, Augment("trivial")))
    assert len(on.INPUTS) == len(ours.INPUTS) + (2 if device == CPU else 3)
    names = {name for name, _, _ in operators(ours)}
    assert not names & {"warp_affine", "filter", "equalize"}
    assert SPLIT not in str(names)
