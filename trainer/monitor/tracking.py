"""Weights & Biases beside TensorBoard, with the same content, where log.wandb names a project."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from data.atomic import write_text
from trainer.checkpoints.run_dir import RunDir
from trainer.errors import EnvironmentFailure

log = logging.getLogger(__name__)


class Tracking:
    """A run of a project there. Its id is kept in the run folder: a resumed run goes on in the same one. Its
    own environment variables hold: WANDB_MODE=offline writes to the run folder, for `wandb sync`.

    Raises EnvironmentFailure where wandb is missing or cannot begin. What fails later costs curves, not the
    training.
    """

    def __init__(self, project: str, folder: RunDir, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ModuleNotFoundError as error:
            raise EnvironmentFailure("log.wandb needs wandb: pip install 'acdc-train[wandb]'") from error
        name = f"{folder.path.parent.name}/{folder.path.name}"
        try:
            self._run: Any = wandb.init(
                project=project,
                id=_id(folder),
                name=name,
                resume="allow",
                dir=str(folder.path),
                config=dict(config),
                settings=wandb.Settings(console="off"),  # it would take what the screen shows
            )
        except Exception as error:  # no key, no network: the run has not begun
            raise EnvironmentFailure(
                f"log.wandb={project}: {error}; `wandb login` gives access, WANDB_MODE=offline needs none"
            ) from error
        self._histogram = wandb.Histogram
        # Steps done again after an interruption would go back, which its own count of steps refuses
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """By TensorBoard's tags. step: optimizer steps done."""
        self._log({**values, "step": step})

    def histograms(self, values: Mapping[str, Tensor], step: int) -> None:
        """By TensorBoard's tags: the tensors' elements, on the CPU."""
        self._log(
            {**{tag: self._histogram(each.float().numpy()) for tag, each in values.items()}, "step": step}
        )

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()

    def _log(self, values: dict[str, Any]) -> None:
        if self._run is None:
            return
        try:
            self._run.log(values)
        except Exception as error:  # whatever it is, training goes on
            log.warning("Weights & Biases gets no more of this run: %s", error)
            self._run = None


def _id(folder: RunDir) -> str:
    place = folder.path / "wandb_id"
    if not place.exists():
        write_text(place, f"{folder.path.name}-{secrets.token_hex(4)}")
    return place.read_text(encoding="utf-8").strip()
