"""AC/DC in other people's loops, against the real packages: phases, zeros, and their checkpoints loaded back.

They are no part of the set-up: pip install pytorch-lightning transformers accelerate"""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from data.torchvision_import import import_torchvision
from sparsity import ACDC, GlobalMagnitude, PhaseSchedule, measure, num_leaked

EXAMPLES = Path(__file__).parents[2] / "examples"
SCHEDULE = PhaseSchedule.parse("dense 1, (sparse 1, dense 1) x2, sparse 1")
STEPS = 4  # in an epoch: 64 images, batches of 8, two of them accumulated

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of these packages


def example(name, *needed):
    import_torchvision()
    for package in needed:
        pytest.importorskip(package, reason=f"pip install {package}")
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))


def dataset():
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, x[:, :4].argmax(1))


def check_finished(acdc):
    assert acdc.step == SCHEDULE.num_epochs * STEPS
    assert acdc.phase.kind == "sparse"
    assert measure(acdc.model, acdc.masks()).overall == pytest.approx(0.9, abs=2e-3)
    assert num_leaked(acdc.weights(), acdc.masks()) == 0


def check_equal(first, second):
    check_finished(first)
    check_finished(second)
    states = first.model.state_dict(), second.model.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_they_are_short(path):
    assert len(path.read_text().splitlines()) < 60


@pytest.mark.parametrize("saved_after", [2, 3, 5])
def test_lightning(tmp_path, saved_after):
    module = example("lightning_callback", "pytorch_lightning")
    import pytorch_lightning as pl

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = make_net()

        def training_step(self, batch, _):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    def train(epochs, resume=None):
        callback = module.ACDCCallback(GlobalMagnitude(0.9), SCHEDULE, STEPS)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = pl.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            accumulate_grad_batches=2,
            callbacks=[callback],
            enable_checkpointing=False,
            **quiet,
        )
        trainer.fit(Module(), DataLoader(dataset(), batch_size=8), ckpt_path=resume)
        return trainer, callback.acdc

    trainer, stopped = train(saved_after)
    assert stopped.step == saved_after * STEPS
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    check_equal(train(SCHEDULE.num_epochs)[1], train(SCHEDULE.num_epochs, tmp_path / "saved.ckpt")[1])


@pytest.mark.parametrize("saved_at", [6, 12])
def test_transformers(tmp_path, saved_at):
    module = example("huggingface_callback", "transformers", "accelerate")
    from transformers import Trainer, TrainingArguments

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = make_net()

        def forward(self, x, labels):
            logits = self.net(x)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    def train(folder, resume=None):
        model = Net()
        acdc = ACDC(model, GlobalMagnitude(0.9), SCHEDULE, STEPS)
        arguments = TrainingArguments(
            output_dir=str(folder),
            num_train_epochs=SCHEDULE.num_epochs,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            save_steps=saved_at,
            learning_rate=1e-2,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        data = [{"x": x, "labels": y} for x, y in dataset()]
        Trainer(model, arguments, train_dataset=data, callbacks=[module.ACDCCallback(acdc)]).train(
            resume_from_checkpoint=resume
        )
        return acdc

    first = train(tmp_path)
    check_equal(first, train(tmp_path, str(tmp_path / f"checkpoint-{saved_at}")))


@pytest.mark.parametrize("saved_after", [2, 3])
def test_accelerate(tmp_path, saved_after):
    module = example("accelerate_loop", "accelerate")
    stopped = module.main(save_to=str(tmp_path / "saved"), epochs=saved_after)
    assert stopped.step == saved_after * STEPS
    check_equal(module.main(), module.main(resume=str(tmp_path / "saved")))
