"""The typed configuration of a run. Everything is checked here before any work starts.

Each field says what it means; a recipe (configs/*.yaml) gives values, key=value overrides replace them by
dotted path.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from sparsity.gradual import CubicSparsity
from sparsity.patterns import NM, GlobalMagnitude, Pattern, Rule, UniformMagnitude
from sparsity.schedule import PhaseSchedule
from trainer.errors import UserError
from trainer.recipes import find_recipe, override, read_recipe

Scalar = bool | int | float | str
_DURATION = re.compile(r"([1-9]\d*)(ep|st)")
_NM = re.compile(r"(\d+):(\d+)")


S = TypeVar("S", bound="Section")


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

    @field_validator("arguments")
    @classmethod
    def _the_rest_is_known(cls, arguments: dict[str, Scalar]) -> dict[str, Scalar]:
        for taken in sorted({"name", "num_classes", "in_channels"} & arguments.keys()):
            raise ValueError(f"{taken} follows from the rest of the recipe; leave it out")
        return arguments


class DataConfig(Section):
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
    def _memorise_what_is_there(self) -> DataConfig:
        if self.random_labels and (self.flip or self.crop_padding):
            raise ValueError("random_labels go without augmentation: flip: false, crop_padding: 0")
        return self


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


class CheckpointConfig(Section):
    every: Duration = Field(default="1ep", description="how often to save: 1ep, 500st")
    keep: int = Field(
        default=2, ge=1, description="how many to keep, beside the dense twin and the sparse model"
    )


class LogConfig(Section):
    every: Duration = Field(default="50st", description="how often to read the loss from the device")


class Config(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="names the folder under run_root")
    run_root: str = "runs"
    resume: str | None = Field(
        default=None, description="a run folder or a checkpoint in it, or auto: the newest run"
    )
    seed: int = Field(default=1, ge=0, le=2**63 - 1)
    epochs: int = Field(ge=1)
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    lr: LRConfig = LRConfig()
    sparsity: SparsityConfig
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        filled = self.sparsity.build_schedule().num_epochs
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


def load_config(recipe: str, assignments: Iterable[str] = ()) -> Config:
    """Read a recipe by name or path and apply overrides. Raises UserError that lists every mistake found."""
    path = find_recipe(recipe)
    content = read_recipe(path)
    content.setdefault("name", path.stem)
    override(content, assignments)
    return parse_config(content, str(path))


def parse_config(content: dict[str, Any], source: str) -> Config:
    """Check a configuration's content; `source` says in messages where it came from. Raises UserError."""
    return _parse(Config, content, source)


def parse_eval_config(content: dict[str, Any], source: str) -> EvalConfig:
    """The same for what evaluation needs. Raises UserError."""
    return _parse(EvalConfig, content, source)


def _parse(root: type[S], content: dict[str, Any], source: str) -> S:
    try:
        return root.model_validate(content)
    except ValidationError as error:
        mistakes: dict[str, list[str]] = {}
        for problem in error.errors():
            key, message = _explain(root, dict(problem))
            mistakes.setdefault(key, []).append(message)
        lines = [
            (f"{key}: {' or '.join(m)}" if key else m[0]).replace("\n", "\n  ") for key, m in mistakes.items()
        ]
        raise UserError(
            "\n".join([f"{source} with its overrides:", *(f"  {line}" for line in lines)])
        ) from error


def _explain(root: type[Section], problem: dict[str, Any]) -> tuple[str, str]:
    """The dotted key of one mistake, and what is wrong there, what is allowed, the nearest valid key."""
    location = [
        part for part in problem["loc"] if part not in ("bool", "int", "float", "str", "literal['auto']")
    ]
    key = ".".join(map(str, location))
    if problem["type"] == "extra_forbidden":
        allowed = list(_section_at(root, location[:-1]).model_fields)
        near = difflib.get_close_matches(str(location[-1]), allowed, n=1)
        hint = f" did you mean {'.'.join([*map(str, location[:-1]), near[0]])}?" if near else ""
        return key, f"unknown key;{hint} allowed here: {', '.join(allowed)}"
    if problem["type"] == "missing":
        field = _section_at(root, location[:-1]).model_fields[location[-1]]
        return key, f"missing; {field.description or 'give a value'}"
    if problem["type"] == "value_error":
        return key, problem["msg"].removeprefix("Value error, ")
    return key, f"{problem['msg'].removeprefix('Input ')}, not {problem['input']!r}"


def _section_at(root: type[Section], location: list[Any]) -> type[Section]:
    section = root
    for part in location:
        inner = section.model_fields[part].annotation
        assert isinstance(inner, type)
        assert issubclass(inner, Section)
        section = inner
    return section
