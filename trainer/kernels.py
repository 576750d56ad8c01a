"""2:4 execution in a run: tuned at its first compressed step, kept for later runs, shown as a table."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from data.places import data_home
from sparsity import ACDC, Transposable24
from sparsity.kernels.autotune24 import Shape24, Tuned, candidates, measure24
from sparsity.kernels.semi_structured import DTYPES, lacking
from sparsity.layers import Run24
from sparsity.transposable import is_24
from trainer.checkpoints.checkpoint import write_text
from trainer.config.schema import Config
from trainer.distributed import ranks
from trainer.engine import precision
from trainer.errors import EnvironmentLacks

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerChoice:
    """A masked layer: how it runs in compressed phases, its shape and timing, or why it was not measured."""

    layer: str
    run24: Run24
    shape: Shape24 | None = None
    tuned: Tuned | None = None
    reason: str = ""


def why_not(config: Config, device: torch.device) -> str | None:
    """Why this run uses no 2:4 kernels, or None. Raises EnvironmentLacks where the recipe requires them."""
    setting = config.sparsity.accelerate
    if setting == "off" or not is_24(config.sparsity.build_pattern()):
        return "not asked for"  # a recipe that requires them has a 2:4 pattern, see trainer.config.schema
    missing = lacking(device)
    if missing is None and precision(config, device) not in DTYPES:
        missing = "bf16: engine.precision=bf16"
    if missing is not None and setting == "require":
        raise EnvironmentLacks(
            f"sparsity.accelerate=require: 2:4 execution needs {missing}; with auto the run goes on with "
            "masked dense layers"
        )
    return missing


def accelerate(
    config: Config, acdc: ACDC, device: torch.device, positions: Mapping[str, list[int]]
) -> list[LayerChoice]:
    """Tune on rank 0, tell the layers on every rank; what was chosen and why. Call it in a sparse phase.

    positions: as candidates takes them. A resumed run keeps the kernels it had, and nothing is chosen; where
    there are no kernels all layers run masked dense."""
    if (reason := why_not(config, device)) is not None:
        if acdc.run24:
            log.warning("2:4 kernels that ran before cannot run here: they need %s", reason)
        acdc.accelerate({})
        return []
    if acdc.run24:
        return []
    dtype = precision(config, device)
    choices = ranks.on_main(lambda: _choose(config, acdc, device, dtype, positions))
    acdc.accelerate({choice.layer: choice.run24 for choice in choices})
    return choices


def _choose(
    config: Config, acdc: ACDC, device: torch.device, dtype: torch.dtype, positions: Mapping[str, list[int]]
) -> list[LayerChoice]:
    images = config.data.batch_size // (ranks.world_size() * config.engine.accumulation_steps)
    shapes, reasons = candidates(acdc.layers, positions, images)
    transposable = isinstance(acdc.pattern, Transposable24)
    cache = TuningCache(data_home() / "kernels24.json", device, dtype, transposable)
    required = config.sparsity.accelerate == "require"
    torch.cuda.empty_cache()  # training holds most of the memory
    for unknown in sorted(set(shapes.values()) - cache.known.keys()):
        try:
            cache.known[unknown] = measure24(unknown, dtype, device, transposable)
        except torch.OutOfMemoryError:
            crowded = [name for name, shape in shapes.items() if shape == unknown]
            reasons.update(dict.fromkeys(crowded, "no memory left to measure it"))
            shapes = {name: shape for name, shape in shapes.items() if name not in crowded}
    torch.cuda.empty_cache()
    cache.write()
    if required:
        _check_required(shapes, reasons, cache.known)
    choices = []
    for name in acdc.layers:
        shape = shapes.get(name)
        tuned = None if shape is None else cache.known[shape]
        run24 = Run24.NOT if tuned is None else tuned.choose(required)
        choices.append(LayerChoice(name, run24, shape, tuned, reasons.get(name, "")))
    return choices


def _check_required(
    shapes: Mapping[str, Shape24], reasons: Mapping[str, str], known: Mapping[Shape24, Tuned]
) -> None:
    """Raises EnvironmentLacks where no layer can run 2:4 kernels, or one that should cannot."""
    failed = {
        name: known[shape].forward.failure or "its results are wrong"
        for name, shape in shapes.items()
        if not known[shape].forward.right
    }
    if failed or not shapes:
        name, why = next(iter((failed or reasons).items()))
        raise EnvironmentLacks(
            f"sparsity.accelerate=require: {len(failed) or len(reasons)} layers cannot run 2:4 kernels, "
            f"{name} first: {why}; with auto they run masked dense"
        )


class TuningCache:
    """What was measured on this kind of device before, in a JSON file. A damaged file is measured anew."""

    def __init__(self, path: Path, device: torch.device, dtype: torch.dtype, transposable: bool) -> None:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "reference"
        library = torch.backends.cusparselt.version()
        kind = "transposable" if transposable else "row-wise"
        self.path, self._key = (
            path,
            f"{name}, torch {torch.__version__}, cuSPARSELt {library}, {dtype}, {kind}",
        )
        try:
            self._all: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            entries = self._all.get(self._key, {})
            self.known = {_shape(text): Tuned.of(values) for text, values in entries.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            self._all, self.known = {}, {}

    def write(self) -> None:
        entries = {"x".join(map(str, shape)): tuned.as_dict() for shape, tuned in self.known.items()}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.path, json.dumps({**self._all, self._key: entries}, indent=1))
        except OSError as error:
            log.warning("2:4 timings are not kept for later runs: %s", error)


def _shape(text: str) -> Shape24:
    return Shape24(*map(int, text.split("x")))


def as_records(choices: list[LayerChoice]) -> list[dict[str, Any]]:
    """For JSON."""
    return [
        {
            "layer": choice.layer,
            "choice": choice.run24.value,
            "shape": None if choice.shape is None else choice.shape._asdict(),
            "microseconds": None if choice.tuned is None else asdict(choice.tuned),
            "reason": choice.reason,
        }
        for choice in choices
    ]


def choice_table(choices: list[LayerChoice]) -> Table:
    """Layer, shape, dense and sparse microseconds, choice; a line for each group of equal layers."""
    sums = gain(choices)
    table = Table(
        title="2:4 execution in compressed phases",
        caption=f"measured kernels of a step: dense {sums['dense_us']:,.0f} µs, as chosen "
        f"{sums['chosen_us']:,.0f} µs",
    )
    for column in ("layer", "rows x in x out", "dense µs", "2:4 µs", "choice"):
        table.add_column(column, justify="right" if "µs" in column else "left")
    for choice in choices:
        if choice.tuned is None or choice.shape is None:
            table.add_row(choice.layer, "", "", "", f"dense: {choice.reason}")
            continue
        forward, gradient = choice.tuned.forward, choice.tuned.gradient
        dense, sparse = [_us(forward.dense)], [_us(forward.sparse)]
        if gradient is not None:
            dense, sparse = [*dense, _us(gradient.dense)], [*sparse, _us(gradient.sparse)]
        shape = " x ".join(f"{size:,}" for size in choice.shape)
        table.add_row(choice.layer, shape, " + ".join(dense), " + ".join(sparse), _verdict(choice, forward))
    return table


def _verdict(choice: LayerChoice, forward: Any) -> str:
    if forward.failure is not None:
        return f"dense: {forward.failure}"
    if not forward.right:
        return f"dense: 2:4 is off by {forward.error:.3f}"
    return choice.run24.value


def _us(microseconds: float | None) -> str:
    return "-" if microseconds is None else f"{microseconds:,.1f}"


def gain(choices: list[LayerChoice]) -> Mapping[str, float]:
    """Microseconds a step of the measured kernels, all dense and as chosen."""
    dense = chosen = 0.0
    for choice in choices:
        if choice.tuned is None:
            continue
        for timing, sparse in (
            (choice.tuned.forward, choice.run24 is not Run24.NOT),
            (choice.tuned.gradient, choice.run24 is Run24.TRANSPOSED),
        ):
            if timing is not None:
                dense += timing.dense
                chosen += timing.sparse if sparse and timing.sparse is not None else timing.dense
    return {"dense_us": dense, "chosen_us": chosen}
