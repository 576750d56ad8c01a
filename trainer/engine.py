"""The DeepSpeed engine around the compiled model: precision, memory format, ZeRO stage, compilation."""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
import sysconfig
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsity import inductor
from trainer.checkpoints.environment import cpu_multiplies_bf16
from trainer.config.data import ImageNetData
from trainer.config.schema import Config, EngineConfig, EvalConfig
from trainer.distributed import ranks
from trainer.errors import EnvironmentFailure, UserError
from trainer.models import stem
from trainer.paths import user_path

log = logging.getLogger(__name__)

PRECISIONS = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_OFFLOADED = {"offload_optimizer", "cpu_offload", "zenflow"}  # keys of zero_optimization


def deepspeed_config(config: Config, device: torch.device) -> dict[str, Any]:
    """DeepSpeed's JSON: generated from ours, with the user's own file merged in.

    Raises UserError for a file that is not one, and for a value in it that contradicts the recipe.
    """
    micro_batch = config.data.batch_size // (ranks.world_size() * config.engine.accumulation_steps)
    dtype = precision(config, device)
    # Switched off it has a type all the same, which no user's file has to know: DeepSpeed's usual one
    kind = "float16" if dtype == torch.float16 else "bfloat16"
    generated: dict[str, Any] = {
        "train_batch_size": config.data.batch_size,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": config.engine.accumulation_steps,
        "zero_optimization": {"stage": config.engine.zero_stage},
        "zero_allow_untested_optimizer": True,
        # Weights stay fp32 masters, BatchNorm stays fp32. The bf16 and fp16 modes would cast both.
        "torch_autocast": {"enabled": dtype != torch.float32, "dtype": kind},
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
        "steps_per_print": 2**62,
        # On by default, it waits for the device inside the compiled region from the third step on
        "timers": {"throughput": {"enabled": False}},
    }
    if config.optimizer.clip_norm:
        generated["gradient_clipping"] = config.optimizer.clip_norm
    if config.engine.deepspeed is not None:
        path = user_path(config.engine.deepspeed)
        try:
            theirs = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"engine.deepspeed {path}: {error}") from error
        if not isinstance(theirs, dict):
            raise UserError(f"engine.deepspeed {path}: a DeepSpeed configuration is a JSON object")
        if ours := [key for key in ("optimizer", "scheduler") if key in theirs]:
            raise UserError(
                f"engine.deepspeed {path}: {' and '.join(ours)} belong to the recipe, leave them out"
            )
        _merge(generated, theirs, str(path), "")
    # DeepSpeed 0.19.8 clips gradients to norm 1 unless told otherwise; the paper does not clip
    generated.setdefault("gradient_clipping", 0.0)
    # Only clipping needs the norm. With it ZeRO-1/2 would wait for the device in every step, and would skip
    # steps of infinite gradients in silence, where stage 0 ends the run. With optimizers off the device
    # DeepSpeed insists on it
    zero = generated["zero_optimization"]
    if config.engine.zero_stage and generated["gradient_clipping"] == 0 and not _OFFLOADED & zero.keys():
        zero.setdefault("compute_grad_norm", False)
    # ZeRO-1/2 would add gradients of Conv2d and Linear up in bf16, and in fp32 those of masked layers, whose
    # class it does not know. All in fp32, as stage 0 does
    generated["torch_autocast"].setdefault("lower_precision_safe_modules", [])
    return generated


def _merge(ours: dict[str, Any], theirs: dict[str, Any], source: str, prefix: str) -> None:
    for key, value in theirs.items():
        if isinstance(value, dict) and isinstance(ours.get(key), dict):
            _merge(ours[key], value, source, f"{prefix}{key}.")
        elif key in ours and ours[key] != value:
            raise UserError(
                f"{source}: {prefix}{key} is {value!r} there, but the recipe makes it {ours[key]!r}; "
                "set it in one place, the recipe"
            )
        else:
            ours[key] = value


def precision(config: Config | EvalConfig, device: torch.device) -> torch.dtype:
    """The type of matrix products. With float32, precision_name says whether a GPU may round to TF32."""
    return PRECISIONS[precision_name(config, device)]


