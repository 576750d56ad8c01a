"""N:M models on the disk without their zeros: a safetensors file that holds, of each 2:4 weight,

    KEY.values    (out, kh * kw * in / 2)           the kept weights, as trained
    KEY.places    uint8, (out, kh * kw * in / 8)    which two of every four they are

in (out, kh, kw, in) order, and every other tensor as it is. The metadata tell the weights' shapes.
See sparsity.kernels.semi_structured.packing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sparsity.kernels.semi_structured.packing import Packed24, is_24, pack24, unpack24
from sparsity.layers import maskable

SHAPES = "sparse24"  # key of the metadata


def pack_state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """(tensors, shapes of the packed weights by name). Raises ValueError for a model without a 2:4 layer."""
    tensors, shapes = dict(model.state_dict()), {}
    for each in maskable(model).values():
        weight = each.weight.detach()
        matrix = weight.movedim(1, -1).flatten(1)
        if matrix.shape[1] % 8 or weight.shape[1] % 4 or not is_24(matrix):
            continue
        key = each.key
        del tensors[key]
        packed = pack24(matrix)
        tensors[f"{key}.values"], tensors[f"{key}.places"] = packed
        shapes[key] = list(weight.shape)
    if not shapes:
        raise ValueError(
            "no layer is 2:4, so there is nothing to pack; train with sparsity.pattern=2:4 "
            "sparsity.target=null, or export safetensors"
        )
    return {name: value.contiguous() for name, value in tensors.items()}, shapes


def export_sparse24(model: nn.Module, info: Mapping[str, str], path: Path) -> None:
    """Write the file; info: further metadata."""
    from safetensors.torch import save_file

    tensors, shapes = pack_state(model)
    save_file(tensors, path, {**info, SHAPES: json.dumps(shapes)})


def read_sparse24(path: Path) -> dict[str, Tensor]:
    """The model's whole state_dict, bit for bit. Raises ValueError for another kind of file."""
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            shapes: dict[str, Any] = json.loads((file.metadata() or {})[SHAPES])
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        for key, (outputs, inputs, *kernel) in shapes.items():
            packed = Packed24(state.pop(f"{key}.values"), state.pop(f"{key}.places"))
            state[key] = unpack24(packed).view(outputs, *kernel, inputs).movedim(-1, 1).contiguous()
    except (OSError, MemoryError):
        raise
    except Exception as error:  # of another kind of file, or one made to harm: nothing in it is executed
        raise ValueError(f"{path} is not a file of acdc export --format sparse24: {error}") from error
    return state


def packed_share(model: nn.Module) -> float:
    """Bytes of the packed model over those of the plain one."""
    tensors, _ = pack_state(model)
    packed, plain = (sum(value.nbytes for value in state.values()) for state in (tensors, model.state_dict()))
    return packed / plain
