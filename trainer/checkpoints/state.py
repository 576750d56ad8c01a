"""The whole state of a run: taken from the live objects, and put back into them.

The state does not depend on the ZeRO stage: master weights and momentum are stored whole, by parameter name.
It hardly depends on the number of ranks: only what is a rank's own (random generators, its BatchNorm
statistics within an epoch, its share of the epoch's counts) is stored per rank. When their number changes,
statistics are averaged, counts added up, and every rank's random generators seeded anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data.loader import Loader
from sparsity import ACDC
from sparsity.masters import masters_of
from trainer.checkpoints.saved_model import MASK, layer_of_mask, plain_state
from trainer.distributed import ranks
from trainer.optim.optimizers import check_state


@dataclass
class Position:
    """How far a run is.

    epoch, step: the next epoch, and optimizer steps done in it. totals: this rank's counts in it, see
    trainer.models.classifier. training_flops: so far. dense_training_flops: of the same images without masks;
    0 in checkpoints from before it was counted, see RunFlops.recount. seconds: wall-clock time of the run so
    far, resumed parts added up. pair: what is known of dense twin and sparse model once they are saved.
    test_images: those that it was evaluated on last, for people; None in checkpoints from before. threads:
    that each rank computes with on a CPU, as the run began; 0 on a GPU and in checkpoints from before.
    """

    epoch: int = 0
    step: int = 0
    totals: list[float] = field(default_factory=lambda: [0.0] * 4)
    training_flops: float = 0.0
    dense_training_flops: float = 0.0
    seconds: float = 0.0
    pair: dict[str, dict[str, Any]] = field(default_factory=dict)
    test_images: str | None = None
    threads: int = 0


def capture(engine: Any, acdc: ACDC, loader: Loader, position: Position) -> dict[str, Any]:
    """Everything, on the CPU, in tensors and plain values. Collective: call it on every rank."""
    masters = masters_of(engine)
    model = acdc.model
    mine = {
        "rng": _random_states(),
        "buffers": _statistics(model),
        "totals": position.totals,
        "data": loader.state(),
    }
    averaged = {}
    if engine.averages is not None:
        averaged = {"averages": _to_cpu(engine.averages.weights())}
        mine["averages"] = _to_cpu(engine.averages.statistics())
    count = masters.num_steps()
    counted = {} if count is None else {"optimizer_steps": count}
    scaling = {} if engine.loss_scaling is None else {"loss_scaling": engine.loss_scaling.state_dict()}
    return {
        "model": _to_cpu(model.state_dict()),
        "optimizer": {
            name: _to_cpu(masters.state(parameter)) if parameter.requires_grad else {}
            for name, parameter in model.named_parameters()
        },
        "acdc": _to_cpu(acdc.state_dict()),
        "position": {key: value for key, value in asdict(position).items() if key != "totals"},
        "data": loader.fingerprint(),
        "ranks": ranks.all_gather(mine),
        **averaged,
        **counted,
        **scaling,
    }


def check_restorable(state: Mapping[str, Any], acdc: ACDC, loader: Loader) -> None:
    """What can be known without an engine of whether restore will take the state. Raises ValueError."""
    _check_parts(state)
    _check_same_model(acdc.model.state_dict(), state["model"])
    _check_same_data(state["data"], loader.fingerprint())
    acdc.check_state(state["acdc"])


def restore(state: Mapping[str, Any], engine: Any, acdc: ACDC, loader: Loader, seed: int) -> Position:
    """Put a captured state back. seed: of the run, see seed_generators. Raises ValueError, before anything is
    changed, where the model, the schedule or the stream of data is another one, naming the difference."""
    model = acdc.model
    check_restorable(state, acdc, loader)
    _check_shapes(model, state["optimizer"])
    check_state(masters_of(engine).optimizers[0], state["optimizer"])
    position = Position(**state["position"])
    same_ranks = len(state["ranks"]) == ranks.world_size()
    if same_ranks:
        ranks.keep_threads(position.threads)  # before kernels are made for so many
    model.load_state_dict(state["model"])
    acdc.load_state_dict(state["acdc"])
    _load_masters(engine, model, state["model"], state)
    _load_scaling(engine, state)
    if same_ranks:
        mine = state["ranks"][ranks.rank()]
        position.totals = mine["totals"]
        loader.load_state(mine.get("data", {}))
        model.load_state_dict(mine["buffers"], strict=False)
        _set_random_states(mine["rng"])
        if engine.averages is not None:
            engine.averages.begin(state.get("averages", {}), mine.get("averages", {}))
    else:
        parts = state["ranks"]
        position.threads = 0  # the sums are other ones anyway
        model.load_state_dict(_mean_statistics(parts, "buffers"), strict=False)
        _begin_averages(engine, state)
        acdc.accelerate({})  # chosen for another share of the batch
        seed_generators(seed, position.epoch, position.step)
        if ranks.is_main():
            position.totals = np.sum([part["totals"] for part in parts], axis=0).tolist()
    return position


def check_branch(state: Any, acdc: ACDC) -> None:
    """Whether branch_off can begin there. Raises ValueError for another model, a state from within an epoch,
    and what ACDC.start_at refuses; nothing is changed."""
    _check_parts(state)
    if within := state["position"]["step"]:
        raise ValueError(
            f"it was saved within an epoch, after {within} steps of it; name one from an epoch's end"
        )
    ours = {name: value for name, value in acdc.model.state_dict().items() if not name.endswith(MASK)}
    _check_same_model(ours, plain_state(state["model"]))
    _check_shapes(acdc.model, state["optimizer"])
    acdc.check_start(state["position"]["epoch"], _masks_in_force(state))


def branch_off(state: Mapping[str, Any], engine: Any, acdc: ACDC) -> Position:
    """Begin a new run where a captured state stands, which check_branch has passed: weights, BatchNorm
    statistics, momentum and epoch are taken over; phases, masks and learning rates are this run's own. Raises
    ValueError for another optimizer's state."""
    model, weights = acdc.model, plain_state(state["model"])
    check_state(masters_of(engine).optimizers[0], state["optimizer"])
    acdc.start_at(state["position"]["epoch"], _masks_in_force(state))
    model.load_state_dict(weights, strict=False)
    _load_masters(engine, model, weights, state)
    _load_scaling(engine, state)
    _begin_averages(engine, state)
    kept = ("epoch", "training_flops", "dense_training_flops")
    return Position(**{key: value for key, value in state["position"].items() if key in kept})


