"""TensorBoard's part of a run's records: curves of everything, and a page with the story of AC/DC."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from trainer.monitor.event_files import keep_until
from trainer.monitor.pictures import kept_by_layer

# Tab "Custom scalars". Dense and sparse evaluations are two lines: one through both jumps at every switch
LAYOUT = {
    "AC/DC": {
        "test top-1, %": ["Multiline", ["test/top1_dense", "test/top1_sparse"]],
        "loss": ["Multiline", ["train/loss_epoch", "test/loss"]],
        "sparsity": ["Multiline", ["sparsity/overall"]],
        "mask change": ["Multiline", ["sparsity/mask_difference"]],
        "images per second": ["Multiline", ["throughput/images_per_second"]],
        "learning rate": ["Multiline", ["optimizer/lr"]],
    }
}


class Board:
    """folder: of its files. start_step: what was logged after it is taken out. texts: to show as they are, by
    what they are; files, or lines. is_new: whether nothing had been logged."""

    def __init__(self, folder: Path, start_step: int, texts: Mapping[str, Path | str]) -> None:
        logged = keep_until(folder, start_step)
        # for a TensorBoard that is running, and has read what was taken out
        purge_step = start_step + 1 if logged else None
        self._writer: Any = SummaryWriter(str(folder), purge_step=purge_step)
        self.is_new = not logged
        if logged:
            return
        self._writer.add_custom_scalars(LAYOUT)
        for name, text in texts.items():
            with suppress(OSError):
                content = text if isinstance(text, str) else text.read_text(encoding="utf-8")
                self.text(name, "\n".join(f"    {line}" for line in content.splitlines()), 0)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)

    def histograms(self, values: Mapping[str, Tensor], step: int) -> None:
        for tag, each in values.items():
            self._writer.add_histogram(tag, each, step)

    def kept(self, layer_sparsity: Mapping[str, float], step: int) -> None:
        """A picture: the share of weights that each layer keeps, in the network's order."""
        self._writer.add_figure("sparsity/kept_by_layer", kept_by_layer(layer_sparsity), step)

    def image(self, tag: str, picture: NDArray[np.uint8], step: int) -> None:
        """picture: (height, width, channels)."""
        self._writer.add_image(tag, picture, step, dataformats="HWC")

    def text(self, tag: str, markdown: str, step: int) -> None:
        self._writer.add_text(tag, markdown, step)

    def scores(self, recipe: Mapping[str, Any], scores: Mapping[str, float], step: int) -> None:
        """Tab "HParams": what the recipe says, by dotted keys, beside what came out, by tag."""
        plain = {
            key: each if isinstance(each, bool | int | float | str) else str(each)
            for key, each in recipe.items()
        }
        for summary in hparams(plain, dict(scores)):  # type: ignore[no-untyped-call]
            self._writer.file_writer.add_summary(summary, step)
        self.scalars(scores, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
