"""Saved models in formats that other programs read: ONNX, safetensors, a torch state_dict; without zeros, and
packed 2:4.

A model is exported plain: no masks, no wrappers, dropped weights 0. Its input are normalised images, float32
(batch, channels, height, width); mean and standard deviation travel in the file's metadata where it has any.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsity import inference
from trainer.export.sparse24_file import export_sparse24

OPSET = 18


def export_onnx(model: nn.Module, info: Mapping[str, Any], path: Path) -> None:
    """An ONNX file with the weights inside, for any batch size. Raises ModuleNotFoundError without onnx."""
    try:
        import onnx
        import onnxscript  # noqa: F401  what torch.onnx builds graphs with
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"ONNX export needs onnx and onnxscript: pip install 'acdc-train[onnx]' ({error})"
        ) from error
    example = torch.zeros(2, *info["model"]["input_shape"])
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about torch's own use of its own functions
        program = torch.onnx.export(
            model.eval(),
            (example,),
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    for key, value in _metadata(info).items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, value
    onnx.checker.check_model(proto)
    path.write_bytes(proto.SerializeToString())


def export_safetensors(model: nn.Module, info: Mapping[str, Any], path: Path) -> None:
    """Names to tensors."""
    from safetensors.torch import save_file

    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, path, _metadata(info))


def export_torch(model: nn.Module, info: Mapping[str, Any], path: Path) -> None:
    """A torch file with the state_dict alone, names as torchvision's where the model is one of its own."""
    torch.save(model.state_dict(), path)


def _sparse(model: nn.Module, info: Mapping[str, Any], path: Path) -> None:
    inference.save(model, path, _metadata(info))


def _sparse24(model: nn.Module, info: Mapping[str, Any], path: Path) -> None:
    export_sparse24(model, _metadata(info), path)


# name -> (what writes it, suffix)
FORMATS: dict[str, tuple[Callable[[nn.Module, Mapping[str, Any], Path], None], str]] = {
    "onnx": (export_onnx, ".onnx"),
    "safetensors": (export_safetensors, ".safetensors"),
    "sparse": (_sparse, ".sparse.safetensors"),
    "sparse24": (_sparse24, ".sparse24.safetensors"),
    "torch": (export_torch, ".pth"),
}


def export_model(kind: str, model: nn.Module, info: Mapping[str, Any], path: Path) -> None:
    """Write `model` as `kind`, a name of FORMATS, to `path`, at once: never half of it. Raises OSError."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {path.parent} to write {path.name} into")
    partial = path.with_name(f".{path.name}.partial")
    try:
        FORMATS[kind][0](model, info, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _metadata(info: Mapping[str, Any]) -> dict[str, str]:
    described = info["model"]
    return {key: str(described[key]) for key in ("name", "num_classes", "input_shape", "mean", "std")}
