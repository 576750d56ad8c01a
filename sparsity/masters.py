"""Where master weights and optimizer state live, so that masks reach them.

    plain torch optimizer, DeepSpeed ZeRO stage 0    the parameter is the master; optimizer.state[parameter]
    DeepSpeed ZeRO stages 1 and 2                    a flat fp32 master, cut into one fragment a rank

A mask that reached only the parameter under ZeRO-1/2 would be undone by the next step, which copies the
master back. DeepSpeed is reached through what it hangs on each parameter (its `_hp_mapping`); nothing here
imports it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import ASGD, SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, RAdam, RMSprop, Rprop

# Per-weight state by its key, as torch's optimizers name it, and what a phase switch does to it:
FIRST_MOMENTS = ("momentum_buffer", "exp_avg", "grad_avg", "prev")  # masked; all zeroed at decompression
SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "acc_delta")  # refilled there
ACCUMULATED = ("sum", "step_size")  # of Adagrad and Rprop: no gradient, no change; left alone
# Any other state is masked at compression: it may be a momentum under a name of its own.

# Optimizers that leave a weight at 0 whose gradient and first moment are 0. A subclass may do otherwise.
_KEEP_ZEROS = (SGD, Adam, AdamW, Adamax, NAdam, RAdam, RMSprop, Rprop, Adagrad, Adadelta, ASGD)


class Masters(ABC):
    """Master weights and per-weight optimizer state, of one DeepSpeed engine or of torch optimizers.

    optimizers: those that step the masters."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers

    @property
    def keep_zeros(self) -> bool:
        """Whether a step leaves dropped weights at 0 by itself; else they have to be masked after each."""
        return all(type(optimizer) in _KEEP_ZEROS for optimizer in self.optimizers)

    def after_step(self, call: Callable[[], None]) -> Callable[[], None]:
        """Call back after every optimizer step, when masters are new; returns what ends that."""
        hooks = [each.register_step_post_hook(lambda *_: call()) for each in self.optimizers]

        def end() -> None:
            for hook in hooks:
                hook.remove()

        return end

    def mask_(self, keep: Mapping[Parameter, Tensor]) -> None:
        """Zero the dropped weights of masters and parameters, and their momentum, by keep-masks."""
        values, masks = [], []
        for parameter, mask in keep.items():
            for key, value, stretch in [(None, parameter.detach(), mask), *self.fragments(parameter, mask)]:
                if key not in SECOND_MOMENTS and key not in ACCUMULATED:
                    values.append(value)
                    masks.append(stretch)
        torch._foreach_mul_(values, masks)

    def reset_momentum_(self) -> None:
        """Zero the momentum of every parameter, masked or not."""
        momenta = [
            fragment
            for parameter in self.parameters()
            for key, fragment, _ in self.fragments(parameter, parameter.detach())
            if key in FIRST_MOMENTS
        ]
        if momenta:
            torch._foreach_zero_(momenta)

    def refill_(self, keep: Mapping[Parameter, Tensor]) -> None:
        """Give dropped weights the mean second moment of their layer's kept weights: without gradients theirs
        has decayed, and the first step after decompression would be many times the others'. Collective like
        `weight`. A layer that keeps no weight stays as it is."""
        found = {
            (row, SECOND_MOMENTS.index(key)): (fragment, stretch)
            for row, (parameter, mask) in enumerate(keep.items())
            for key, fragment, stretch in self.fragments(parameter, mask)
            if key in SECOND_MOMENTS
        }
        masks = list(keep.values())
        # float64: over fragments the sum must not depend on how many there are
        sums = torch.zeros(len(masks), len(SECOND_MOMENTS), dtype=torch.float64, device=masks[0].device)
        for place, (fragment, stretch) in found.items():
            sums[place] = (fragment * stretch).sum(dtype=torch.float64)
        self.sum_over_ranks_(sums)
        for (row, column), (fragment, stretch) in found.items():
            num_kept = masks[row].sum()
            mean = (sums[row, column].to(num_kept.device) / num_kept).to(fragment.dtype)
            fragment.copy_(torch.where(stretch | (num_kept == 0), fragment, mean))

    def num_steps(self) -> float | None:
        """Steps that the optimizers have counted, as Adam does for its bias correction; None where none does.
        Reads the device."""
        states = [state for optimizer in self.optimizers for state in optimizer.state.values()]
        counts = [torch.as_tensor(state["step"]) for state in states if "step" in state]
        return float(torch.stack(counts).max()) if counts else None

    def load_num_steps_(self, count: float) -> None:
        """Put the count back, once load_ has put back what else there is for each parameter."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                on_device = bool(group.get("fused") or group.get("capturable"))
                for parameter in group["params"]:
                    if state := optimizer.state.get(parameter):
                        where = parameter.device if on_device else None
                        state["step"] = torch.tensor(count, dtype=torch.float32, device=where)

    def sum_over_ranks_(self, sums: Tensor) -> None:  # noqa: B027
        """Where ranks have fragments of their own: over all of them."""

    @abstractmethod
    def parameters(self) -> list[Parameter]:
        """All that are optimized; one that two optimizers have comes twice."""

    @abstractmethod
    def weight(self, parameter: Parameter) -> Tensor:
        """The whole master weight, of the parameter's shape. Collective under ZeRO-1/2: for all ranks."""

    @abstractmethod
    def fragments(self, parameter: Any, whole: Tensor) -> Iterator[tuple[str | None, Tensor, Tensor]]:
        """(state key, or None for a master beside the parameter; what this rank has of it; the same stretch
        of `whole`)."""

    @abstractmethod
    def state(self, parameter: Parameter) -> dict[str, Tensor]:
        """Whole per-weight optimizer state by key, of the parameter's shape. Collective like `weight`."""

    @abstractmethod
    def load_(self, parameter: Parameter, weight: Tensor, state: Mapping[str, Tensor]) -> None:
        """Put a whole master weight and per-weight optimizer state in their places."""


