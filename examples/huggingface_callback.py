"""AC/DC in the Trainer of Hugging Face transformers: a callback.

acdc = ACDC(model, GlobalMagnitude(0.9), schedule, steps_per_epoch)  # before the Trainer is made
trainer = Trainer(model, arguments, train_dataset=..., callbacks=[ACDCCallback(acdc)])

Needs transformers and accelerate, tested with 5.24 and 1.15. num_train_epochs is the schedule's;
steps_per_epoch counts optimizer steps. Masks are in the model's state; the callback puts its counters beside
it, into every checkpoint.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparsity import ACDC

FILE = "acdc.pt"


def checkpoint(arguments: TrainingArguments, state: TrainerState) -> Path:
    return Path(arguments.output_dir, f"checkpoint-{state.global_step}")


class ACDCCallback(TrainerCallback):
    def __init__(self, acdc: ACDC) -> None:
        self.acdc = acdc

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        optimizer = kwargs["optimizer"]
        self.acdc.attach(getattr(optimizer, "optimizer", optimizer))  # accelerate wraps it
        if state.global_step > 0:  # resumed: the model's masks are loaded
            self.acdc.load_state_dict(torch.load(checkpoint(args, state) / FILE, weights_only=True))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.acdc.before_step()  # once per optimizer step, whatever is accumulated

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            torch.save(self.acdc.state_dict(), checkpoint(args, state) / FILE)
