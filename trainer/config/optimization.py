"""The sections of a recipe on how weights are trained: optimizer, learning rate, loss, mixing, averages."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from trainer.config.data import Section
from trainer.config.durations import Duration

# Fields that not all optimizers have, and whose they are
_OPTIMIZERS_OF = {
    "momentum": ("sgd", "rmsprop"),
    "nesterov": ("sgd",),
    "betas": ("adamw",),
    "alpha": ("rmsprop",),
    "eps": ("adamw", "rmsprop"),
}


class OptimizerConfig(Section):
    name: Literal["sgd", "adamw", "rmsprop"] = Field(
        default="sgd", description="the optimizer, computed as torch.optim's of that name"
    )
    lr: float = Field(gt=0, description="base learning rate, for the whole batch_size")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="sgd, rmsprop; 0: none")
    nesterov: bool = Field(default=False, description="sgd: Nesterov's momentum, which must then be above 0")
    betas: list[float] = Field(
        default=[0.9, 0.999], description="adamw: decay of the first and of the second moment, below 1"
    )
    alpha: float = Field(default=0.99, ge=0, lt=1, description="rmsprop: decay of the second moment")
    eps: float = Field(default=1e-8, gt=0, description="adamw, rmsprop: added to the divisor")
    weight_decay: float = Field(
        default=0.0, ge=0, description="as in the paper on all parameters; adamw: apart from the gradient"
    )
    decay_norms_and_biases: bool = Field(
        default=True,
        description="false: no weight decay on biases, normalisation and other vectors, nor on what the "
        "model itself names in no_weight_decay()",
    )

    clip_norm: float = Field(
        default=0.0,
        ge=0,
        description="largest norm of a step's gradient, over all parameters; 0: not clipped",
    )

    @model_validator(mode="after")
    def _fields_of_this_optimizer(self) -> OptimizerConfig:
        for key, owners in _OPTIMIZERS_OF.items():
            value = getattr(self, key)
            if self.name not in owners and value != type(self).model_fields[key].default:
                raise ValueError(
                    f"{key}={value} belongs to {' and '.join(owners)}, not to {self.name}; leave it out, or "
                    "replace the section that a base brings, as in "
                    f"'optimizer={{name: {self.name}, lr: {self.lr:g}}}'"
                )
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {self.betas} are two numbers of at least 0 and below 1: [0.9, 0.999]")
        return self


class LRConfig(Section):
    kind: Literal["cosine", "step", "constant"] = Field(
        default="cosine", description="how the learning rate falls after the warm-up"
    )
    by: Literal["epoch", "step"] = Field(
        default="epoch", description="how often it changes: epoch, as in the paper, or every optimizer step"
    )
    warmup_epochs: int = Field(
        default=0,
        ge=0,
        description="lr * (epoch + 1) / warmup_epochs for these epochs; by steps with by: step",
    )
    warmup: Duration | None = Field(
        default=None, description="the warm-up as a duration, 5ep or 500st, in place of warmup_epochs"
    )
    milestones: list[int] = Field(
        default=[], description="step: epochs from which lr is multiplied by gamma again"
    )
    gamma: float = Field(default=0.1, gt=0, le=1, description="step: the factor")
    floor: float = Field(default=0.0, ge=0, description="cosine: the learning rate that it falls towards")

    @model_validator(mode="after")
    def _milestones_for_step(self) -> LRConfig:
        if (self.kind == "step") != bool(self.milestones):
            raise ValueError("milestones belong to kind: step, which needs them")
        if self.milestones != sorted(set(self.milestones)) or any(m < 1 for m in self.milestones):
            raise ValueError(f"milestones {self.milestones} are epochs of 1 or more in rising order")
        if self.floor and self.kind != "cosine":
            raise ValueError(f"floor={self.floor:g} belongs to kind: cosine")
        if self.warmup is not None and self.warmup_epochs:
            raise ValueError(
                f"warmup={self.warmup} and warmup_epochs={self.warmup_epochs} say the same; leave one out "
                "(warmup_epochs=0)"
            )
        if self.warmup is not None and self.warmup.endswith("st") and self.by == "epoch":
            raise ValueError(f"warmup={self.warmup} in steps needs by: step; or give it in epochs, as in 5ep")
        return self


class EMAConfig(Section):
    decay: float = Field(
        gt=0, lt=1, description="weight of the average so far in each step: 0.999 for short runs, 0.9999"
    )


class MixingConfig(Section):
    mixup: float = Field(
        default=0.0, ge=0, description="mixup: images are blended by a share from Beta(mixup, mixup); 0: none"
    )
    cutmix: float = Field(
        default=0.0, ge=0, description="cutmix: a box takes a share from Beta(cutmix, cutmix); 0: none"
    )
    probability: float = Field(default=1.0, gt=0, le=1, description="share of the steps that mix at all")
    switch: float = Field(
        default=0.5, ge=0, le=1, description="with both, share of the mixing steps that take cutmix"
    )

    @model_validator(mode="after")
    def _something_to_mix(self) -> MixingConfig:
        if not self.mixup and not self.cutmix:
            raise ValueError("mixing needs mixup or cutmix above 0, as in mixing.mixup=0.2")
        if self.switch != type(self).model_fields["switch"].default and not (self.mixup and self.cutmix):
            raise ValueError(f"switch={self.switch:g} chooses between mixup and cutmix, and one of them is 0")
        return self


class LossConfig(Section):
    label_smoothing: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="share of the target that is spread over all classes, in training; evaluation has none",
    )
