"""Recipes of the paper's implementation (IST-DASLab/ACDC), turned into recipes of ours.

Its YAML files say when which layers are pruned and restored, and the optimizer and learning rates:

    pruners: {NAME: {class, epochs: [start, every, end), initial_sparsity, target_sparsity, modules}}
    recyclers: {NAME: {class: RestoreWeights, epochs: [start, every, end), modules}}
    trainers: {default_trainer: {optimizer: {class, lr, ...}, lr_scheduler: {class, epochs: [start, every,
    end]}}}

Network, data set, number of epochs and batch size were arguments of its command.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer.config.recipes import dump_recipe, read_yaml
from trainer.models import MODELS, get_model

NAMES = ("resnet20", "resnet32", "resnet44", "resnet56", "resnet18", "resnet34", "resnet50", "resnet101")
ARCHITECTURES = (*NAMES, "mobilenetv1", "wide_resnet28_10")
PATTERNS = {"UnstructuredMagnitudePruner": "global", "MagnitudePruner": "uniform", "MagnitudeNMPruner": "N:M"}
BATCH_SIZE = 256  # the default of the original's command


@dataclass(frozen=True)
class Command:
    """What the original's command said besides the file. None: what the file says, else its default."""

    arch: str | None = None
    dataset: str | None = None
    epochs: int | None = None
    batch_size: int | None = None


def import_config(path: Path, command: Command) -> dict[str, Any]:
    """Our recipe, as the mapping that a recipe file holds. Raises OSError or ValueError naming the file and
    what in it has no counterpart here."""
    content = read_yaml(path)
    try:
        if not isinstance(content, Mapping):
            raise ValueError("it is not a mapping of keys to values")
        return _translate(content, command)
    except KeyError as error:
        raise ValueError(f"{path}: no {error} where the paper's files have one") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from error


def recipe_text(recipe: Mapping[str, Any], source: str) -> str:
    """The file's text, with the header that recipes have."""
    return f"""# Imported from {source} of the paper's implementation.
#
# Paper:     its figure is not recorded here
# Ours:      not run
# Hardware:  not measured
# Command:   acdc train THIS_FILE data.root=FOLDER

{dump_recipe(recipe)}"""


def _translate(content: Mapping[str, Any], command: Command) -> dict[str, Any]:
    unknown = [key for key in content if key not in ("pruners", "recyclers", "trainers") and content[key]]
    if unknown:
        raise ValueError(f"{', '.join(unknown)} has no counterpart here")
    trainer = content["trainers"]["default_trainer"]
    pruners = list((content.get("pruners") or {}).values())
    recyclers = list((content.get("recyclers") or {}).values())
    scheduler = trainer["lr_scheduler"]
    compress = sorted({epoch for pruner in pruners for epoch in range(*_steps(pruner))})
    decompress = sorted({epoch for recycler in recyclers for epoch in range(*_steps(recycler))})
    epochs = command.epochs or int(scheduler.get("end_epoch") or scheduler["epochs"][2])
    if compress and max(compress) >= epochs:
        raise ValueError(
            f"it prunes in epoch {max(compress)}, and has {epochs} epochs by what it says; give their number "
            "with --epochs"
        )
    if len(content["trainers"]) > 1:
        raise ValueError("more trainers than default_trainer have no counterpart here")
    for recycler in recyclers:
        if recycler["class"] != "RestoreWeights":
            raise ValueError(f"recycler {recycler['class']} has no counterpart here")
    for part in (*pruners, *recyclers):
        if _truth(part.get("keep_pruned", False)) or not _truth(part.get("weight_only", True)):
            raise ValueError("keep_pruned: True and weight_only: False have no counterpart here")
    modules = pruners[0]["modules"] if pruners else []
    if any(set(pruner["modules"]) != set(modules) for pruner in pruners):
        raise ValueError("its pruners prune different layers; here all compressions prune the same")
    if any(not set(modules) <= set(recycler["modules"]) for recycler in recyclers):
        raise ValueError("a recycler leaves pruned layers out; here a decompression restores all")
    arch = command.arch or _architecture(modules)
    dataset = command.dataset or _dataset(arch)
    augmented = {} if dataset == "imagenet" else {"crop_padding": 4, "flip": True}
    return {
        "epochs": epochs,
        "model": {"name": arch},
        "data": {"name": dataset, "batch_size": command.batch_size or BATCH_SIZE, **augmented},
        "optimizer": _optimizer(trainer["optimizer"]),
        "lr": _learning_rates(scheduler, epochs),
        "sparsity": _sparsity(pruners, compress, decompress, epochs) | _layers(arch, modules),
    }


def _steps(part: Mapping[str, Any]) -> tuple[int, int, int]:
    """(start, end, every) of the original's [start, every, end)."""
    start, every, end = part["epochs"]
    return int(start), int(end), int(every)


def _optimizer(optimizer: Mapping[str, Any]) -> dict[str, Any]:
    if optimizer["class"] != "SGD":
        raise ValueError(f"optimizer {optimizer['class']}: SGD is the only one here")
    known = ("class", "lr", "momentum", "weight_decay", "nesterov")
    if strange := [key for key, value in optimizer.items() if key not in known and value]:
        raise ValueError(f"optimizer: {', '.join(strange)} has no counterpart here")
    return {
        "lr": float(optimizer["lr"]),
        "momentum": float(optimizer.get("momentum", 0)),
        "nesterov": _truth(optimizer.get("nesterov", False)),
        "weight_decay": float(optimizer.get("weight_decay", 0)),
    }


