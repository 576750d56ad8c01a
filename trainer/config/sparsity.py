"""The sparsity section of a recipe: which weights are dropped, and when."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from sparsity.gradual import CubicSparsity, Regrowth, actions_of
from sparsity.patterns import (
    NM,
    GlobalMagnitude,
    Pattern,
    RandomMask,
    Rule,
    Transposable24,
    UniformMagnitude,
)
from sparsity.schedule import PhaseSchedule
from trainer.config.data import Section
from trainer.config.durations import Duration

_NM = re.compile(r"(\d+):(\d+)")
_TRANSPOSABLE = "2:4 transposable"
_PATTERNS = f"global, uniform, random, N:M such as 2:4, or {_TRANSPOSABLE}"


class GradualConfig(Section):
    initial: float = Field(default=0.05, ge=0, lt=1, description="sparsity at the sparse phase's first epoch")
    end: int = Field(ge=1, description="epoch at which the cubic law reaches the target")
    every: int = Field(default=1, ge=1, description="epochs between compressions")


class RegrowthConfig(Section):
    share: float = Field(default=0.3, gt=0, lt=1, description="of a layer's kept weights, replaced at first")
    end: int = Field(ge=1, description="epoch at which the share has fallen to 0, by a half cosine")
    every: int = Field(default=1, ge=1, description="epochs between updates")


class SparsityConfig(Section):
    pattern: str = Field(default="global", description=_PATTERNS)
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
    regrowth: RegrowthConfig | None = Field(
        default=None, description="dynamic sparse training (SET) from a random mask on, not AC/DC"
    )
    reset_momentum: bool = Field(
        default=True, description="zero all momentum at a decompression, as the paper does"
    )
    accelerate: Literal["auto", "off", "require"] = Field(
        default="auto",
        description="sparse kernels in compressed phases: any mask on a CPU, 2:4 on a GPU; auto: where "
        "they are measured to win; require: in every layer that can, or an error",
    )
    recompute_batch_norm: Duration | None = Field(
        default=None, description="after each compression, recompute BatchNorm statistics over so much data"
    )

    @field_validator("schedule")
    @classmethod
    def _parse_schedule(cls, text: str) -> str:
        PhaseSchedule.parse(text)
        return text

    @model_validator(mode="after")
    def _pattern_and_target(self) -> SparsityConfig:
        self.build_actions()
        return self

    def build_pattern(self, seed: int = 0) -> Pattern:
        """seed: of a random mask."""
        if not self.build_schedule().compressions:
            return GlobalMagnitude(0)
        if match := _NM.fullmatch(self.pattern):
            if self.target is not None:
                raise ValueError(f"pattern {self.pattern} has its sparsity in itself; leave target out")
            return NM(int(match[1]), int(match[2]), self.rule)
        if self.pattern == _TRANSPOSABLE:
            if self.target is not None or self.rule != "exact":
                raise ValueError(f"pattern {self.pattern} has no target and no rule; leave them out")
            return Transposable24()
        if self.pattern not in ("global", "uniform", "random"):
            raise ValueError(f"unknown pattern {self.pattern!r}; {_PATTERNS}")
        if self.target is None:
            raise ValueError(f"pattern {self.pattern} needs a target, the share of weights to drop, e.g. 0.9")
        if self.pattern == "random":
            if self.rule != "exact":
                raise ValueError("pattern random has no rule; leave it out")
            return RandomMask(self.target, seed)
        return (GlobalMagnitude if self.pattern == "global" else UniformMagnitude)(self.target, self.rule)

    def build_schedule(self) -> PhaseSchedule:
        return PhaseSchedule.parse(self.schedule)

    def build_actions(self) -> dict[int, Pattern | None]:
        """Epoch -> what happens as it begins, see sparsity.gradual.actions_of."""
        return actions_of(self.build_pattern(), self.build_schedule(), self.build_gradual())

    def build_gradual(self) -> CubicSparsity | Regrowth | None:
        """How masks change within the sparse phase, of what does so."""
        if self.gradual is not None and self.regrowth is not None:
            raise ValueError("gradual and regrowth are two methods: leave one out")
        if self.regrowth is not None:
            return Regrowth(self.regrowth.share, self.regrowth.end, self.regrowth.every)
        if self.gradual is None:
            return None
        starts, final = self.build_schedule().compressions, self.target
        if final is None or not starts:
            raise ValueError("gradual pruning needs a target and a schedule with a sparse phase")
        return CubicSparsity(self.gradual.initial, final, starts[0], self.gradual.end, self.gradual.every)
