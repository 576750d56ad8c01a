"""AC/DC in a loop of Hugging Face accelerate: run it by `accelerate launch examples/accelerate_loop.py`.

Needs accelerate, tested with 1.15. It trains on noise; put your own model and data in place of make_model and
make_loader.
"""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sparsity import ACDC, GlobalMagnitude, PhaseSchedule, measure

ACCUMULATION = 2
SCHEDULE = PhaseSchedule.parse("dense 1, (sparse 1, dense 1) x2, sparse 1")


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))


def make_loader() -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 16, generator=generator)
    return DataLoader(TensorDataset(x, x[:, :4].argmax(1)), batch_size=8)


def main(save_to: str | None = None, resume: str | None = None, epochs: int = SCHEDULE.num_epochs) -> ACDC:
    accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATION)
    model, loader = make_model(), make_loader()
    steps = -(-len(loader) // (ACCUMULATION * accelerator.num_processes))
    acdc = ACDC(model, GlobalMagnitude(0.9), SCHEDULE, steps)  # before prepare, which may wrap the model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    acdc.attach(optimizer.optimizer)
    accelerator.register_for_checkpointing(acdc)
    if resume:
        accelerator.load_state(resume)  # the model with its masks first, registered objects last
    for _ in range(acdc.step // steps, epochs):
        for index, (x, y) in enumerate(loader):
            if index % ACCUMULATION == 0:
                acdc.before_step()
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.cross_entropy(model(x), y))
                optimizer.step()
                optimizer.zero_grad()
    if save_to:
        accelerator.save_state(save_to)
    return acdc


if __name__ == "__main__":
    trained = main()
    print(trained, measure(trained.model, trained.masks()).overall)
