"""Evaluation: dropout off, BatchNorm by its statistics, nothing changed, and figures as found by hand."""

from dataclasses import asdict

import pytest
import torch
from torch import nn

from tests.trainer.distributed.small_net import WHOLE, buffers, evaluated_by_hand, small
from tests.trainer.runs import build, records
from trainer import summary
from trainer.evaluate import confusion, evaluate
from trainer.loaders import build_test_loader
from trainer.models.classifier import Classifier


class Passes(list[tuple[set[bool], bool]]):
    """Every forward pass of a model from now on: which training modes its modules were in, and whether it
    changed a buffer."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        model.register_forward_pre_hook(self._before)
        model.register_forward_hook(self._after)

    def _before(self, *_):
        self.modes = {module.training for module in self.model.modules()}
        self.buffers = buffers(self.model)

    def _after(self, *_):
        changed = any(not torch.equal(self.buffers[name], b) for name, b in self.model.named_buffers())
        self.append((self.modes, changed))


@pytest.fixture(scope="module")
def run(small_net, tiny_data, tmp_path_factory):
    """A finished run with dropout and BatchNorm, statistics taken anew over two batches, and its passes."""
    recompute = "sparsity.recompute_batch_norm=2st"
    overrides = small(tiny_data, tmp_path_factory.mktemp("runs"), WHOLE, recompute)
    trainer = build(overrides)
    passes = Passes(trainer.acdc.model)
    trainer.fit()
    seen = list(passes)
    yield trainer, seen
    trainer.close()


def test_modules_train_in_training_and_only_there(run):
    """After an evaluation and after statistics were taken anew, training mode is back."""
    training, evaluating = [({True}, True)], [({False}, False)]
    assert run[1] == 3 * training + 4 * evaluating + (2 + 3) * training + 4 * evaluating


@pytest.mark.parametrize("kind", ["dense_twin", "sparse"])
def test_a_runs_figures_are_those_of_its_saved_models(run, kind, tiny_data):
    trainer, _ = run
    expected = evaluated_by_hand(trainer.run_dir.path / "checkpoints" / kind, tiny_data)
    found = trainer.position.pair[kind]
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-5)
    recorded = records(trainer.run_dir.path)[kind == "sparse"]
    assert {key: recorded[f"val_{key}"] for key in expected} == pytest.approx(expected, rel=1e-5)


def test_an_engine_is_as_before(run):
    """Buffers, modes of all modules, and torch's generator; twice the same figures."""
    trainer, _ = run
    module = trainer.engine.module
    before, generator = buffers(module), torch.get_rng_state()
    first, second = (evaluate(trainer.engine, trainer.loaders.test, trainer.device) for _ in range(2))
    assert first == second
    assert {part.training for part in module.modules()} == {True}
    assert all(torch.equal(before[name], buffer) for name, buffer in module.named_buffers())
    assert torch.equal(generator, torch.get_rng_state())


@pytest.mark.parametrize("training", [True, False])
def test_a_plain_model_is_evaluated_alike_and_its_mode_put_back(run, training):
    """As acdc eval does it with a model just loaded, which is in training mode."""
    trainer, _ = run
    info, device = trainer.loaders.info, trainer.device
    module = Classifier(trainer.acdc.export(), info.mean, info.std).train(training)
    found = evaluate(module, build_test_loader(trainer.config.data, device), device)
    expected = trainer.position.pair["sparse"]
    assert asdict(found) == pytest.approx({key: expected[key] for key in asdict(found)}, rel=1e-5)
    assert {part.training for part in module.modules()} == {training}


def test_the_confusion_of_classes_adds_up_to_the_accuracy(run):
    trainer, _ = run
    autocast = torch.autocast("cpu", enabled=False)
    counts = confusion(trainer.engine.module, trainer.loaders.test, 0, autocast)
    sparse = trainer.position.pair["sparse"]
    assert counts.sum() == sparse["num_images"]
    assert 100 * counts.diagonal().sum() / counts.sum() == pytest.approx(sparse["top1"])
    labels = trainer.loaders.test.arrays.labels
    assert counts.sum(1).tolist() == [int((labels == label).sum()) for label in range(len(counts))]
    assert trainer.engine.module.training


def test_a_failing_pass_costs_the_table_not_the_run(run, monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("CUDA out of memory\nmore of it")

    assert summary._confusion(run[0]) is not None
    monkeypatch.setattr(summary, "confusion", fail)
    assert summary._confusion(run[0]) is None
    assert caplog.messages == ["no table of the most confused classes: CUDA out of memory"]


def test_a_signal_costs_the_table_not_the_run(run, monkeypatch, caplog):
    monkeypatch.setattr(run[0].stop_request, "number", 15)
    assert summary._confusion(run[0]) is None
    assert caplog.messages == ["no table of the most confused classes: a signal came"]