def masters_of(*optimizers: Any) -> Masters:
    """The masters behind torch optimizers or one DeepSpeed engine.

    Raises TypeError for anything else and ValueError for an engine whose masters are not reached: ZeRO stage
    3 (not proven yet) and the fp16/bf16 modes of stage 0 (use torch_autocast, which keeps fp32 weights).
    """
    if len(optimizers) == 1 and hasattr(optimizers[0], "zero_optimization_stage"):
        return _engine_masters(optimizers[0])
    if not optimizers or not all(isinstance(given, torch.optim.Optimizer) for given in optimizers):
        given = ", ".join(type(optimizer).__name__ for optimizer in optimizers) or "nothing"
        raise TypeError(f"attach() takes torch optimizers, or one DeepSpeed engine alone, not {given}")
    for optimizer in optimizers:
        if not hasattr(optimizer, "_optimizer_step_post_hooks"):
            raise TypeError(f"{type(optimizer).__name__} does not call torch.optim.Optimizer.__init__()")
        for name, inner in vars(optimizer).items():
            if isinstance(inner, torch.optim.Optimizer):  # has the state, and steps past the outer's hooks
                raise TypeError(f"{type(optimizer).__name__} wraps an optimizer: attach its .{name}")
    return TorchMasters(*optimizers)


def _engine_masters(engine: Any) -> Masters:
    stage = int(engine.zero_optimization_stage())
    if stage == 0:
        if isinstance(engine.optimizer, torch.optim.Optimizer):
            return TorchMasters(engine.optimizer)
        raise ValueError(
            f"DeepSpeed at ZeRO stage 0 with {type(engine.optimizer).__name__}: masters are hidden in it; "
            'use "torch_autocast" in place of "fp16" or "bf16"'
        )
    if stage in (1, 2) and hasattr(engine.optimizer, "bit16_groups"):
        return ZeroMasters(engine)
    if stage in (1, 2):
        raise ValueError(
            f"DeepSpeed at ZeRO stage {stage} with {type(engine.optimizer).__name__}: its masters are not "
            'reached; use "torch_autocast" in place of "bf16"'
        )
    raise ValueError(f"ZeRO stage {stage} is not supported with masks; use stage 0, 1 or 2")


