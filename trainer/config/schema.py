"""The typed configuration of a run. Everything is checked here before any work starts.

Each field says what it means; a recipe (configs/*.yaml) gives values, key=value overrides replace them by
dotted path.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from trainer.config.data import DataConfig, Section
from trainer.config.durations import Duration, duration_steps
from trainer.config.optimization import EMAConfig, LossConfig, LRConfig, MixingConfig, OptimizerConfig
from trainer.config.sparsity import SparsityConfig

Scalar = bool | int | float | str


class ModelConfig(Section):
    name: str = Field(description="a network's name, or package.module:function of your own")
    arguments: dict[str, Scalar] = Field(
        default={}, description="what the model takes besides: depth, width, ..."
    )
    weights: str | None = Field(
        default=None, description="a file or checkpoint with weights to start from; all else starts fresh"
    )
    weights_key: str | None = Field(
        default=None, description="where in a torch file the weights are, such as model_ema"
    )
    freeze: list[str] = Field(
        default=[], description="patterns over names of modules and parameters: which do not train"
    )

    @field_validator("weights")
    @classmethod
    def _names_a_file(cls, weights: str | None) -> str | None:
        if weights == "":
            raise ValueError("this recipe starts from a trained model: name its file, model.weights=FILE")
        return weights

    @model_validator(mode="after")
    def _key_of_a_file(self) -> ModelConfig:
        if self.weights_key is not None and self.weights is None:
            raise ValueError("weights_key says where in model.weights=FILE the weights are; name the file")
        return self

    @field_validator("arguments")
    @classmethod
    def _the_rest_is_known(cls, arguments: dict[str, Scalar]) -> dict[str, Scalar]:
        for taken in sorted({"name", "num_classes", "in_channels"} & arguments.keys()):
            raise ValueError(f"{taken} follows from the rest of the recipe; leave it out")
        return arguments


class EngineConfig(Section):
    zero_stage: int = Field(default=0, ge=0, le=3, description="DeepSpeed ZeRO stage: 0, 1 or 2")
    precision: Literal["auto", "bf16", "fp16", "tf32", "fp32"] = Field(
        default="auto", description="auto: bf16 autocast on a GPU or a CPU that multiplies bf16 in hardware"
    )
    cudnn_benchmark: bool = Field(
        default=True,
        description="on a GPU, measure which convolution algorithm is fastest, once for each shape; false: "
        "cuDNN's own choice among deterministic ones",
    )
    fast_stem: bool = Field(
        default=False,
        description="compiled for a GPU, compute the convolution of images and max pooling in forms that "
        "should suit it better; equal up to rounding, not measured yet",
    )
    compile: bool | Literal["auto"] = Field(
        default="auto", description="torch.compile; auto: where it can work"
    )
    accumulation_steps: int = Field(default=1, ge=1, description="micro-batches per optimizer step")
    deepspeed: str | None = Field(default=None, description="a DeepSpeed JSON file to merge in")

    @field_validator("zero_stage")
    @classmethod
    def _no_stage_3(cls, stage: int) -> int:
        if stage == 3:
            raise ValueError("ZeRO stage 3 is not supported with masks yet; use 0, 1 or 2")
        return stage

    @model_validator(mode="after")
    def _fp16_at_stage_0(self) -> EngineConfig:
        if self.precision == "fp16" and self.zero_stage:
            raise ValueError(
                f"precision fp16 needs zero_stage 0, not {self.zero_stage}: at 1 and 2 each rank would look "
                "for overflow in its own share of the gradients, and ranks would skip different steps"
            )
        return self


class SaveConfig(Section):
    every: Duration = Field(default="1ep", description="how often to save a checkpoint: 1ep, 500st")
    keep: int = Field(
        default=2, ge=1, description="how many to keep, beside the dense twin and the sparse model"
    )
    mask_history: bool = Field(default=False, description="keep the masks of every compression, in masks/")


class LogConfig(Section):
    every: Duration = Field(default="50st", description="how often to read the loss from the device")
    weight_histograms: bool = Field(
        default=False, description="histograms of each layer's kept weights, every epoch"
    )
    wandb: str | None = Field(
        default=None, description="a project of Weights & Biases that gets what TensorBoard gets"
    )


class Config(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="names the folder under run_root")
    run_root: str = Field(default="runs", description="the folder of all runs")
    resume: str | None = Field(
        default=None, description="a run folder or a checkpoint in it, or auto: the newest run"
    )
    checkpoint: str | None = Field(
        default=None,
        description="a checkpoint to branch off from: a new run takes weights, optimizer and epoch from it",
    )
    finetune_dense: bool = Field(
        default=False, description="afterwards, train the dense twin densely over the epochs that it missed"
    )
    seed: int = Field(
        default=1, ge=0, le=2**63 - 1, description="of weights, order of images, crops, flips, dropout"
    )
    epochs: int = Field(ge=1, description="of the whole run; the phases must fill them")
    steps_per_epoch: int | None = Field(
        default=None, ge=1, description="end every epoch after so many optimizer steps"
    )
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    lr: LRConfig = LRConfig()
    loss: LossConfig = LossConfig()
    mixing: MixingConfig | None = Field(default=None, description="mixup and cutmix of training images")
    ema: EMAConfig | None = Field(default=None, description="a moving average of the weights beside them")
    sparsity: SparsityConfig
    engine: EngineConfig = EngineConfig()
    save: SaveConfig = SaveConfig()
    log: LogConfig = LogConfig()

    @field_validator("checkpoint")
    @classmethod
    def _names_one(cls, checkpoint: str | None) -> str | None:
        if checkpoint == "":
            raise ValueError(
                "this recipe goes on from another run: name its folder, checkpoint=RUN (its dense twin), "
                "or a checkpoint in it"
            )
        return checkpoint

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        schedule = self.sparsity.build_schedule()
        filled = schedule.num_epochs
        dense = schedule.last("dense")
        if self.finetune_dense and (dense is None or dense.end == filled):
            raise ValueError(
                f'finetune_dense needs a dense phase with a sparse one after it, unlike "{schedule}"'
            )
        if self.checkpoint is not None and self.model.weights is not None:
            raise ValueError("checkpoint brings its weights along; leave model.weights out")
        if filled != self.epochs:
            raise ValueError(
                f"sparsity.schedule {self.sparsity.schedule!r} fills {filled} epochs, but epochs is "
                f"{self.epochs}: write epochs={filled}, or for {self.epochs} epochs "
                f"'sparsity.schedule={schedule.scaled(self.epochs)}'"
            )
        warmup, key = self.lr.warmup_epochs, "warmup_epochs"
        if self.lr.warmup is not None and self.lr.warmup.endswith("ep"):
            warmup, key = duration_steps(self.lr.warmup, 1), "warmup"
        if warmup >= self.epochs:
            raise ValueError(f"lr.{key} is {warmup}, not below epochs, {self.epochs}")
        if self.lr.floor >= self.optimizer.lr:
            raise ValueError(f"lr.floor is {self.lr.floor:g}, not below optimizer.lr, {self.optimizer.lr:g}")
        if self.lr.milestones and self.lr.milestones[-1] >= self.epochs:
            raise ValueError(
                f"lr.milestones {self.lr.milestones} go beyond the last epoch, {self.epochs - 1}"
            )
        if self.engine.precision == "fp16" and self.optimizer.name == "rmsprop":
            raise ValueError(
                "engine.precision=fp16 skips steps that overflow, which torch's RMSprop cannot without "
                "waiting for the device: choose optimizer.name=sgd or adamw, or another precision"
            )
        if self.data.batch_size % self.engine.accumulation_steps:
            raise ValueError(
                f"data.batch_size {self.data.batch_size} does not divide by engine.accumulation_steps "
                f"{self.engine.accumulation_steps}"
            )
        return self


class EvalConfig(Section):
    """What evaluating a saved model needs of the configuration that it was trained with."""

    data: DataConfig
    engine: EngineConfig = EngineConfig()
