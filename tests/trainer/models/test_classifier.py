import pytest
import torch
from torch import nn
from torch.nn import functional

from data.loader import PADDING_LABEL, Batch
from trainer.evaluate import Metrics, evaluate
from trainer.models.classifier import Classifier


class Logits(nn.Module):
    """Its pixels are its logits: 10 channels of 1 x 1."""

    def forward(self, x):
        return x.flatten(1)


def classifier(label_smoothing=0.0):
    return Classifier(Logits(), [0.5] * 10, [0.25] * 10, label_smoothing)


IMAGES = torch.randint(0, 256, (40, 10, 1, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(0, 10, (40,), generator=torch.Generator().manual_seed(1))
NORMALISED = ((IMAGES.double() / 255 - 0.5) / 0.25).flatten(1)


def test_training_gives_the_mean_loss_and_counts():
    loss, counts = classifier().train()(IMAGES, LABELS)
    expected = functional.cross_entropy(NORMALISED, LABELS)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    right = (NORMALISED.argmax(1) == LABELS).sum().item()
    assert counts.tolist() == pytest.approx([40 * expected.item(), right, 0, 40], rel=1e-5)


def test_padding_carries_no_loss_and_changes_no_weight_of_the_others():
    labels = LABELS.clone()
    labels[30:] = PADDING_LABEL
    loss, counts = classifier().train()(IMAGES, labels)
    losses = functional.cross_entropy(NORMALISED, LABELS, reduction="none")[:30]
    assert loss.item() == pytest.approx(losses.sum().item() / 40, rel=1e-5)
    right = (NORMALISED.argmax(1) == LABELS)[:30].sum().item()
    assert counts.tolist() == pytest.approx([losses.sum().item(), right, 0, 30], rel=1e-5)
    loss, counts = classifier().train()(IMAGES, torch.full_like(LABELS, PADDING_LABEL))
    assert loss.item() == 0
    assert not counts.any()


@pytest.mark.parametrize("padded", [0, 10])
def test_smoothed_labels_are_torchs_in_training_alone(padded):
    labels = LABELS.clone()
    labels[40 - padded :] = PADDING_LABEL
    for module in (classifier(0.1), torch.compile(classifier(0.1), backend="eager", fullgraph=True)):
        loss, counts = module.train()(IMAGES, labels)
        losses = functional.cross_entropy(NORMALISED, LABELS, reduction="none", label_smoothing=0.1)
        expected = losses[: 40 - padded].sum().item()
        assert loss.item() == pytest.approx(expected / 40, rel=1e-5)
        assert counts[0].item() == pytest.approx(expected, rel=1e-5)
        loss, counts = module.eval()(IMAGES, labels)
        plain = functional.cross_entropy(NORMALISED, LABELS, reduction="none")[: 40 - padded].sum().item()
        assert loss.item() == counts[0].item() == pytest.approx(plain, rel=1e-5)


def test_without_smoothing_the_bits_are_those_of_plain_cross_entropy():
    module = classifier().train()
    loss, _ = module(IMAGES, LABELS)
    logits = module.model((IMAGES - module.mean) / module.std).float()
    assert torch.equal(loss, functional.cross_entropy(logits, LABELS, reduction="sum") / 40)


def test_evaluation_ignores_padding_and_counts_top5():
    labels = LABELS.clone()
    labels[30:] = PADDING_LABEL

    class Loader:
        batches_per_epoch = 2

        def epoch(self, epoch, start=0):
            yield Batch(IMAGES[:20], labels[:20])
            yield Batch(IMAGES[20:], labels[20:])

        def fingerprint(self):
            return {}

    module = classifier().train()
    metrics = evaluate(module, Loader(), torch.device("cpu"))
    best = NORMALISED[:30].topk(5).indices == LABELS[:30, None]
    assert metrics.num_images == 30
    assert metrics.top1 == pytest.approx(100 * best[:, 0].float().mean().item())
    assert metrics.top5 == pytest.approx(100 * best.any(1).float().mean().item())
    assert metrics.loss == pytest.approx(
        functional.cross_entropy(NORMALISED[:30], LABELS[:30]).item(), rel=1e-5
    )
    assert module.training


def test_wrong_predictions_are_wrong():
    logits = torch.zeros(4, 10, 1, 1, dtype=torch.uint8)
    logits[:, 3] = 200
    _, counts = classifier().eval()(logits, torch.tensor([3, 3, 4, 5]))
    assert Metrics.of(counts).top1 == 50
