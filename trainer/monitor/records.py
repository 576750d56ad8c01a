"""Records of a run: metrics.jsonl, TensorBoard, Weights & Biases, and the screen. Only rank 0 has one."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from data.atomic import write_text
from sparsity import ACDC
from sparsity.layers import maskable
from trainer.checkpoints.run_dir import DENSE_TWIN, SPARSE, RunDir
from trainer.monitor.pictures import SHOWN, as_seen, confused_table, grid, label_table
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
    "mask_kept": "sparsity/mask_kept",
    "mask_dropped": "sparsity/mask_dropped",
    "mask_regrown": "sparsity/mask_regrown",
    "images_per_second": "throughput/images_per_second",
    "data_wait": "throughput/data_wait",
    "loss_scale": "fp16/loss_scale",
    "skipped_steps": "fp16/skipped_steps",
}


class Monitor:
    """start_step: optimizer steps done before; later records of an interrupted run are dropped. schedule: a
    drawing of it. wants_batch: whether batch() is still to be called, once in a run."""

    def __init__(
        self,
        run_dir: RunDir,
        screen: Screen,
        start_step: int,
        tracking: Tracking | None = None,
        schedule: str = "",
    ) -> None:
        self.screen = screen
        self._tracking = tracking
        kept = [record for record in run_dir.read_metrics() if record["step"] <= start_step]
        texts: dict[str, Path | str] = {
            "recipe": run_dir.path / "config.yaml",
            "schedule": schedule,
            "environment": run_dir.path / "env.json",
        }
        self._excepthook, threading.excepthook = threading.excepthook, self._in_thread
        self._board = Board(run_dir.tensorboard, start_step, texts)
        self._step, self.wants_batch = start_step, self._board.is_new
        self._batch: tuple[Tensor, Tensor, Tensor | None, Sequence[str]] | None = None
        epochs = [record for record in kept if record["kind"] == "epoch"]
        self._phase = epochs[-1]["phase"] if epochs else "dense"
        write_text(run_dir.metrics, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = run_dir.metrics.open("a", encoding="utf-8")

    def batch(self, images: Tensor, labels: Tensor, draw: Tensor | None, classes: Sequence[str]) -> None:
        """The run's first one, as as_seen takes it. Kept on the device, and drawn with the next record, when
        the device is read anyway."""
        self.wants_batch = False
        self._batch = images[:SHOWN].clone(), labels[:SHOWN].clone(), draw, classes

    def _draw_batch(self) -> None:
        if self._batch is not None:
            batch, self._batch = self._batch, None
            self._draw("the first batch", lambda: self._draw_this(*batch))

    def _draw_this(self, images: Tensor, labels: Tensor, draw: Tensor | None, classes: Sequence[str]) -> None:
        seen, labels, share = as_seen(images, labels, draw)
        if seen.shape[1] in (1, 3):
            self._board.image("data/first_batch", grid(seen), self._step)
        self._board.text("data/labels_of_first_batch", label_table(labels, share, classes), self._step)
        self._board.flush()

    def phase_begins(self, step: int, phase: str, sparsity: float) -> None:
        """With its first step. Together with the record of the last epoch before it, the switch is drawn as
        the step that it is, not as a ramp over the epoch."""
        self._scalars({"phase/sparse": float(phase == "sparse"), "sparsity/overall": sparsity}, step)

    def step(self, record: dict[str, Any]) -> None:
        """A record read within an epoch: kind, epoch, step, phase, lr, loss, images_per_second, data_wait;
        in fp16 also loss_scale, skipped_steps."""
        self._record({"kind": "step", **record})

    def epoch(self, record: dict[str, Any], layer_sparsity: dict[str, float]) -> None:
        self._record({"kind": "epoch", **record, "layer_sparsity": layer_sparsity})
        self._scalars(
            {f"sparsity/layer/{name}": each for name, each in layer_sparsity.items()}, record["step"]
        )
        again = record.get("mask_difference") is not None  # gradual pruning compresses within a phase
        if record["phase"] == "sparse" and (self._phase != "sparse" or again):
            self._draw("layers", lambda: self._board.kept(layer_sparsity, record["step"]))
        self._step, self._phase = record["step"], record["phase"]
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
        scores = {f"result/{key}_top1": row["top1"] for key, row in pair.items() if row}
        self._draw("scores", lambda: self._board.scores(recipe, scores, self._closing))

    def confused(self, counts: Tensor, classes: Sequence[str]) -> None:
        """Of a finished run's model, see trainer.evaluate.confusion."""
        self._draw(
            "confused classes",
            lambda: self._board.text("test/most_confused", confused_table(counts, classes), self._closing),
        )

    def _draw(self, what: str, draw: Callable[[], None]) -> None:
        """What one looks at ends no run. A full disk does, as for all records."""
        try:
            draw()
        except OSError:
            raise
        except Exception as error:  # of libraries that draw
            log.warning("TensorBoard lacks %s: %s", what, error)

    @property
    def _closing(self) -> int:
        """A step behind the last: what is said of a finished run is taken out and said again where it is
        resumed, see keep_until."""
        return self._step + 1

    def close(self) -> None:
        """Raises nothing: what ends the run is said already, or it has ended well."""
        self.screen.close()
        for end in (self._draw_batch, self._file.close, self._board.close):
            try:
                end()
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
        self._draw_batch()
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
