"""Records of a run: metrics.jsonl, TensorBoard, Weights & Biases, and the screen. Only rank 0 has one."""

from __future__ import annotations

import json
import logging
import threading
from typing import Any

from torch import Tensor

from data.atomic import write_text
from sparsity import ACDC
from sparsity.layers import maskable
from trainer.checkpoints.run_dir import DENSE_TWIN, SPARSE, RunDir
from trainer.monitor.screen import Screen
from trainer.monitor.tensorboard import Board
from trainer.monitor.tracking import Tracking

log = logging.getLogger(__name__)

# record key -> TensorBoard tag
TAGS = {
    "loss": "train/loss",
    "train_loss": "train/loss_epoch",
    "train_top1": "train/top1",
    "val_loss": "test/loss",
    "val_top1": "test/top1",
    "val_top5": "test/top5",
    "ema_loss": "ema/loss",
    "ema_top1": "ema/top1",
    "memorised_loss": "memorised/random_labels_loss",
    "memorised_top1": "memorised/random_labels_top1",
    "memorised_true_loss": "memorised/true_labels_loss",
    "memorised_true_top1": "memorised/true_labels_top1",
    "lr": "optimizer/lr",
    "sparse_phase": "phase/sparse",
    "sparsity": "sparsity/overall",
    "mask_difference": "sparsity/mask_difference",
    "images_per_second": "throughput/images_per_second",
    "data_wait": "throughput/data_wait",
    "loss_scale": "fp16/loss_scale",
    "skipped_steps": "fp16/skipped_steps",
}


class Monitor:
    """start_step: optimizer steps done before; later records of an interrupted run are dropped."""

    def __init__(
        self, run_dir: RunDir, screen: Screen, start_step: int, tracking: Tracking | None = None
    ) -> None:
        self.screen = screen
        self._tracking = tracking
        kept = [record for record in run_dir.read_metrics() if record["step"] <= start_step]
        texts = {"recipe": run_dir.path / "config.yaml", "environment": run_dir.path / "env.json"}
        self._excepthook, threading.excepthook = threading.excepthook, self._in_thread
        self._board = Board(run_dir.tensorboard, start_step, texts)
        self._phase = kept[-1]["phase"] if kept else "dense"
        write_text(run_dir.metrics, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = run_dir.metrics.open("a", encoding="utf-8")

    def step(self, record: dict[str, Any]) -> None:
        """A record read within an epoch: kind, epoch, step, phase, lr, loss, images_per_second, data_wait;
        in fp16 also loss_scale, skipped_steps."""
        self._record({"kind": "step", **record})

    def epoch(self, record: dict[str, Any], layer_sparsity: dict[str, float]) -> None:
        self._record({"kind": "epoch", **record, "layer_sparsity": layer_sparsity})
        self._scalars(
            {f"sparsity/layer/{name}": each for name, each in layer_sparsity.items()}, record["step"]
        )
        if record["phase"] == "sparse" != self._phase:
            self._board.kept(layer_sparsity, record["step"])
        self._phase = record["phase"]
        self._board.flush()
        self.screen.epoch(record)

    def histograms(self, step: int, weights: dict[str, Tensor]) -> None:
        """Of weights by layer name."""
        tagged = {f"weights/{name}": values for name, values in weights.items()}
        self._board.histograms(tagged, step)
        if self._tracking:
            self._tracking.histograms(tagged, step)

    def scores(self, recipe: dict[str, Any], result: dict[str, Any]) -> None:
        """Of a finished run. recipe: by dotted keys. result: as result.json has it."""
        pair = {key: result.get(key) for key in (DENSE_TWIN, SPARSE)}
        self._board.scores(recipe, {f"result/{key}_top1": row["top1"] for key, row in pair.items() if row})

    def close(self) -> None:
        """Raises nothing: what ends the run is said already, or it has ended well."""
        self.screen.close()
        for file in (self._file, self._board):
            try:
                file.close()
            except OSError as error:
                log.warning("the last records may be missing: %s", error)
        threading.excepthook = self._excepthook
        if self._tracking:
            self._tracking.close()

    def _in_thread(self, failure: threading.ExceptHookArgs) -> None:
        """TensorBoard writes in a thread; the next record raises what the disk said there."""
        if not isinstance(failure.exc_value, OSError):
            self._excepthook(failure)

    def _record(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        values = {**record, "sparse_phase": float(record["phase"] == "sparse")}
        known = {tag: values[key] for key, tag in TAGS.items() if values.get(key) is not None}
        if "val_top1" in record:
            known[f"test/top1_{record['phase']}"] = record["val_top1"]
        self._scalars(known, record["step"])

    def _scalars(self, values: dict[str, float], step: int) -> None:
        self._board.scalars(values, step)
        if self._tracking:
            self._tracking.scalars(values, step)


def kept_weights(acdc: ACDC) -> dict[str, Tensor]:
    """Layer name -> its kept weights, in one dimension, on the CPU. Of a model without masked layers, all
    weights that could have had masks; a layer that has lost all is left out."""
    masks = acdc.masks()
    weights = acdc.weights() or {name: each.weight.detach() for name, each in maskable(acdc.model).items()}
    kept = {name: weight[masks[name]] if masks else weight for name, weight in weights.items()}
    return {name: values.flatten().cpu() for name, values in kept.items() if values.numel()}
