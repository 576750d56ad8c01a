"""The typed configuration of a run. Everything is checked here before any work starts.

Each field says what it means; a recipe (configs/*.yaml) gives values, key=value overrides replace them by
dotted path.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from sparsity.gradual import CubicSparsity
from sparsity.patterns import NM, GlobalMagnitude, Pattern, Rule, UniformMagnitude
from sparsity.schedule import PhaseSchedule

Scalar = bool | int | float | str
_DURATION = re.compile(r"([1-9]\d*)(ep|st)")
_NM = re.compile(r"(\d+):(\d+)")


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _check_duration(value: Any) -> Any:
    if not isinstance(value, str) or _DURATION.fullmatch(value) is None:
        raise ValueError(f"{value!r} is no duration; write a number of epochs or steps: 1ep, 500st")
    return value


Duration = Annotated[str, BeforeValidator(_check_duration)]


def duration_steps(duration: str, steps_per_epoch: int) -> int:
    """Optimizer steps of "1ep" or "500st"."""
    match = _DURATION.fullmatch(duration)
    assert match is not None, duration
    return int(match[1]) * (steps_per_epoch if match[2] == "ep" else 1)


class ModelConfig(Section):
    name: str = Field(description="a name in trainer.models")
    arguments: dict[str, Scalar] = Field(
        default={}, description="what the model takes besides: depth, width, ..."
    )
    weights: str | None = Field(
        default=None, description="a file or checkpoint with weights to start from; all else starts fresh"
    )

    @field_validator("weights")
    @classmethod
    def _names_a_file(cls, weights: str | None) -> str | None:
        if weights == "":
            raise ValueError("this recipe starts from a trained model: name its file, model.weights=FILE")
        return weights

    @field_validator("arguments")
    @classmethod
    def _the_rest_is_known(cls, arguments: dict[str, Scalar]) -> dict[str, Scalar]:
        for taken in sorted({"name", "num_classes", "in_channels"} & arguments.keys()):
            raise ValueError(f"{taken} follows from the rest of the recipe; leave it out")
        return arguments


class ArrayData(Section):
    """A data set of small images that lies in memory."""

    name: Literal["fashion_mnist", "mnist", "cifar10", "cifar100"] = Field(description="the data set")
    root: str | None = Field(
        default=None, description="its folder; else where `acdc prepare` put it, else the bundled"
    )
    batch_size: int = Field(ge=1, description="images per optimizer step, over all devices")
    eval_batch_size: int = Field(default=500, ge=1, description="images per evaluation step and device")
    crop_padding: int = Field(
        default=0, ge=0, description="pixels of zero padding to take the random crop from"
    )
    flip: bool = Field(default=False, description="mirror half of the training images")
    num_threads: int = Field(default=1, ge=1, description="threads of the data pipeline per device")
    random_labels: int = Field(default=0, ge=0, description="training images that get a random label")

    @model_validator(mode="after")
    def _memorise_what_is_there(self) -> ArrayData:
        if self.random_labels and (self.flip or self.crop_padding):
            raise ValueError("random_labels go without augmentation: flip: false, crop_padding: 0")
        return self


class ImageNetData(Section):
    """ImageNet, or any data set of image files in its layout (see data.image_files)."""

    name: Literal["imagenet"] = Field(description="the data set")
    root: str | None = Field(
        default=None, description="the folder with train and val; else $ACDC_DATA/imagenet"
    )
    batch_size: int = Field(ge=1, description="images per optimizer step, over all devices")
    eval_batch_size: int = Field(default=250, ge=1, description="images per evaluation step and device")
    image_size: int = Field(default=224, ge=8, description="side of the training images, in pixels")
    image_sizes: list[list[int]] = Field(
        default=[], description="progressive resizing: [epoch, side] pairs, from when on which side"
    )
    min_area: float = Field(default=0.08, gt=0, le=1, description="least share of an image that a crop takes")
    flip: bool = Field(default=True, description="mirror half of the training images")
    eval_resize: int = Field(default=256, ge=8, description="evaluation: shorter side after resizing")
    eval_size: int = Field(default=224, ge=8, description="evaluation: side of the crop from the centre")
    val_labels: str | None = Field(default=None, description="label file of a flat val folder")
    format: Literal["folders", "webdataset", "tfrecord", "recordio"] = Field(
        default="folders", description="how images lie on the disk; see data.image_files and data.records"
    )
    num_classes: int | None = Field(
        default=None, ge=1, description="of packed files that do not tell; default: 1000"
    )
    first_label: int = Field(default=0, ge=0, description="number of class 0 in packed files: 1 in some")
    backend: Literal["dali", "torch", "synthetic"] = Field(
        default="dali", description="torch: Pillow and a DataLoader; synthetic: noise on the device, no files"
    )
    device: Literal["auto", "cpu", "gpu"] = Field(default="auto", description="where DALI decodes images")
    num_threads: int | None = Field(
        default=None,
        ge=1,
        description="threads or processes of the data pipeline per device",
    )
    on_error: Literal["stop", "skip"] = Field(
        default="stop", description="a file that cannot be decoded ends the run, or another stands in for it"
    )

    @field_validator("image_sizes")
    @classmethod
    def _rise(cls, pairs: list[list[int]]) -> list[list[int]]:
        epochs = [pair[0] for pair in pairs if len(pair) == 2 and pair[0] >= 0 and pair[1] >= 8]
        if len(epochs) != len(pairs) or epochs != sorted(set(epochs)) or (epochs and epochs[0] != 0):
            raise ValueError(
                f"{pairs} is no list of [epoch, side] pairs with rising epochs, the first of them 0"
            )
        return pairs

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(epoch, side) pairs, see data.crops.CropStream."""
        return tuple((epoch, side) for epoch, side in self.image_sizes) or ((0, self.image_size),)

    @model_validator(mode="after")
    def _packed_files_need_dali(self) -> ImageNetData:
        if self.format != "folders" and self.backend == "torch":
            raise ValueError(f"format {self.format} is read by DALI alone; the torch backend reads folders")
        if self.format != "folders" and self.on_error == "skip":
            raise ValueError(
                f"on_error: skip is for folders; of {self.format} DALI cannot leave an image out"
            )
        if self.format == "folders" and (self.num_classes is not None or self.first_label):
            raise ValueError("num_classes and first_label are for packed files; folders tell their classes")
        return self

    @model_validator(mode="after")
    def _crop_from_what_is_there(self) -> ImageNetData:
        if self.eval_size > self.eval_resize:
            raise ValueError(
                f"eval_size {self.eval_size} cannot be cropped from images resized to eval_resize "
                f"{self.eval_resize}"
            )
        return self


