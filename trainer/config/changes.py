"""What of a recipe may change when a run goes on: the written list, and how two recipes are compared by it.

A resumed run is the one that began. What its past was trained with stays; what is still to come may be
another, and each change is logged and kept in the run folder's history.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from pydantic import ValidationError

from sparsity.schedule import PhaseSchedule
from trainer.config.schema import Config

# Every field of a recipe is in one of these lists, a section's fields together by "*"
BEGINNING = ("checkpoint", "model.weights", "model.weights_key")  # how the run began: it may be left out
FREE = (  # what is trained does not depend on them; that the images are the same is checked by themselves
    *("name", "run_root", "resume", "finetune_dense", "save.*", "log.*"),
    *("data.root", "data.val_labels", "data.eval_batch_size", "data.num_threads", "data.device"),
    *("data.on_error", "data.decoder_engine_load", "data.decoder_width_hint", "data.decoder_height_hint"),
    *("sparsity.include", "sparsity.exclude"),  # the layers must be the same: their masks are in the state
)
_MASKS = ("sparsity.pattern", "sparsity.target", "sparsity.rule", "sparsity.gradual", "sparsity.regrowth")
FROM_HERE = (  # what follows is trained or computed otherwise, what lies behind stays
    *("epochs", "sparsity.schedule", *_MASKS),
    *("sparsity.reset_momentum", "sparsity.accelerate", "sparsity.recompute_batch_norm"),
    *("optimizer.lr", "optimizer.momentum", "optimizer.nesterov", "optimizer.betas", "optimizer.alpha"),
    *("optimizer.eps", "optimizer.weight_decay", "optimizer.decay_norms_and_biases", "optimizer.clip_norm"),
    *("lr.*", "loss.*", "mixing", "ema"),
    *("engine.zero_stage", "engine.precision", "engine.cudnn_benchmark", "engine.fast_stem"),
    *("engine.compile", "engine.deepspeed"),
)
FIXED = (  # another value contradicts what was trained
    *("seed", "steps_per_epoch", "model.name", "model.arguments", "model.freeze"),
    *("data.name", "data.batch_size", "data.crop_padding", "data.flip", "data.augment", "data.rand_ops"),
    *("data.rand_magnitude", "data.random_labels", "data.val_share", "data.val_seed"),
    *("data.image_size", "data.image_sizes", "data.min_area", "data.eval_resize", "data.eval_size"),
    *("data.mean", "data.std", "data.format", "data.num_classes", "data.first_label", "data.backend"),
    *("optimizer.name", "engine.accumulation_steps"),
)
_WHOLE = ("mixing", "ema")  # sections that are there or not


@dataclass(frozen=True)
class Change:
    key: str
    then: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key} was {self.then!r}, is {self.now!r}"

    @property
    def is_spelling(self) -> bool:
        """Whether it is the same schedule, written otherwise."""
        if self.key != "sparsity.schedule":
            return False
        return PhaseSchedule.parse(self.then) == PhaseSchedule.parse(self.now)

    @property
    def is_free(self) -> bool:
        return _is_one_of(self.key, FREE)


def changes(past: Any, config: Config) -> list[Change]:
    """What a recipe changes in that of a checkpoint, which an earlier version may have written: fields that
    are not there had their default. How the run began and `resume` itself are left out. past: None of a run
    that has none."""
    if not isinstance(past, dict):
        return []
    try:
        past = Config.model_validate(past).model_dump(mode="json")
    except ValidationError:
        pass  # it had other fields then: those that both have are compared
    then, now = _flat(past), _flat(config.model_dump(mode="json"))
    keys = [key for key in now if key in then and not _is_one_of(key, (*BEGINNING, "resume"))]
    found = [Change(key, then[key], now[key]) for key in keys if then[key] != now[key]]
    return [change for change in found if not change.is_spelling]


def check_changes(found: Iterable[Change], config: Config, position: Mapping[str, Any]) -> None:
    """position: of the state that the run goes on from, see trainer.checkpoints.state.Position. Raises
    ValueError for changes that contradict what was trained so far, all of them at once."""
    found = list(found)
    problems = [str(change) for change in found if _is_one_of(change.key, FIXED)]
    masks = [change for change in found if change.key in _MASKS]
    begun = position["epoch"] + (position["step"] > 0)  # epochs
    actions = config.sparsity.build_actions()
    if masks and all(pattern is None or epoch < begun for epoch, pattern in actions.items()):
        problems += [f"{change}, and no compression follows that would go by it" for change in masks]
    schedules = [change for change in found if change.key == "sparsity.schedule"]
    problems += [problem for change in schedules for problem in _against_past(change, begun, position)]
    if problems:
        raise ValueError(
            "the recipe contradicts what was trained so far: "
            + "; ".join(problems)
            + ". Leave that as it was; or begin a new run from there, with checkpoint= in place of resume="
        )


def with_beginning(config: Config, past: Any) -> Config:
    """The configuration with how the run began, which a resumed run's recipe may leave out. past: see
    changes."""
    if not isinstance(past, dict):
        return config
    weights = {key: _text(past.get("model"), key) for key in ("weights", "weights_key")}
    began: dict[str, Any] = {
        "checkpoint": _text(past, "checkpoint"),
        "model": config.model.model_copy(update=weights),
    }
    data, pixels = past.get("data"), ("mean", "std")  # of images: the checkpoint's model carries them along
    if isinstance(data, dict) and all(
        getattr(config.data, key, 0) is None and data.get(key) for key in pixels
    ):
        began["data"] = config.data.model_copy(update={key: data[key] for key in pixels})
    return config.model_copy(update=began)


def _text(section: Any, key: str) -> str | None:
    value = section.get(key) if isinstance(section, dict) else None
    return value if isinstance(value, str) else None


def _against_past(change: Change, begun: int, position: Mapping[str, Any]) -> list[str]:
    """Where another schedule says otherwise of the epochs that have begun, or would leave the run without one
    of its pair."""
    then, now = PhaseSchedule.parse(change.then), PhaseSchedule.parse(change.now)
    if now.num_epochs < begun:
        return [f"{change}, but {begun} epochs have begun"]
    for epoch in range(begun):
        kinds = then.phase_at(epoch).kind, now.phase_at(epoch).kind
        if kinds[0] != kinds[1]:
            return [f"{change}, but epoch {epoch} was {kinds[0]}, not {kinds[1]}"]
    problems = []
    for key, kind in (("dense_twin", "dense"), ("sparse", "sparse")):
        phase = now.last("dense" if kind == "dense" else "sparse")
        if phase is None or phase.end > position["epoch"] or phase == then.last(phase.kind):
            continue
        if position.get("pair", {}).get(key, {}).get("epoch") != phase.end - 1:
            problems.append(
                f"{change}, whose last {kind} phase ended with epoch {phase.end - 1}, when no {key} "
                "was kept; let another follow"
            )
    return problems


def _is_one_of(key: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def _flat(content: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted keys of at most two parts."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict) and key not in _WHOLE:
            flat |= {f"{key}.{inner}": each for inner, each in value.items()}
        else:
            flat[key] = value
    return flat
