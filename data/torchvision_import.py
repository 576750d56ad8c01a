"""Importing torchvision where its compiled part does not fit torch.

torchvision on the package index is built for CUDA; beside a CPU build of torch its import ends with "operator
torchvision::nms does not exist", although models, data sets and transforms need no compiled operator.
Declaring the two operators that its Python code registers fake kernels for lets the import pass.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_library: torch.library.Library | None = None


def import_torchvision() -> ModuleType:
    """torchvision, with `models` and `transforms`. Raises ModuleNotFoundError where it is missing."""
    global _library
    try:
        import torchvision
    except RuntimeError:
        _library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
        for operator in ("nms", "qnms"):
            _library.define(f"{operator}{_SCHEMA}")  # type: ignore[no-untyped-call]
        import torchvision
    return torchvision


def import_transforms() -> Any:
    """torchvision.transforms.v2, with `functional` loaded."""
    import_torchvision()
    import torchvision.transforms.v2.functional

    return torchvision.transforms.v2