def autocast(config: Config | EvalConfig, device: torch.device) -> torch.autocast:
    """The context in which a model computes outside the engine as it does in training."""
    dtype = precision(config, device)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def precision_name(config: Config | EvalConfig, device: torch.device) -> str:
    """What matrix products are computed in, as recipes write it."""
    if config.engine.precision != "auto":
        return config.engine.precision
    return "bf16" if device.type == "cuda" or cpu_multiplies_bf16() else "fp32"


def check_precision(config: EngineConfig, device: torch.device) -> None:
    """Raise EnvironmentFailure for a precision that the device does not have. Warn of one that is slow."""
    if config.precision == "fp16" and device.type != "cuda":
        raise EnvironmentFailure("engine.precision=fp16 needs a GPU; on a CPU choose auto, bf16 or fp32")
    if config.precision == "tf32" and not (device.type == "cuda" and torch.cuda.is_tf32_supported()):
        raise EnvironmentFailure(
            "engine.precision=tf32 needs an NVIDIA GPU of the Ampere generation (A100, RTX 30) or a newer "
            "one; here choose auto, bf16 or fp32"
        )
    in_bf16 = device.type == "cuda" and config.precision in ("auto", "bf16")
    if in_bf16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        log.warning("this GPU has no bf16 of its own and emulates it: engine.precision=fp16 is faster here")


def set_up_gpu(config: EngineConfig, device: torch.device) -> None:
    """How cuDNN chooses its algorithms, and whether float32 products may be rounded to TF32, in this process.

    By torch's older switches: where only the newer ones (fp32_precision) allow TF32, torch 2.11 raises an
    error while it compiles.
    """
    if device.type != "cuda":
        return
    torch.backends.cudnn.benchmark = config.cudnn_benchmark
    torch.backends.cudnn.deterministic = not config.cudnn_benchmark
    # Both are set: torch allows TF32 in convolutions, not in matrix products, unless told otherwise
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = config.precision == "tf32"
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores", UserWarning)  # Inductor advises TF32


def check_same_precision(config: Config, device: torch.device) -> None:
    """Raise UserError where "auto" means one thing on one rank's machine and another on another's."""
    if len({*ranks.all_gather(precision_name(config, device))}) > 1:
        raise UserError(
            "engine.precision=auto: some of these machines multiply bf16 in hardware, others do not; choose "
            "engine.precision=fp32 or bf16 for all"
        )


def check_convolutions(model: nn.Module, device: torch.device) -> None:
    """Raise ValueError for layers that a CPU cannot train: in torch 2.13 the weight gradient of a 1 x 1
    convolution of stride 2 with fewer than 8 input channels, in channels_last, is wrong, overwrites memory,
    or never ends (oneDNN issue 6035)."""
    if device.type != "cpu":
        return
    wrong = [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d)
        and (layer.kernel_size, layer.stride, layer.groups) == ((1, 1), (2, 2), 1)
        and layer.in_channels < 8
    ]
    if wrong:
        raise ValueError(
            f"{', '.join(wrong[:3])}: on a CPU, torch computes wrong gradients of 1 x 1 convolutions of "
            "stride 2 with fewer than 8 input channels, and overwrites memory; make the model wider"
        )


