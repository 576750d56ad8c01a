"""Kernels of compressed phases in a run: chosen at its first compressed step, kept for later runs, shown as a
table.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from rich.table import Table

from data.atomic import write_text
from data.places import data_home
from sparsity import ACDC, Transposable24
from sparsity.kernels.choose import LayerChoice, Measurements, NoKernelError, choose_kernels, gain
from sparsity.kernels.measure import Timing
from sparsity.kernels.semi_structured.kernel import Family24
from sparsity.kernels.semi_structured.operator import missing
from sparsity.transposable import is_24
from trainer.config.schema import Config
from trainer.distributed import ranks
from trainer.engine import precision
from trainer.errors import EnvironmentFailure

log = logging.getLogger(__name__)


def reason_unused(config: Config, device: torch.device) -> str | None:
    """Why this run uses no kernels but dense ones, or None. Raises EnvironmentFailure where the recipe
    requires them."""
    setting = config.sparsity.accelerate
    if setting == "off" or not is_24(config.sparsity.build_pattern()):
        return "not asked for"  # a recipe that requires them has a 2:4 pattern, see trainer.config.schema
    needed = missing(device, precision(config, device))
    if needed is not None and setting == "require":
        raise EnvironmentFailure(
            f"sparsity.accelerate=require: 2:4 execution needs {needed}; with auto the run goes on with "
            "masked dense layers"
        )
    return needed


def accelerate(
    config: Config, acdc: ACDC, device: torch.device, positions: Mapping[str, list[int]]
) -> list[LayerChoice]:
    """Choose on rank 0, tell the layers on every rank; what was chosen and why. Call it in a sparse phase.

    positions: as sparsity.kernels.choose.candidates takes them. A resumed run keeps the kernels it had, and
    nothing is chosen; where there are no kernels all layers run masked dense."""
    if (reason := reason_unused(config, device)) is not None:
        if acdc.kernels:
            log.warning("2:4 kernels that ran before cannot run here: they need %s", reason)
        acdc.accelerate({})
        return []
    if acdc.kernels:
        return []
    images = config.data.batch_size // (ranks.world_size() * config.engine.accumulation_steps)
    family = Family24(device, precision(config, device), isinstance(acdc.pattern, Transposable24))
    required = config.sparsity.accelerate == "require"

    def choose() -> list[LayerChoice]:
        known = Measurements(data_home() / "kernels24.json", family.key, write_text)
        try:
            return choose_kernels(family, acdc.layers, positions, images, known, required)
        except NoKernelError as error:
            raise EnvironmentFailure(
                f"sparsity.accelerate=require: 2:4 kernels: {error}; with auto they run masked dense"
            ) from error

    choices = ranks.on_main(choose)
    acdc.accelerate({choice.layer: choice.kernel for choice in choices})
    return choices


def choice_table(choices: list[LayerChoice]) -> Table:
    """Layer, shape, dense and sparse microseconds, choice."""
    sums = gain(choices)
    table = Table(
        title="2:4 execution in compressed phases",
        caption=f"measured kernels of a step: dense {sums['dense_us']:,.0f} µs, as chosen "
        f"{sums['chosen_us']:,.0f} µs",
    )
    for column in ("layer", "rows x in x out", "dense µs", "2:4 µs", "choice"):
        table.add_column(column, justify="right" if "µs" in column else "left")
    for choice in choices:
        if choice.measured is None or choice.shape is None:
            table.add_row(choice.layer, "", "", "", f"dense: {choice.reason}")
            continue
        both = [choice.measured.forward, choice.measured.gradient]
        dense, sparse = (
            " + ".join(_us(getattr(timing, kind)) for timing in both if timing is not None)
            for kind in ("dense", "sparse")
        )
        shape = " x ".join(f"{size:,}" for size in choice.shape)
        table.add_row(choice.layer, shape, dense, sparse, _verdict(choice, choice.measured.forward))
    return table


def _verdict(choice: LayerChoice, forward: Timing) -> str:
    if choice.kernel is not None:
        return choice.kernel.name
    if forward.failure is not None:
        return f"dense: {forward.failure}"
    return "dense" if forward.right else f"dense: 2:4 is off by {forward.error:.3f}"


def _us(microseconds: float | None) -> str:
    return "-" if microseconds is None else f"{microseconds:,.1f}"
