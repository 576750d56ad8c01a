"""What DALI is asked to do on a GPU, as its graph shows, and who keeps its memory: without a GPU."""

import re
import weakref

import pytest
import torch

from data.dali.arrays import DaliArrayLoader
from data.dali.decode import DeviceJpeg
from data.dali.files import DaliFileLoader
from data.dali.pipeline import Lent
from data.datasets import fashion_mnist
from data.images.files import load_image_files
from data.loader import Batch
from data.stream import EvalStream, TrainStream
from tests.conftest import refuse
from tests.data.photographs import make_tree
from tests.data.test_file_loaders import stream

pytest.importorskip("nvidia.dali", reason="DALI is not installed")
GPU = torch.device("cuda", 0)
JPEG = DeviceJpeg(engine_load=0.4, width_hint=640, height_hint=480)
EVALUATION = (64, 56)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return load_image_files(make_tree(tmp_path_factory.mktemp("tree"), 2, 5), "train")


def images(files, evaluation, decode_on="gpu", device=GPU):
    order = EvalStream(len(files), 8) if evaluation else stream(files)
    return DaliFileLoader(files, order, device, 2, decode_on, refuse, evaluation, JPEG)


def operators(loader):
    """(name, arguments as text, devices of inputs) of each of the graph's operators."""
    loader._device_id = lambda: None
    pipeline = loader._fed_by_name()
    pipeline.serialize()  # refuses unknown arguments and inputs on the wrong device
    assert all(node.device == "gpu" for node in pipeline._graph_outputs) == (loader.device.type == "cuda")
    found = []
    for op in pipeline._ops:
        text = str(op.spec).split("Arguments:")[1].split("_origin_stack")[0]
        arguments = dict(re.findall(r"^ *(\w+): (.*)$", text, re.MULTILINE))
        found.append((arguments.get("_display_name"), arguments, [node.device for node in op.inputs or ()]))
    return found


def decoder(loader):
    found = operators(loader)
    ((_, arguments, inputs),) = [op for op in found if op[1]["_module"] == "nvidia.dali.fn.decoders"]
    return arguments, inputs


@pytest.mark.parametrize("evaluation", [None, EVALUATION])
def test_a_device_decodes_with_the_cpus_chroma_and_the_recipes_settings(files, evaluation):
    arguments, inputs = decoder(images(files, evaluation))
    assert arguments["device"] == "mixed"
    assert set(inputs) == {"cpu"}
    assert arguments["jpeg_fancy_upsampling"] == "True"
    assert float(arguments["hw_decoder_load"]) == pytest.approx(0.4)
    assert arguments["preallocate_width_hint"] == "640"
    assert arguments["preallocate_height_hint"] == "480"
    assert arguments["adjust_orientation"] == "False"


@pytest.mark.parametrize("device", [GPU, torch.device("cpu")])
@pytest.mark.parametrize("evaluation", [None, EVALUATION])
def test_the_cpus_decoder_is_told_nothing_of_it(files, evaluation, device):
    arguments, _ = decoder(images(files, evaluation, "cpu", device))
    assert arguments["device"] == "cpu"
    assert not {"jpeg_fancy_upsampling", "hw_decoder_load", "preallocate_width_hint"} & set(arguments)


@pytest.mark.parametrize("decode_on", ["cpu", "gpu"])
@pytest.mark.parametrize("evaluation", [None, EVALUATION])
def test_on_a_device_only_pixels_are_on_the_device(files, evaluation, decode_on):
    """Where, how large and whether mirrored stays on the CPU, where DALI reads it."""
    for name, arguments, inputs in operators(images(files, evaluation, decode_on)):
        if arguments["device"] == "gpu":
            assert inputs[1:].count("gpu") == 0, name
            assert name != "constant"


def test_small_images_are_cropped_on_the_device_with_shifts_from_the_cpu():
    arrays = fashion_mnist.load(None, "test")
    order = TrainStream(len(arrays), 32, seed=7, crop_padding=4, flip=True)
    found = operators(DaliArrayLoader(arrays, order, GPU))
    on_device = {name: inputs for name, arguments, inputs in found if arguments["device"] == "gpu"}
    assert on_device["slice"] == ["gpu", "cpu"]
    assert on_device["flip"] == ["gpu", "cpu"]
    assert "constant" not in on_device


def test_the_fingerprint_names_what_changes_pixels_and_no_more(files):
    def fingerprint(decode_on="gpu", device=GPU, **jpeg):
        order = stream(files)
        settings = DeviceJpeg(**jpeg)
        return DaliFileLoader(files, order, device, 2, decode_on, refuse, None, settings).fingerprint()

    on_cpu, decoded_on_cpu = fingerprint("cpu", torch.device("cpu")), fingerprint("cpu")
    assert "pixels" not in on_cpu  # checkpoints from before go on
    assert len({str(each) for each in (on_cpu, decoded_on_cpu, fingerprint())}) == 3
    assert fingerprint(engine_load=0.5) != fingerprint(engine_load=1.0)
    assert fingerprint(width_hint=640, height_hint=480) == fingerprint()
    assert fingerprint("cpu", engine_load=0.5) == decoded_on_cpu


def test_batches_are_kept_until_the_device_has_read_them(monkeypatch):
    events = []

    class Event:
        def __init__(self):
            self.recorded = self.done = False
            events.append(self)

        def record(self):
            self.recorded = True

        def query(self):
            assert self.recorded
            return self.done

    monkeypatch.setattr(torch.cuda, "Event", Event)
    lent, alive = Lent(), []
    for _ in range(4):
        lent.take_back()
        batch = lent.lend(Batch(torch.zeros(1), torch.zeros(1)))
        alive.append(weakref.ref(batch.images))
        del batch  # the host goes on at once, far ahead of the device
    assert [ref() is not None for ref in alive] == [True] * 4
    assert len(events) == 3  # what is enqueued with the last batch is not complete yet
    events[0].done = events[1].done = True
    lent.take_back()
    assert [ref() is not None for ref in alive] == [False, False, True, True]
    assert len(events) == 4
    events[2].done = events[3].done = True
    lent.take_back()
    assert not any(ref() is not None for ref in alive)
