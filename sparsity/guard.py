"""What holds the invariant that the masks stand for: dropped weights are exactly 0 after every step.

Masks act inside the forward pass of the masked layers. A weight that is used elsewhere (a functional call on
layer.weight, a penalty, a tied parameter) gets gradients past its mask, and only a look at weights or
gradients can tell.
"""

from __future__ import annotations

import logging
import operator
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsity.layers import is_sharded
from sparsity.modules.layers import MaskedLayer
from sparsity.schedule import PhaseSchedule

IDLE_CALLS = 4  # of before_step without an optimizer step in between: no accident of a gradient scaler
UNCALLED_STEPS = 8  # of an optimizer without a call of before_step: no warm-up of anything

log = logging.getLogger(__name__)
end_log = logging.getLogger(f"{__name__}.end")  # what the garbage collector brings up, to silence it alone


class MaskError(RuntimeError):
    """Masks do not hold. layers: the names of those concerned."""

    def __init__(self, message: str, layers: list[str]) -> None:
        super().__init__(message)
        self.layers = layers


def check_zeros(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Raise MaskError where a dropped weight is not exactly 0. NaN and infinite ones tell of divergence,
    not of a leak. One device read for all layers where all is well."""
    suspected = [(weights[name] * mask != weights[name]).any() for name, mask in masks.items()]
    if not torch.stack(suspected).any():  # half the memory traffic of counting
        return
    leaks = [((weights[name] != 0) & weights[name].isfinite() & ~mask).sum() for name, mask in masks.items()]
    leaked = torch.stack(leaks).tolist()
    layers = {name: count for name, count in zip(masks, leaked, strict=True) if count}
    if layers:
        raise MaskError(
            f"{sum(leaked):,} dropped weights are no longer 0, in {_few(layers)}: the weight is used past "
            "the layer's own forward pass (a functional call, a penalty, a tied parameter), or it or its "
            "gradient is written to from outside; exclude these layers from pruning",
            list(layers),
        )


def find_escaping(model: nn.Module, layers: Mapping[str, MaskedLayer], example: Tensor) -> list[str]:
    """The layers whose weight `model` uses past the mask, found before any training: gradients of a forward
    pass over `example`, a batch of inputs, in evaluation mode, with half of the weights dropped.

    Parameters, buffers, gradients and training modes of the model are as before afterwards. A model that
    returns no single tensor, or cannot be differentiated so (reentrant checkpoints), is not looked into:
    check_zeros finds out later.
    """
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for layer in layers.values():
            halves = torch.arange(layer.mask.numel(), device=layer.mask.device) % 2 == 0
            layer.mask.copy_(halves.view(layer.mask.shape))
        with torch.random.fork_rng(), torch.enable_grad():
            output = model(example)
            if not isinstance(output, Tensor) or not output.requires_grad:
                return []
            # squares: the sum of a softmax or of normalised values has no gradient
            gradients = torch.autograd.grad(
                output.double().square().sum(), [layer.weight for layer in layers.values()], allow_unused=True
            )
    except RuntimeError as error:
        log.info("not known before training whether masks hold: %s", error)
        return []
    else:
        return [
            name
            for (name, layer), gradient in zip(layers.items(), gradients, strict=True)
            if gradient is not None and bool((gradient.isfinite() & (gradient != 0) & ~layer.mask).any())
        ]
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        for module, training in modes:
            module.training = training


def check_owners(
    model: nn.Module, layers: Mapping[str, MaskedLayer], optimized: Iterable[nn.Parameter]
) -> None:
    """Raise ValueError for a masked weight that is not once among those optimized, that is frozen or sharded.
    Other trained parameters that are not optimized: a warning."""
    _check_whole(layers)
    count = Counter(map(id, optimized))
    for name, layer in layers.items():
        if count[id(layer.weight)] != 1:
            whose = "two of the optimizers" if count[id(layer.weight)] else "none of the attached optimizers"
            raise ValueError(
                f"the weight of layer {name!r} belongs to {whose}; attach all optimizers that train the "
                "model, made over its present parameters, each parameter in one of them"
            )
        if not layer.weight.requires_grad:
            raise ValueError(f"layer {name!r} is masked and frozen; freeze it before ACDC masks the layers")
    others = [name for name, p in model.named_parameters() if p.requires_grad and not count[id(p)]]
    if others:
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        log.warning(
            "trained parameters that belong to none of the attached optimizers keep their momentum at phase "
            "switches: %s%s",
            ", ".join(others[:5]),
            more,
        )


def _check_whole(layers: Mapping[str, MaskedLayer]) -> None:
    """Raise ValueError where FSDP has cut the weight of a masked layer into pieces."""
    for name, layer in layers.items():
        plain = isinstance(layer.weight, nn.Parameter)  # not after FSDP's first version
        if not plain or is_sharded(layer.weight) or layer.weight.shape != layer.mask.shape:
            raise ValueError(
                f"layer {name!r} is sharded by FSDP, and masks are chosen over whole weights: use "
                "DistributedDataParallel, or DeepSpeed with ZeRO stage 0, 1 or 2"
            )


def warn_of_empty(masks: Mapping[str, Tensor]) -> None:
    """Of layers that keep no weight. One device read for all."""
    any_kept = torch.stack([mask.any() for mask in masks.values()]).tolist()
    for (name, mask), kept in zip(masks.items(), any_kept, strict=True):
        if not kept:
            log.warning(
                "layer %s keeps none of its %d weights: nothing of its input reaches its output; exclude it "
                "from pruning, or choose a lower sparsity",
                name,
                mask.numel(),
            )


class StepWatch:
    """Compares calls of before_step with optimizer steps, as phases are counted in calls, and with the length
    of the schedule. stepped: an attached optimizer has, since the last call. silent: about the schedule's
    end. Raises ValueError for steps_per_epoch that are no whole number of 1 or more."""

    def __init__(self, schedule: PhaseSchedule, steps_per_epoch: Any) -> None:
        self.steps_per_epoch = _whole(steps_per_epoch)
        self._schedule = schedule
        self._reached = 0
        self.attach(1)

    def attach(self, num_optimizers: int) -> None:
        """Count anew."""
        self.stepped = self.silent = False
        self._calls = self._idle = self._uncalled = 0
        self._allowed = UNCALLED_STEPS * num_optimizers

    def begin(self, step: int) -> bool:
        """A call of before_step, which begins `step`, from 1. Returns whether a step came since the call
        before; warns once where steps are missing again and again."""
        stepped, self.stepped = self.stepped, False
        self._idle += self._calls > 0 and not stepped
        self._calls += 1
        self._uncalled, self._reached = 0, step
        if self._idle == IDLE_CALLS and self._calls <= 4 * IDLE_CALLS and not stepped:
            log.warning(
                "%d of the first %d calls of before_step() came without a step of the attached optimizer "
                "since the call before: call it once per optimizer step, not per micro-batch, and attach() "
                "an optimizer that replaces another",
                self._idle,
                self._calls,
            )
        return stepped

    def saw_step(self) -> None:
        """Of an attached optimizer. Warns where before_step is forgotten."""
        self.stepped = True
        self._uncalled += 1
        if self._uncalled == self._allowed and self._calls <= 1:
            log.warning(
                "the attached optimizer has taken %d steps %s: phases are counted in its calls, so call "
                "acdc.before_step() once before every optimizer step",
                self._uncalled,
                "since the only call of before_step()" if self._calls else "and before_step() was not called",
            )

    def end(self) -> None:
        """The schedule's owner is gone. Warns where the loop was over first, but for one that ended within
        its first epoch: a trial."""
        steps = self._schedule.num_epochs * self.steps_per_epoch
        if self.steps_per_epoch < self._reached < steps and not self.silent:
            end_log.warning(
                "the loop ended with call %d of before_step(), the schedule with call %d (%d epochs of %d "
                'steps): "%s" has stopped in %s. steps_per_epoch counts optimizer steps, not micro-batches; '
                "to go on later, keep acdc.state_dict(); to end here, call acdc.detach()",
                self._reached,
                steps,
                self._schedule.num_epochs,
                self.steps_per_epoch,
                self._schedule,
                self._schedule.phase_at((self._reached - 1) // self.steps_per_epoch),
            )


def _whole(steps_per_epoch: Any) -> int:
    """Of an epoch, as an int. Raises ValueError for what is no whole number of 1 or more."""
    try:
        steps = operator.index(steps_per_epoch)
    except TypeError:
        steps = 0
    if isinstance(steps_per_epoch, bool) or steps < 1:
        raise ValueError(
            f"steps_per_epoch {steps_per_epoch!r}: a whole number of optimizer steps in an epoch, 1 or more; "
            "mostly len(loader) // accumulation_steps"
        )
    return steps


def check_equal_on_all_ranks(masks: Mapping[str, Tensor]) -> None:
    """Raise MaskError naming the layers whose masks differ between ranks: their weights have diverged."""
    distributed = torch.distributed
    if (
        not distributed.is_available()
        or not distributed.is_initialized()
        or distributed.get_world_size() == 1
    ):
        return
    digests = torch.stack([_digest(mask) for mask in masks.values()])
    low, high = digests.clone(), digests.clone()
    torch.distributed.all_reduce(low, torch.distributed.ReduceOp.MIN)
    torch.distributed.all_reduce(high, torch.distributed.ReduceOp.MAX)
    differ = [name for name, bad in zip(masks, (low != high).any(dim=1).tolist(), strict=True) if bad]
    if differ:
        message = f"ranks chose different masks for {', '.join(differ)}: their weights have diverged"
        raise MaskError(message, differ)


def _digest(mask: Tensor) -> Tensor:
    """Three int64 that tell masks apart: number kept, sum of the positions, a hash of these."""
    kept = mask.flatten() * torch.arange(mask.numel(), device=mask.device)  # without waiting for the device
    return torch.stack([mask.sum(), kept.sum(), (kept * kept * 0x9E3779B1).sum()])


def _few(layers: Mapping[str, int], most: int = 5) -> str:
    shown = ", ".join(f"{name} ({count:,})" for name, count in list(layers.items())[:most])
    return shown + (f" and {len(layers) - most} further layers" if len(layers) > most else "")