def _truth(value: Any) -> bool:
    """A truth value as PyYAML reads one; our own reader takes yes and no for texts."""
    words = {"yes": True, "on": True, "no": False, "off": False}
    return words.get(value.lower(), True) if isinstance(value, str) else bool(value)


def _learning_rates(scheduler: Mapping[str, Any], epochs: int) -> dict[str, Any]:
    start, every, end = (int(number) for number in scheduler["epochs"])
    if scheduler["class"] == "CosineLR":
        if (start, every) != (0, 1) or int(scheduler["end_epoch"]) != epochs:
            raise ValueError("a CosineLR that does not run over all epochs has no counterpart here")
        return {"kind": "cosine", "warmup_epochs": int(scheduler.get("warmup_length", 0))}
    if scheduler["class"] == "ExponentialLR":
        # it steps at the end of these epochs, so the next one is the first with the new rate
        milestones = [epoch + 1 for epoch in range(start, end + 1, every) if epoch + 1 < epochs]
        if not milestones:
            return {"kind": "constant"}
        return {"kind": "step", "milestones": milestones, "gamma": float(scheduler["gamma"])}
    raise ValueError(f"lr_scheduler {scheduler['class']}: CosineLR and ExponentialLR are known here")


def _sparsity(
    pruners: list[Mapping[str, Any]], compress: list[int], decompress: list[int], epochs: int
) -> dict[str, Any]:
    if not pruners:
        return {"schedule": f"dense {epochs}"}
    kinds = {(p["class"], p.get("N"), p.get("M"), p.get("target_sparsity")) for p in pruners}
    if len(kinds) > 1 or pruners[0]["class"] not in PATTERNS:
        raise ValueError(f"pruners {sorted({p['class'] for p in pruners})} have no counterpart here")
    first = pruners[0]
    pattern = PATTERNS[first["class"]]
    sparsity: dict[str, Any] = {"pattern": pattern, "target": first.get("target_sparsity")}
    if pattern == "N:M":
        sparsity = {"pattern": f"{first['N']}:{first['M']}"}
    if first.get("initial_sparsity") != first.get("target_sparsity"):
        if len(pruners) > 1 or decompress:
            raise ValueError("a sparsity that grows over several sparse phases has no counterpart here")
        start, end, every = _steps(first)
        if first.get("degree", 3) != 3:
            raise ValueError(f"degree {first['degree']}: gradual pruning is cubic here")
        gradual = {"initial": first["initial_sparsity"], "end": end, "every": every}
        phases = f"dense {start}, sparse {epochs - start}" if start else f"sparse {epochs}"
        return {**sparsity, "schedule": phases, "gradual": gradual}
    return {**sparsity, "schedule": _phases(compress, decompress, epochs)}


def _phases(compress: list[int], decompress: list[int], epochs: int) -> str:
    """The schedule's text. Where one epoch has both events, the original drops the restoration."""
    switches = {0: "dense", **dict.fromkeys(decompress, "dense"), **dict.fromkeys(compress, "sparse")}
    starts = [epoch for epoch in sorted(switches) if epoch < epochs]
    spans = [
        (switches[epoch], following - epoch)
        for epoch, following in zip(starts, [*starts[1:], epochs], strict=True)
    ]
    again = [kind for (kind, _), (after, _) in pairwise(spans) if kind == after]
    if again:
        raise ValueError(f"two {again[0]} phases follow each other; here phases alternate")
    return ", ".join(f"{kind} {length}" for kind, length in spans)


def _layers(arch: str, modules: list[str]) -> dict[str, Any]:
    if not modules:
        return {}
    names = _layer_names(arch)
    if strange := [name for name in modules if name not in names]:
        raise ValueError(f"{arch} has no layers {', '.join(strange[:4])}; is it another --arch?")
    left_out = [name for name in names if name not in modules]
    if len(left_out) > len(modules):
        return {"include": list(modules)}
    return {"exclude": left_out} if left_out else {}


def _architecture(modules: list[str]) -> str:
    """The smallest network that has all these layers."""
    if not modules:
        raise ValueError("it prunes nothing, so it does not show its network; name it with --arch")
    sizes = {arch: names for arch in ARCHITECTURES if set(modules) <= (names := set(_layer_names(arch)))}
    if not sizes:
        raise ValueError(
            f"no network here has all its layers ({', '.join(modules[:4])}, ...); name it with --arch"
        )
    return min(sizes, key=lambda arch: len(sizes[arch]))


def _layer_names(arch: str) -> list[str]:
    if arch not in MODELS:
        raise ValueError(f"unknown network {arch!r}; one of {', '.join(ARCHITECTURES)}")
    with torch.device("meta"):
        model = get_model(arch, 10)
    return [name for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]


def _dataset(arch: str) -> str:
    if arch == "wide_resnet28_10":
        return "cifar100"
    return "cifar10" if arch in NAMES[:4] else "imagenet"