DataConfig = Annotated[ArrayData | ImageNetData, Field(discriminator="name")]


class OptimizerConfig(Section):
    name: Literal["sgd"] = "sgd"
    lr: float = Field(gt=0, description="base learning rate, for the whole batch_size")
    momentum: float = Field(default=0.9, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: float = Field(default=0.0, ge=0, description="on all parameters, as in the paper")

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> OptimizerConfig:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0")
        return self


class LRConfig(Section):
    kind: Literal["cosine", "step", "constant"] = "cosine"
    warmup_epochs: int = Field(
        default=0, ge=0, description="lr * (epoch + 1) / warmup_epochs for these epochs"
    )
    milestones: list[int] = Field(
        default=[], description="step: epochs from which lr is multiplied by gamma again"
    )
    gamma: float = Field(default=0.1, gt=0, le=1, description="step: the factor")

    @model_validator(mode="after")
    def _milestones_for_step(self) -> LRConfig:
        if (self.kind == "step") != bool(self.milestones):
            raise ValueError("milestones belong to kind: step, which needs them")
        if self.milestones != sorted(set(self.milestones)) or any(m < 1 for m in self.milestones):
            raise ValueError(f"milestones {self.milestones} are epochs of 1 or more in rising order")
        return self


class GradualConfig(Section):
    initial: float = Field(default=0.05, ge=0, lt=1, description="sparsity at the sparse phase's first epoch")
    end: int = Field(ge=1, description="epoch at which the cubic law reaches the target")
    every: int = Field(default=1, ge=1, description="epochs between compressions")


class SparsityConfig(Section):
    pattern: str = Field(default="global", description="global, uniform, or N:M such as 2:4")
    target: float | None = Field(
        default=None, ge=0, lt=1, description="share of weights to drop; N:M needs none"
    )
    schedule: str = Field(
        description='phases that fill the epochs: "dense 2, (sparse 1, dense 1) x2, sparse 3"'
    )
    include: list[str] = Field(default=["*"], description="patterns over layer names: which to prune")
    exclude: list[str] = Field(default=[], description="patterns over layer names: which to leave dense")
    rule: Rule = Field(default="exact", description="how many weights stay: see sparsity.patterns")
    gradual: GradualConfig | None = Field(default=None, description="gradual magnitude pruning, not AC/DC")
    recompute_batch_norm: Duration | None = Field(
        default=None, description="after each compression, take BatchNorm statistics anew over so much data"
    )

    @field_validator("schedule")
    @classmethod
    def _parse_schedule(cls, text: str) -> str:
        PhaseSchedule.parse(text)
        return text

    @model_validator(mode="after")
    def _pattern_and_target(self) -> SparsityConfig:
        self.build_pattern()
        self.build_gradual()
        return self

    def build_pattern(self) -> Pattern:
        if not self.build_schedule().compressions:
            return GlobalMagnitude(0)
        if match := _NM.fullmatch(self.pattern):
            if self.target is not None:
                raise ValueError(f"pattern {self.pattern} has its sparsity in itself; leave target out")
            return NM(int(match[1]), int(match[2]), self.rule)
        kinds: dict[str, Callable[[float, Rule], Pattern]] = {
            "global": GlobalMagnitude,
            "uniform": UniformMagnitude,
        }
        if self.pattern not in kinds:
            raise ValueError(f"unknown pattern {self.pattern!r}; global, uniform, or N:M such as 2:4")
        if self.target is None:
            raise ValueError(f"pattern {self.pattern} needs a target, the share of weights to drop, e.g. 0.9")
        return kinds[self.pattern](self.target, self.rule)

    def build_schedule(self) -> PhaseSchedule:
        return PhaseSchedule.parse(self.schedule)

    def build_gradual(self) -> CubicSparsity | None:
        if self.gradual is None:
            return None
        starts, final = self.build_schedule().compressions, self.target
        if final is None or not starts:
            raise ValueError("gradual pruning needs a target and a schedule with a sparse phase")
        return CubicSparsity(self.gradual.initial, final, starts[0], self.gradual.end, self.gradual.every)


class EngineConfig(Section):
    zero_stage: int = Field(default=0, ge=0, le=3, description="DeepSpeed ZeRO stage: 0, 1 or 2")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto", description="auto: bf16 autocast on a GPU"
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


class SaveConfig(Section):
    every: Duration = Field(default="1ep", description="how often to save a checkpoint: 1ep, 500st")
    keep: int = Field(
        default=2, ge=1, description="how many to keep, beside the dense twin and the sparse model"
    )
    mask_history: bool = Field(default=False, description="keep the masks of every compression, in masks/")


class LogConfig(Section):
    every: Duration = Field(default="50st", description="how often to read the loss from the device")
    weight_histograms: bool = Field(
        default=False, description="TensorBoard histograms of each layer's kept weights, every epoch"
    )


class Config(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="names the folder under run_root")
    run_root: str = "runs"
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
    seed: int = Field(default=1, ge=0, le=2**63 - 1)
    epochs: int = Field(ge=1)
    steps_per_epoch: int | None = Field(
        default=None, ge=1, description="end every epoch after so many optimizer steps"
    )
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    lr: LRConfig = LRConfig()
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
                "or a "
                "checkpoint in it"
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
                f"sparsity.schedule {self.sparsity.schedule!r} fills {filled} epochs, "
                f"but epochs is {self.epochs}"
            )
        if self.lr.warmup_epochs >= self.epochs:
            raise ValueError(f"lr.warmup_epochs is {self.lr.warmup_epochs}, not below epochs, {self.epochs}")
        if self.lr.milestones and self.lr.milestones[-1] >= self.epochs:
            raise ValueError(
                f"lr.milestones {self.lr.milestones} go beyond the last epoch, {self.epochs - 1}"
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
