"""AC/DC in PyTorch Lightning: a callback.

callback = ACDCCallback(GlobalMagnitude(0.9), schedule, steps_per_epoch)
trainer = Trainer(max_epochs=schedule.num_epochs, callbacks=[callback])

Needs pytorch-lightning, tested with 2.6. It masks the module before optimizers are made and checkpoints read.
Masks are in the module's state, counters in the callback's: Lightning's own checkpoints go on in any phase.
"""

from typing import Any

import pytorch_lightning as pl

from sparsity import ACDC, Pattern, PhaseSchedule


class ACDCCallback(pl.Callback):
    """steps_per_epoch: optimizer steps, len(loader) / accumulate_grad_batches rounded up. layers: include and
    exclude, as ACDC takes them."""

    def __init__(
        self, pattern: Pattern, schedule: PhaseSchedule, steps_per_epoch: int, **layers: Any
    ) -> None:
        self.arguments, self.layers = (pattern, schedule, steps_per_epoch), layers
        self.acdc: ACDC | None = None
        self.loaded: dict[str, Any] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit" and self.acdc is None:
            self.acdc = ACDC(pl_module, *self.arguments, **self.layers)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.acdc.attach(*trainer.optimizers)
        if self.loaded is not None:
            self.acdc.load_state_dict(self.loaded)
            self.loaded = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.acdc.before_step()

    def state_dict(self) -> dict[str, Any]:
        return self.acdc.state_dict() if self.acdc is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.loaded = state_dict  # until the module's masks are loaded, too