def build_engine(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: dict[str, Any],
    config: Config,
    device: torch.device,
) -> Any:
    """The engine, ready to train. settings: as deepspeed_config makes them."""
    deepspeed = ranks.import_deepspeed()
    set_up_gpu(config.engine, device)
    module.to(device)
    try:
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=copy.deepcopy(settings))
    except (ValueError, TypeError, AssertionError) as error:
        if config.engine.deepspeed is None:
            raise
        raise UserError(f"engine.deepspeed {config.engine.deepspeed}: {error}") from error
    clipping = engine.gradient_clipping()
    if not isinstance(clipping, int | float):  # DeepSpeed finds out at the first step
        raise UserError(
            f"engine.deepspeed {config.engine.deepspeed}: gradient_clipping {clipping!r} is not a number"
        )
    if config.engine.zero_stage == 0:
        # Not earlier: initialize() refuses such weights. Not for ZeRO-1/2: its flat masters undo it.
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if ranks.world_size() == 1 and config.engine.zero_stage == 0:
        # DeepSpeed 0.19.8 sums over one rank, too: it copies all gradients, out of channels_last and back
        engine.enable_backward_allreduce = False
    if config.optimizer.clip_norm and config.engine.zero_stage == 0:
        # DeepSpeed 0.19.8 waits for the device here, to copy two numbers to it; torch's law is the same
        engine.clip_fp32_gradients = partial(
            nn.utils.clip_grad_norm_, list(module.parameters()), config.optimizer.clip_norm
        )
    engine.loss_scaling = None
    engine.averages = None  # trainer.build adds them
    if engine.torch_autocast_z0_gradscaler is not None:
        engine.loss_scaling = LossScaling(engine.torch_autocast_z0_gradscaler, optimizer, device)
    if should_compile(config, device):
        if device.type == "cuda":
            # torch 2.13 loses channels_last in some backward graphs (pytorch#189239)
            torch._inductor.config.force_layout_optimization = True
        if isinstance(config.data, ImageNetData):  # for each side of the images one, and one with 2:4 kernels
            torch._dynamo.config.recompile_limit = 8 + 2 * len(config.data.sizes)
        # On a CPU, what stands between sparse kernels gets kernels, too; else that is Inductor
        fast_stem = config.engine.fast_stem and device.type == "cuda"
        engine.compile(stem.inductor if fast_stem else inductor, {"dynamic": False})
    engine.train()
    return engine


class LossScaling:
    """What fp16 needs: the loss is multiplied by a scale, so that small gradients do not vanish; a step whose
    gradients overflow is skipped and the scale halved; after 2,000 steps without, it is doubled.

    Whether a step overflows is decided on the device, by torch's fused optimizers: nothing waits for it. All
    ranks decide alike, from the same summed gradients. scaler: DeepSpeed's, which scales the loss and
    unscales gradients. optimizer: SGD or AdamW with fused=True.
    """

    def __init__(self, scaler: torch.amp.GradScaler, optimizer: Any, device: torch.device) -> None:
        self._scaler = scaler
        self._skipped = torch.zeros((), dtype=torch.float64, device=device)
        self._optimizer = optimizer
        optimizer.register_step_post_hook(self._count)
        self.begin_momentum()

    def begin_momentum(self) -> None:
        """From 0, where there is none yet. torch leaves that of a first step that is skipped uninitialised.
        From 0, a first step ends with the same bits as from none."""
        for group in self._optimizer.param_groups:
            for parameter in group["params"] if group.get("momentum") else ():
                state = self._optimizer.state[parameter]
                if state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(parameter)

    def _count(self, optimizer: Any, *_: Any) -> None:
        self._skipped += optimizer.found_inf  # there while the scaler steps

    def read(self) -> dict[str, float | int]:
        """The scale, and steps skipped so far. Reads the device."""
        return {"loss_scale": self._scaler.get_scale(), "skipped_steps": int(self._skipped.item())}

    def state_dict(self) -> dict[str, Any]:
        return {**self._scaler.state_dict(), "skipped": self._skipped.item()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._scaler.load_state_dict(state)
        self._skipped.fill_(state["skipped"])


def should_compile(config: Config, device: torch.device) -> bool:
    if config.engine.compile != "auto":
        return config.engine.compile
    missing = missing_for_compilation(device.type)
    if missing is not None:
        log.warning("no %s found: the model runs uncompiled, slower", missing)
    return missing is None


def missing_for_compilation(device_type: str) -> str | None:
    """What torch.compile would miss on this machine, or None: it builds C++ for a CPU, C launchers for a
    GPU."""
    variable, *known = ("CXX", "g++", "clang++") if device_type == "cpu" else ("CC", "gcc", "cc", "clang")
    if not any(map(shutil.which, filter(None, (os.environ.get(variable), *known)))):
        return f"C++ compiler ({known[0]})" if device_type == "cpu" else f"C compiler ({known[0]})"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python header files (python3-dev)"
    return None


def num_graphs() -> int:
    """Graphs that torch.compile has made in this process: 2, for training and evaluation, however many
    phases."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