def _load_masters(
    engine: Any, model: nn.Module, weights: Mapping[str, Tensor], state: Mapping[str, Any]
) -> None:
    masters = masters_of(engine)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:  # of frozen ones there is no more than the model's own state
            masters.load_(parameter, weights[name].to(parameter.device), state["optimizer"][name])
    if "optimizer_steps" in state:
        masters.load_num_steps_(state["optimizer_steps"])


def _load_scaling(engine: Any, state: Mapping[str, Any]) -> None:
    """Of a run in fp16. One that was in another precision so far begins with torch's first scale. Behind
    _load_masters: a state from before the first momentum has none to load."""
    if engine.loss_scaling is None:
        return
    engine.loss_scaling.begin_momentum()
    if "loss_scaling" in state:
        engine.loss_scaling.load_state_dict(state["loss_scaling"])


def _begin_averages(engine: Any, state: Mapping[str, Any]) -> None:
    """Where ranks are others than before."""
    if engine.averages is not None:
        engine.averages.begin(state.get("averages", {}), _mean_statistics(state["ranks"], "averages"))


def _mean_statistics(parts: list[Any], key: str) -> dict[str, Tensor]:
    names = parts[0].get(key, ())
    return {name: sum(part[key][name] for part in parts) / len(parts) for name in names}


def _masks_in_force(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Keep-masks by layer name of a state from a sparse phase; none of one from a dense phase."""
    if state["acdc"]["phase"] != "sparse":
        return {}
    values = state["model"]
    return {layer_of_mask(name, values)[0]: values[name] for name in values if name.endswith(MASK)}


def last_masks(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Keep-masks by layer name of a captured state's last compression; none where there was none yet."""
    return _masks_in_force(state) or state["acdc"]["previous_masks"]


def _check_parts(state: Any) -> None:
    parts = {"model": dict, "optimizer": dict, "acdc": dict, "position": dict, "data": dict, "ranks": list}
    for name, kind in parts.items():
        if not isinstance(state, dict) or not isinstance(state.get(name), kind):
            raise ValueError(f"it is not a training state: {name} is missing")
    for name in ("epoch", "step"):
        if not isinstance(state["position"].get(name), int):
            raise ValueError(f"it is not a training state: its {name} is not a number")


def _check_shapes(model: nn.Module, states: Mapping[str, Any]) -> None:
    for name, parameter in model.named_parameters():
        values = states.get(name)
        if not isinstance(values, dict) or any(v.shape != parameter.shape for v in values.values()):
            raise ValueError(f"its optimizer state does not fit {name}")


def _check_same_model(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    for name in [*ours, *(name for name in theirs if name not in ours)]:
        a, b = ours.get(name), theirs.get(name)
        if a is None or b is None or a.shape != b.shape:
            shapes = ["missing" if t is None else str(tuple(t.shape)) for t in (b, a)]
            hint = ""
            if b is None and name.endswith(f".in_proj{MASK}"):  # until attention was masked as a whole
                hint = '; the run left it dense: add "*.in_proj_weight" to sparsity.exclude'
            raise ValueError(
                f"another model: {name} is {shapes[0]} in the checkpoint, {shapes[1]} in the recipe{hint}"
            )


def _check_same_data(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    keys = [key for key in {*theirs, *ours} if key != "order" and theirs.get(key) != ours.get(key)]
    differences = [f"{key} was {theirs.get(key)!r}, is {ours.get(key)!r}" for key in sorted(keys)]
    if not keys and theirs.get("order") != ours.get("order"):  # which follows from what is named above
        differences = ["this version of numpy draws other random numbers than the one before"]
    if differences:
        raise ValueError(f"another stream of training data: {'; '.join(differences)}")


def _statistics(model: nn.Module) -> dict[str, Tensor]:
    """BatchNorm's running statistics: what differs between ranks within an epoch."""
    return {name: b.detach().cpu().clone() for name, b in model.named_buffers() if b.is_floating_point()}


def seed_generators(seed: int, epoch: int, step: int = 0) -> None:
    """Seed torch's generators (dropout) by the place in the run: each rank draws its own numbers, and an
    epoch draws the same whether resumed at its start or not."""
    place = np.random.SeedSequence((seed, epoch, ranks.rank(), step))
    torch.manual_seed(int(place.generate_state(1, np.uint64)[0]))


def _random_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_states(states: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _to_cpu(value: Any) -> Any:
    """Plain copies of tensors in nested dicts; an OrderedDict becomes a dict."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, Mapping):
        return {key: _to_cpu(inner) for key, inner in value.items()}
    return value
