"""Kernels of compressed phases in a run: chosen at its first compressed step, kept for later runs, shown as a
table.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import torch
from rich.table import Table

from data.atomic import write_text
from data.places import data_home
from sparsity import ACDC
from sparsity.execution import family_for, foreign_between
from sparsity.flops import Call
from sparsity.kernels.choose import LayerChoice, Measurements, NoKernelError, choose_kernels, gain
from sparsity.kernels.interface import KernelFamily
from sparsity.kernels.unstructured.family import SparseFamily
from trainer.config.schema import Config
from trainer.distributed import ranks
from trainer.engine import precision
from trainer.errors import EnvironmentFailure

log = logging.getLogger(__name__)


def find_family(config: Config, device: torch.device) -> KernelFamily | str:
    """The kernels that this run may use, or why it uses none but dense ones. Raises EnvironmentFailure where
    the recipe requires them."""
    if config.sparsity.accelerate == "off":
        return "not asked for"
    dtype = precision(config, device)
    family = family_for(config.sparsity.build_pattern(), device, dtype)
    if dtype == torch.float16 and not isinstance(family, str):
        family = "bf16: engine.precision=bf16"  # to which they cast under autocast
    if isinstance(family, str) and config.sparsity.accelerate == "require":
        raise EnvironmentFailure(
            f"sparsity.accelerate=require: kernels for {config.sparsity.pattern} masks need {family}; with "
            "auto the run goes on with masked dense layers"
        )
    return family


def accelerate(
    config: Config,
    acdc: ACDC,
    device: torch.device,
    calls: Mapping[str, list[Call]],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[LayerChoice]:
    """Choose on rank 0, tell the layers on every rank; what was chosen and why. Call it in a sparse phase.

    calls, on_progress: as sparsity.kernels.choose.choose_kernels takes them. A resumed run keeps the kernels
    it had, and nothing is chosen, unless they are another precision's or device's; where there are no kernels
    all layers run masked dense."""
    family = find_family(config, device)
    if isinstance(family, SparseFamily) and config.sparsity.accelerate == "auto":
        family = foreign_between(acdc.model, acdc.kernel_layers) or family
    families = ranks.all_gather(family)  # of one machine's compiler each
    if missing := [each for each in families if isinstance(each, str)]:
        family = missing[0]
    if isinstance(family, str):
        if config.sparsity.accelerate == "off":
            pass
        elif acdc.kernels:
            log.warning("the kernels that ran before cannot run here: they need %s", family)
        elif device.type == "cpu":
            log.warning(
                "sparse phases run masked dense layers, no faster than dense phases: kernels need %s", family
            )
        acdc.accelerate({})
        return []
    kept = bool(acdc.kernels) and all(family.has(kernel) for kernel in acdc.kernels.values())
    if all(ranks.all_gather(kept)):
        return []
    images = config.data.batch_size // (ranks.world_size() * config.engine.accumulation_steps)
    required = config.sparsity.accelerate == "require"

    def choose() -> list[LayerChoice]:
        known = Measurements(data_home() / "kernels.json", family.key, write_text)
        try:
            return choose_kernels(family, acdc.kernel_layers, calls, images, known, required, on_progress)
        except NoKernelError as error:
            raise EnvironmentFailure(
                f"sparsity.accelerate=require: kernels for {acdc.pattern} masks: {error}; with auto "
                "they run masked dense"
            ) from error

    choices = ranks.on_main(choose)
    acdc.accelerate({choice.layer: choice.kernel for choice in choices})
    return choices


def choice_table(choices: list[LayerChoice]) -> Table:
    """Layer, shape, dense and sparse microseconds, choice."""
    sums = gain(choices)
    table = Table(
        title="kernels of compressed phases",
        caption=f"measured products of a step: dense {sums['dense_us']:,.0f} µs, as chosen "
        f"{sums['chosen_us']:,.0f} µs",
    )
    for column in ("layer", "shape", "dense µs", "sparse µs", "choice"):
        table.add_column(column, justify="right" if "µs" in column else "left")
    for choice in choices:
        if choice.measured is None or choice.shape is None:
            table.add_row(choice.layer, "", "", "", f"dense: {choice.reason}")
            continue
        dense, sparse = (
            " + ".join(_us(getattr(timing, kind)) for timing in choice.measured.timings)
            for kind in ("dense", "sparse")
        )
        table.add_row(choice.layer, str(choice.shape), dense, sparse, _verdict(choice))
    return table


def _verdict(choice: LayerChoice) -> str:
    if choice.kernel is not None:
        return choice.kernel.title
    assert choice.measured is not None
    wrong = next((timing for timing in choice.measured.timings if not timing.right), None)
    if wrong is None:
        return "dense"
    why = f"sparse is off by {wrong.error:.3f}" if wrong.failure is None else wrong.failure
    return f"dense: {why}"


def _us(microseconds: float | None) -> str:
    return "-" if microseconds is None else f"{microseconds:,.0f}"
