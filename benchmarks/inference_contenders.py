"""Ways to run a finished sparse model on a CPU, for `acdc bench infer`: ours, and those that a competent user
has. Each is a call that answers one batch; the first call compiles.

Compile them with torch._inductor.config.freezing set, which model.compile(options=...) does not reach all
of: without it torch lays weights out anew at each call.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsity.inference import accelerated
from sparsity.inference.graph import fold_batch_norm
from trainer.checkpoints.environment import cpu_multiplies_bf16
from trainer.export.formats import export_onnx

Answer = Callable[[], Tensor]  # the logits
MISSING_ONNX = (
    "ONNX Runtime is left out: pip install onnxruntime 'acdc-train[onnx]' to have it among the rivals ({})"
)


def ours(model: nn.Module, images: Tensor) -> dict[str, tuple[nn.Module, Answer]]:
    """By name: the model on sparse kernels, for its layers, and how it answers."""
    found = {}
    for name, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16}.items():
        if dtype == torch.bfloat16 and not cpu_multiplies_bf16():
            continue
        with _autocast(dtype):
            fast = accelerated(model, images)
        found[f"ours {name}"] = (fast, _compiled(fast, images, dtype))
    return found


def rivals(model: nn.Module, described: Mapping[str, Any], images: Tensor) -> dict[str, Answer]:
    """By name: torch with BatchNorm folded, channels_last, weights frozen and laid out beforehand, in every
    precision that the CPU multiplies; ONNX Runtime where it is installed."""
    folded: Any = fold_batch_norm(copy.deepcopy(model)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    found = {"torch fp32": _compiled(copy.deepcopy(folded), images)}
    if cpu_multiplies_bf16():
        found["torch autocast"] = _compiled(copy.deepcopy(folded), images, torch.bfloat16)
        found["torch bf16"] = _compiled(folded.to(torch.bfloat16), images.to(torch.bfloat16))
    try:
        found["ONNX Runtime fp32"] = _onnx_runtime(model, described, images)
    except ModuleNotFoundError as error:
        print(MISSING_ONNX.format(error))
    return found


def _autocast(dtype: torch.dtype) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)


def _compiled(model: nn.Module, images: Tensor, autocast: torch.dtype = torch.float32) -> Answer:
    model.compile(dynamic=False)

    def answer() -> Tensor:
        with _autocast(autocast):
            logits: Tensor = model(images)
        return logits

    return answer


def _onnx_runtime(model: nn.Module, described: Mapping[str, Any], images: Tensor) -> Answer:
    """Raises ModuleNotFoundError, for what it needs, too."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")  # when it is not its turn
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(copy.deepcopy(model), {"model": described}, path)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    given = {"images": images.contiguous().numpy()}
    return lambda: torch.from_numpy(session.run(["logits"], given)[0])