class TorchMasters(Masters):
    """The parameters themselves are the masters."""

    def parameters(self) -> list[Parameter]:
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        return [parameter for group in groups for parameter in group["params"]]

    def weight(self, parameter: Parameter) -> Tensor:
        return parameter.detach()

    def fragments(self, parameter: Any, whole: Tensor) -> Iterator[tuple[str | None, Tensor, Tensor]]:
        return ((key, value, whole) for key, value in self.state(parameter).items())

    def state(self, parameter: Parameter) -> dict[str, Tensor]:
        for optimizer in self.optimizers:
            if (state := optimizer.state.get(parameter)) is not None:
                return {k: v for k, v in state.items() if torch.is_tensor(v) and v.shape == parameter.shape}
        return {}

    def load_(self, parameter: Parameter, weight: Tensor, state: Mapping[str, Tensor]) -> None:
        parameter.detach().copy_(weight)
        own = self._owner(parameter).state[parameter]
        for key in [key for key in self.state(parameter) if key not in state]:
            del own[key]
        for key, value in state.items():
            # zeros_like keeps the parameter's memory format, as the optimizer's own first step does
            own[key] = torch.zeros_like(parameter, dtype=value.dtype).copy_(value)

    def _owner(self, parameter: Parameter) -> torch.optim.Optimizer:
        for optimizer in self.optimizers[1:]:
            if any(parameter is own for group in optimizer.param_groups for own in group["params"]):
                return optimizer
        return self.optimizers[0]


class ZeroMasters(Masters):
    """ZeRO-1/2: each rank holds, for some parameters, a fragment of the flat fp32 master and of its state.

    The state exists from the first optimizer step on; DeepSpeed hangs its fragments on parameters only then.
    """

    def __init__(self, engine: Any) -> None:
        # the optimizer inside steps the masters; DeepSpeed copies them to the parameters afterwards
        super().__init__(engine.optimizer.optimizer)
        self.engine = engine

    def parameters(self) -> list[Parameter]:
        return [parameter for group in self.engine.optimizer.bit16_groups for parameter in group]

    def weight(self, parameter: Any) -> Tensor:
        # The compute weight is the gathered master unless it is of lower precision.
        return parameter.detach() if parameter.dtype == torch.float32 else parameter.get_full_hp_param()

    def sum_over_ranks_(self, sums: Tensor) -> None:
        torch.distributed.all_reduce(sums)

    def state(self, parameter: Any) -> dict[str, Tensor]:
        # Keys of the flat partitions, which every rank has: one without a fragment takes part in the gathers.
        states = [(flat, self.optimizers[0].state.get(flat, {})) for flat in self._partitions()]
        keys = {k for flat, s in states for k, v in s.items() if torch.is_tensor(v) and v.shape == flat.shape}
        self._link(parameter)
        return {key: parameter.get_full_hp_param(optim_state_key=key) for key in sorted(keys)}

    def load_(self, parameter: Parameter, weight: Tensor, state: Mapping[str, Tensor]) -> None:
        parameter.detach().copy_(weight)
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is None:
            return
        flat = self._partitions()[mapping.param_group_index]
        own = self.optimizers[0].state[flat]
        for name in state:
            own.setdefault(name, torch.zeros_like(flat))  # before the first step
        mapping.set_optim_state_fragment(flat, own)
        sources: list[tuple[str | None, Tensor]] = [(None, weight), *state.items()]
        for source, whole in sources:
            for key, fragment, stretch in self.fragments(parameter, whole):
                if key == source:
                    fragment.copy_(stretch)

    def fragments(self, parameter: Any, whole: Tensor) -> Iterator[tuple[str | None, Tensor, Tensor]]:
        self._link(parameter)
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is None:
            return
        address = mapping.lp_fragment_address
        stretch = whole.reshape(-1).narrow(0, address.start, address.numel)
        for key, fragment in [(None, mapping.hp_fragment), *(mapping.optim_fragment or {}).items()]:
            yield key, fragment.detach(), stretch.to(fragment.device)

    def _link(self, parameter: Any) -> None:
        """DeepSpeed hangs state on parameters once, after the first group's step: later groups lack it."""
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is not None and not mapping.optim_fragment:
            flat = self._partitions()[mapping.param_group_index]
            if state := self.optimizers[0].state.get(flat):
                mapping.set_optim_state_fragment(flat, state)

    def _partitions(self) -> list[Tensor]:
        """This rank's flat fp32 master of each parameter group."""
        return self.engine.optimizer.single_partition_of_fp32_groups
