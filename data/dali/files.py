"""Image files through DALI: read, then what data.dali.images does. The listing's next replaces a bad file."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.dali.images import DaliImageLoader, Position
from data.images.files import ImageFiles
from data.loader import PADDING_LABEL


class DaliFileLoader(DaliImageLoader):
    """Batches of `files`. arguments: DaliImageLoader's; files are named by their relative paths."""

    def __init__(self, files: ImageFiles, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.files = files
        self._root = os.fsencode(files.root) + b"/"

    def fingerprint(self) -> dict[str, Any]:
        ours = {"backend": "dali", "data": self.files.digest, **self.decoder.fingerprint()}
        return {**ours, **self.stream.fingerprint()}

    def _images(self, position: Position, draw: Any) -> tuple[list[NDArray[np.uint8]], NDArray[np.int64]]:
        files = self._files_at(position, draw.indices)
        paths = (self._root + os.fsencode(self.files.files[file]) for file in files)
        counts = draw.counts
        if self.evaluation:
            counts = counts & (np.array(files) == draw.indices)  # what stands in does not
        labels = np.where(counts, self.files.labels[files], PADDING_LABEL)
        return [np.frombuffer(path, np.uint8) for path in paths], labels

    def _encoded(self, dali: Any, images: Any) -> Any:
        return dali.fn.io.file.read(images)

    def _names(self, position: Position, draw: Any) -> list[str]:
        return [self.files.files[file] for file in self._files_at(position, draw.indices)]

    def _failing(self, trial: Any, inputs: tuple[Any, ...]) -> dict[int, str]:
        """Raises OSError where no file of the batch is there."""
        failing = super()._failing(trial, inputs)
        paths = inputs[0]
        if len(failing) == len(paths) and not any(os.path.exists(path.tobytes()) for path in paths):
            first = os.fsdecode(paths[0].tobytes())
            raise OSError(f"no file of a whole batch is there, such as {first}: a lost mount?")
        return failing

    def _files_at(self, position: Position, indices: NDArray[np.int64]) -> list[int]:
        """The files for the places of a batch: the drawn ones, or of the listing the next that is neither
        excluded nor failed there. Raises OSError where none is left."""
        files = []
        for i, file in enumerate(indices.tolist()):
            skip = self._skips.get((*position, i), 0)
            if skip >= len(self.files) - len(self.files.excluded):
                raise OSError(f"no image below {self.files.root} can be decoded")
            while skip or file in self.files.excluded:
                skip -= file not in self.files.excluded
                file = (file + 1) % len(self.files)
            files.append(file)
        return files
