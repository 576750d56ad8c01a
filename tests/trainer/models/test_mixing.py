"""Mixup and CutMix: their law, draws by place, and runs with them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn import functional

from data.loader import PADDING_LABEL
from data.torchvision_import import import_torchvision
from tests.trainer.distributed.small_net import small
from tests.trainer.models.test_classifier import classifier
from tests.trainer.runs import assert_equal_states, build, final_state, fit_and_close, newest_run, refusal
from trainer.config.optimization import MixingConfig
from trainer.errors import UserError
from trainer.models.mixing import Mixer, mix

IMAGES = torch.randint(0, 256, (8, 3, 20, 14), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8)
PAIRS = [0, 2, 4, 6, 7, 5, 3, 1]  # an order in which timm, that mixes first and last, mixes neighbours
BOTH = MixingConfig(mixup=0.8, cutmix=1.0, probability=0.8, switch=0.4)


@pytest.mark.parametrize(
    "config",
    [BOTH, MixingConfig(mixup=0.2), MixingConfig(cutmix=1.0)],
    ids=["both", "mixup", "cutmix"],
)
def test_batches_and_losses_are_timms(config, monkeypatch):
    import_torchvision()
    pytest.importorskip("timm", reason="timm is not installed")
    from timm.data import mixup
    from timm.loss import SoftTargetCrossEntropy

    theirs = mixup.Mixup(
        config.mixup,
        config.cutmix,
        prob=config.probability,
        switch_prob=config.switch,
        label_smoothing=0.1,
        num_classes=10,
    )
    mixer, logits = Mixer(config, 5), torch.randn(8, 10, generator=torch.Generator().manual_seed(1))
    kinds = set()
    for step in range(60):
        random = np.random.default_rng((5, 2, 3, step))
        draws = SimpleNamespace(rand=random.random, beta=random.beta, randint=random.integers)
        monkeypatch.setattr(mixup, "np", SimpleNamespace(**{**vars(np), "random": draws}))
        images, targets = theirs(IMAGES[PAIRS].float(), LABELS[PAIRS])
        row = mixer.row(3, step, IMAGES)
        found, others, share = mix(IMAGES.float(), LABELS, row)
        assert torch.allclose(found[PAIRS], images, rtol=1e-5, atol=1e-4)
        ours = share * functional.cross_entropy(logits, LABELS, label_smoothing=0.1)
        ours += (1 - share) * functional.cross_entropy(logits, others, label_smoothing=0.1)
        expected = SoftTargetCrossEntropy()(logits[PAIRS], targets)
        assert ours.item() == pytest.approx(expected.item(), rel=1e-5)
        kinds.add("box" if row[2] > row[1] else "blend" if share < 1 else "plain")
    assert kinds >= {"box"} if config.cutmix else {"blend"}
    assert config is not BOTH or kinds == {"box", "blend", "plain"}


def test_draws_depend_on_seed_epoch_and_step_alone():
    mixer = Mixer(BOTH, 1)
    rows = [mixer.row(2, step, IMAGES).tolist() for step in range(6)]
    assert len(set(map(tuple, rows))) > 3
    assert Mixer(BOTH, 1).row(2, 4, IMAGES).tolist() == rows[4]  # whatever came before
    late = [mixer.row(2, step, IMAGES).tolist() for step in range(254, 258)]
    assert late == [Mixer(BOTH, 1).row(2, step, IMAGES).tolist() for step in range(254, 258)]
    assert len(set(map(tuple, late))) > 1
    assert late[2:] != rows[:2]
    assert mixer.row(3, 4, IMAGES).tolist() != rows[4] != Mixer(BOTH, 2).row(2, 4, IMAGES).tolist()
    large = mixer.row(2, 0, torch.zeros(2, 1, 50, 40))
    assert large.shape == (8,)


def test_the_classifier_trains_on_both_labels_and_keeps_padding_out():
    labels = torch.tensor([3, 4, 5, PADDING_LABEL])
    images = torch.randint(0, 256, (4, 10, 1, 1), dtype=torch.uint8)
    draw = torch.tensor([0.7, 0, 0, 0, 0, 0.7, 0, 0])
    normalised = ((images.double() / 255 - 0.5) / 0.25).flatten(1)
    mixed = 0.7 * normalised + 0.3 * normalised[[1, 0, 3, 2]]

    def loss(place, label):
        return functional.cross_entropy(mixed[place], torch.tensor(label), label_smoothing=0.1).item()

    expected = 0.7 * (loss(0, 3) + loss(1, 4) + loss(2, 5)) + 0.3 * (loss(0, 4) + loss(1, 3) + loss(3, 5))
    module = classifier(0.1).train()
    found, counts = module(images, labels, draw)
    assert found.item() == pytest.approx(expected / 4, rel=1e-5)
    right = (mixed.argmax(1) == labels).sum().item()
    assert counts.tolist() == pytest.approx([expected, right, 0, 3], rel=1e-5)


def test_one_graph_for_all_draws():
    torch._dynamo.reset()
    counter = CompileCounter()
    module = torch.compile(classifier(), backend=counter, fullgraph=True, dynamic=False).train()
    mixer = Mixer(BOTH, 1)
    images = torch.zeros(4, 10, 1, 1, dtype=torch.uint8)
    for step in range(6):
        module(images, torch.arange(4), mixer.row(0, step, images))
    assert counter.frame_count == 1


def options(data, root, *overrides):
    mixing = ["mixing={mixup: 0.8, cutmix: 1.0}", "loss.label_smoothing=0.1"]
    return small(data, root, "{norm: true}", *mixing, *overrides)


def run(data, root, *overrides, stop=None):
    trainer = build(options(data, root, *overrides))
    draws = []
    trainer.engine.module.register_forward_pre_hook(lambda _, inputs: draws.append(inputs[2:]))
    fit_and_close(trainer, stop)
    return [draw[0].tolist() for draw in draws if draw]  # evaluation gets none


@pytest.mark.usefixtures("small_net")
def test_a_run_mixes_every_step_and_resumes_bit_for_bit(tiny_data, tmp_path):
    whole = run(tiny_data, tmp_path / "whole")
    assert len(whole) == 6
    assert len(set(map(tuple, whole))) == 6
    stopped = run(tiny_data, tmp_path / "stopped", stop=4)
    assert stopped + run(tiny_data, tmp_path / "stopped", "resume=auto") == whole
    assert_equal_states(*(final_state(newest_run(tmp_path / name), 6) for name in ("whole", "stopped")))


@pytest.mark.usefixtures("small_net")
def test_micro_batches_share_the_draw_of_their_step(tiny_data, tmp_path):
    """And so make the same weights."""
    one = run(tiny_data, tmp_path / "1", "model.arguments={}")
    two = run(tiny_data, tmp_path / "2", "model.arguments={}", "engine.accumulation_steps=2")
    assert two == [draw for draw in one for _ in range(2)]
    a, b = (final_state(newest_run(tmp_path / name), 6)["model"] for name in "12")
    for name, value in a.items():
        assert torch.allclose(value.float(), b[name].float(), rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["mixing={}"], "mixing needs mixup or cutmix above 0"),
        (["mixing={mixup: 0.2, switch: 0.3}"], "switch=0.3 chooses between mixup and cutmix"),
        (["mixing.mixup=-1"], "mixing.mixup"),
    ],
)
def test_mistakes(overrides, expected):
    assert expected in refusal(*overrides)


@pytest.mark.usefixtures("small_net")
def test_an_odd_batch_is_refused(tiny_data, tmp_path):
    odd = ["data.batch_size=30", "engine.accumulation_steps=2"]
    with pytest.raises(UserError, match="images are mixed in pairs, and a device gets 15 at a time"):
        run(tiny_data, tmp_path, *odd)
