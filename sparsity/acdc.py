"""AC/DC: Alternating Compressed/DeCompressed training (Peste, Iofinova, Vladu, Alistarh, NeurIPS 2021).

The algorithm, in the words that the code uses:

    for each optimizer step:
        before_step:
            at the first step of a sparse phase, and within it where masks change (gradual), compress:
                second moments of dropped weights: as below, for those that grow
                masks    = pattern(master weights)
                weights  = weights * masks         (masters and compute weights)
                momentum = momentum * masks
            at the first step of a dense phase but the very first, decompress:
                second moments of dropped weights = the mean of their layer's kept ones     (Adam, RMSprop)
                masks    = all ones                dropped weights restart from 0
                momentum = 0                       of every parameter
        the user's own forward, backward and optimizer step; the layers compute with weight * mask, so a
        dropped weight has gradient 0, momentum 0 and value 0, and stays exactly 0
        optimizers that would move it all the same (Muon, LBFGS): weights = weights * masks after their step
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparsity.execution import Execution, Wish, check_kernels, kernel_names
from sparsity.gradual import CubicSparsity, Regrowth, actions_of, settled
from sparsity.guard import StepWatch, check_equal_on_all_ranks, check_owners, check_zeros, warn_of_empty
from sparsity.kernels.interface import Kernel
from sparsity.layers import mask_layers, to_plain
from sparsity.masters import Masters, masters_of
from sparsity.modules.layers import MaskedLayer, UnmaskedConv2d
from sparsity.patterns import Pattern
from sparsity.schedule import Phase, PhaseSchedule
from sparsity.stats import MaskChange

LOOKS = 4  # whether masks hold, at the most in a phase: one after a step that is seen is enough

log = logging.getLogger(__name__)


class ACDC:
    """Masks the chosen layers of `model` in place and acts at the phase switches of `schedule`.

        acdc = ACDC(model, GlobalMagnitude(0.9), schedule, steps_per_epoch=len(loader), exclude=["fc"])
        acdc.attach(optimizer)
        ... acdc.before_step() before each optimizer step

    steps_per_epoch: optimizer steps (not micro-batches) in an epoch of the schedule. include, exclude: name
    patterns, see sparsity.layers.mask_layers, whose ValueErrors this raises. A schedule without sparse phases
    masks no layer: dense training by the same loop. gradual: compress again and again within the one sparse
    phase, with growing sparsity (GMP) or by random regrowth (SET). reset_momentum: zero all momentum at a
    decompression, as the paper does; else kept weights go on with theirs.
    """

    def __init__(
        self,
        model: nn.Module,
        pattern: Pattern,
        schedule: PhaseSchedule,
        steps_per_epoch: int,
        *,
        include: Iterable[str] = ("*",),
        exclude: Iterable[str] = (),
        gradual: CubicSparsity | Regrowth | None = None,
        reset_momentum: bool = True,
    ) -> None:
        self._steps = StepWatch(schedule, steps_per_epoch)
        self.model = model
        self.pattern = pattern
        self.schedule = schedule
        self.steps_per_epoch = self._steps.steps_per_epoch
        self.actions = actions_of(pattern, schedule, gradual)
        self.layers = mask_layers(model, include, exclude) if schedule.compressions else {}
        self.step = 0  # optimizer steps begun
        self.mask_change: MaskChange | None = None  # from the last compression but one to the last
        self.mask_difference: float | None = None  # as a share; older states have nothing else
        self._execution = Execution(model, self.layers)
        self._settled = settled(self.actions)  # epoch, see masks_settled
        self._reset_momentum = reset_momentum
        self._previous: dict[str, Tensor] = {}  # masks of the last compression, while its phase is over
        self._masters: Masters | None = None
        self._detach: Callable[[], None] | None = None
        self._hold = False  # mask after every step, because the optimizer moves dropped weights
        self._looks = 0  # still to be taken in this phase, whether masks hold
        weakref.finalize(self, self._steps.end)

    def attach(self, *optimizers: Any) -> None:
        """Say whose masters and momentum to act on: torch optimizers, or one DeepSpeed engine, over this
        model. Attach again when one is replaced.

        Raises TypeError or ValueError for what is not supported, see sparsity.masters.masters_of, and
        ValueError for a masked weight that belongs to none of the optimizers, to two, or that is frozen. With
        a DeepSpeed engine of several ranks, call it on every rank.
        """
        masters = masters_of(*optimizers)
        check_owners(self.model, self.layers, masters.parameters())
        before, self._detach = self._detach, masters.after_step(self._after_step)
        if before is not None:
            before()
        self._masters, self._hold = masters, not masters.keep_zeros
        self._steps.attach(len(masters.optimizers))
        if self.kernels and self.step > 0 and self.phase.kind == "sparse":
            self._use_kernels(True)  # those of an unpickled copy have no plans

    def detach(self) -> None:
        """Let go of the optimizers: their steps are theirs alone, and a schedule that is not over is fine."""
        if self._detach is not None:
            self._detach()
        self._masters = self._detach = None
        self._steps.silent = True

    def __repr__(self) -> str:
        """Reads the device."""
        sparsity = self._num_dropped() / max(1, sum(map(Tensor.numel, self.masks().values())))
        steps = f"step {self.step:,} of {self.schedule.num_epochs * self.steps_per_epoch:,}"
        return f"ACDC({self.phase}, {steps}, sparsity {sparsity:.2%} in {len(self.layers)} layers)"

    def __getstate__(self) -> dict[str, Any]:
        """For copies, which have no optimizer attached: optimizers do not copy the hooks in them."""
        return {**vars(self), "_masters": None, "_detach": None}

    def _after_step(self) -> None:
        self._steps.saw_step()
        if self._hold and self.layers and self.phase.kind == "sparse":
            with torch.no_grad():
                self._attached().mask_(self._keep())

    def _keep(self) -> dict[nn.Parameter, Tensor]:
        return {layer.weight: layer.mask for layer in self.layers.values()}

    @property
    def phase(self) -> Phase:
        """The phase of the optimizer step begun last; before the first step, the first phase."""
        return self._phase_after(self.step)

    def _phase_after(self, steps: int) -> Phase:
        epoch = max(steps - 1, 0) // self.steps_per_epoch
        return self.schedule.phase_at(min(epoch, self.schedule.num_epochs - 1))

    def before_step(self) -> None:
        """Call once per optimizer step, before its first forward pass: acts at phase switches, else returns
        at once. Raises sparsity.guard.MaskError where a phase's first step has shown that masks leak."""
        if self._masters is None:
            raise RuntimeError("call acdc.attach(optimizer) before the first before_step()")
        stepped = self._steps.begin(self.step + 1)
        if self._looks:
            self.check_masks()
            self._looks = 0 if stepped else self._looks - 1
        epoch, within = divmod(self.step, self.steps_per_epoch)
        self.step += 1
        if within == 0 and epoch in self.actions:
            pattern = self.actions[epoch]
            if pattern is None:
                self.decompress()
            else:
                self.compress(pattern)

    def check_masks(self) -> None:
        """Raise sparsity.guard.MaskError, naming the layers, where a dropped weight is not exactly 0: it is
        used or written to past the mask. Reads the device."""
        if self.layers:
            check_zeros(self.weights(), self.masks())

    @torch.no_grad()
    def compress(self, pattern: Pattern) -> None:
        """Choose the masks from the master weights; zero the dropped weights and their momentum."""
        masters = self._attached()
        chosen = pattern({name: masters.weight(layer.weight) for name, layer in self.layers.items()})
        check_equal_on_all_ranks(chosen)
        before = self._previous or self.masks()
        first = not self._previous and bool(torch.stack([mask.all() for mask in before.values()]).all())
        change = self.mask_change = None if first else MaskChange.between(before, chosen)
        self.mask_difference = change.relative if change else None
        masters.refill_(self._keep())  # for weights that grow
        layers = self.layers.values()
        torch._foreach_copy_([layer.mask for layer in layers], [chosen[name] for name in self.layers])
        masters.mask_(self._keep())
        self._previous = {}
        self._looks = LOOKS
        warn_of_empty(self.masks())
        self._use_kernels(True)

    @torch.no_grad()
    def decompress(self) -> None:
        """Let every weight train again, dropped ones from 0, and zero all momentum (paper, section 3)."""
        self.check_masks()
        masters = self._attached()
        if self.layers:
            masters.refill_(self._keep())
        self._previous = {name: mask.clone() for name, mask in self.masks().items()}
        self._use_kernels(False)
        for layer in self.layers.values():
            layer.mask.fill_(True)
        if self._reset_momentum:
            masters.reset_momentum_()
        self._looks = 0

    def accelerate(
        self,
        kernels: Mapping[str, Kernel | None] | Literal["auto", "off", "require"],
        example: Tensor | None = None,
    ) -> None:
        """Say how layers compute in compressed phases, from now on: "auto", by what is measured to be fastest
        at the next compression, or now in a compressed phase; "require", by kernels wherever they are right;
        "off", dense; or layer by layer, those not named, or with None, dense. In dense phases all do. In
        gradual pruning measuring waits for a density near the last one: the choice is made once.

        example: images as a step on this device gets them; call within autocast if steps run in it. Every
        switch between the two costs one graph of a compiled model the first time, and none later. Raises
        KeyError for a layer that is not one of kernel_layers, ValueError for another word, and, at a
        compression, sparsity.kernels.choose.NoKernelError where kernels are required and there are none."""
        if isinstance(kernels, str):
            self._execution.set({})
            self._execution.wish = Wish.of(kernels, example)
        else:
            self._execution.set(kernels)
        self._use_kernels(self.step > 0 and self.phase.kind == "sparse")

    @property
    def kernel_layers(self) -> dict[str, MaskedLayer | UnmaskedConv2d]:
        """Layers that may run kernels: the masked ones and plain convolutions between them."""
        return self._execution.layers

    @property
    def kernels(self) -> dict[str, Kernel]:
        """Of the layers that run one in compressed phases."""
        return self._execution.kernels

    @property
    def masks_settled(self) -> bool:
        """Whether masks tell which kernels pay: not those of early compressions in gradual pruning."""
        return max(self.step - 1, 0) // self.steps_per_epoch >= self._settled

    def _use_kernels(self, compressed: bool) -> None:
        if compressed and self.masks_settled:
            self._execution.fulfil(self.model, self.pattern)
        self._execution.use(compressed)

    def masks(self) -> dict[str, Tensor]:
        """Layer name -> boolean keep-mask, of the weight's shape. The live buffers: clone to keep."""
        return {name: layer.mask for name, layer in self.layers.items()}

    def weights(self) -> dict[str, Tensor]:
        """Layer name -> its weight, detached, live."""
        return {name: layer.weight.detach() for name, layer in self.layers.items()}

    def export(self) -> nn.Module:
        """A copy of the model with neither masks nor wrappers: plain layers, dropped weights 0. Raises what
        check_masks raises: the copy would be another model than the one that was trained."""
        self.check_masks()
        return to_plain(self.model)

    def state_dict(self) -> dict[str, Any]:
        """Counters and the last compression's masks. Masks in force are in the model's own state_dict."""
        return {
            "step": self.step,
            "steps_per_epoch": self.steps_per_epoch,
            "phase": self.phase.kind,
            "num_dropped": self._num_dropped(),
            "mask_difference": self.mask_difference,
            "mask_change": vars(self.mask_change) if self.mask_change else None,
            "previous_masks": self._previous,
            "kernels": {name: kernel.name for name, kernel in self.kernels.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where state_dict() was taken, once the model's own state_dict, with the masks, is loaded.

        Raises what check_state raises, and ValueError where the model's masks are not those that belong to
        the state; nothing is changed then.
        """
        self.check_state(state)
        dropped, saved = self._num_dropped(), state.get("num_dropped")
        if saved is not None and dropped != saved:
            raise ValueError(
                f"the model's masks drop {dropped:,} weights, those of the saved run {saved:,}: load the "
                "model's own state_dict first, which holds the masks"
            )
        self.step = int(state["step"])
        self._looks = LOOKS if self.phase.kind == "sparse" else 0
        self.mask_difference = state["mask_difference"]
        self.mask_change = MaskChange(**change) if (change := state.get("mask_change")) else None
        previous = state["previous_masks"].items()
        self._previous = {name: mask.to(self.layers[name].mask.device) for name, mask in previous}
        if names := kernel_names(state):
            self._execution.set_named(names)
        self._use_kernels(self.phase.kind == "sparse" and self.step > 0)

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Whether load_state_dict can take the state. Raises ValueError when this schedule has another phase
        at that step than the one the masks belong to, other steps per epoch, or kernels unknown here. A
        schedule that differs only later is fine."""
        if state["steps_per_epoch"] != self.steps_per_epoch:
            raise ValueError(
                f"the saved run had {state['steps_per_epoch']} steps per epoch, this one has "
                f"{self.steps_per_epoch}: its phases would shift; use the same data and batch size"
            )
        check_kernels(state)
        now = self._phase_after(int(state["step"]))
        if now.kind != state["phase"]:
            raise ValueError(
                f"the run was saved in a {state['phase']} phase at step {state['step']}, where the schedule "
                f"{str(self.schedule)!r} has {now}; use the schedule it was started with"
            )

    def start_at(self, epoch: int, masks: Mapping[str, Tensor]) -> None:
        """Stand at the beginning of `epoch` of this schedule, with weights that another run trained.

        masks: that run's keep-masks by layer name, used where `epoch` lies within a sparse phase of this
        schedule, without a compression of its own; elsewhere they are chosen anew, or all ones. Raises what
        check_start raises, before anything is changed.
        """
        self.check_start(epoch, masks)
        self.step = epoch * self.steps_per_epoch
        if self._needs_masks(epoch):
            for name, layer in self.layers.items():
                layer.mask.copy_(masks[name])
            self._looks = LOOKS
            self._use_kernels(True)

    def check_start(self, epoch: int, masks: Mapping[str, Tensor]) -> None:
        """Whether start_at can do that. Raises ValueError where a mask that it needs is missing or has
        another shape, or where the schedule ends before."""
        num_epochs = self.schedule.num_epochs
        if not 0 <= epoch < num_epochs:
            raise ValueError(f"it has {epoch} epochs behind it, and the schedule has {num_epochs}")
        for name, layer in self.layers.items() if self._needs_masks(epoch) else ():
            if name not in masks or masks[name].shape != layer.mask.shape:
                raise ValueError(
                    f"epoch {epoch} lies within a sparse phase, and there is no mask for layer {name!r}: "
                    "begin at a phase switch, or prune the same layers"
                )

    def _needs_masks(self, epoch: int) -> bool:
        return self.schedule.phase_at(epoch).kind == "sparse" and epoch not in self.actions

    def _num_dropped(self) -> int:
        dropped = [(~mask).sum() for mask in self.masks().values()]
        return sum(torch.stack(dropped).tolist()) if dropped else 0

    def _attached(self) -> Masters:
        if self._masters is None:
            raise RuntimeError("call acdc.attach(optimizer) first")
        return self._masters
