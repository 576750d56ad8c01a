"""Where master weights and optimizer state live, so that masks reach them.

    plain torch optimizer, DeepSpeed ZeRO stage 0    the parameter is the master; optimizer.state[parameter]
    DeepSpeed ZeRO stages 1 and 2                    a flat fp32 master, cut into one fragment a rank

A mask that reached only the parameter under ZeRO-1/2 would be undone by the next step, which copies the
master back. DeepSpeed is reached through what it hangs on each parameter (its `_hp_mapping`); nothing here
imports it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

# First moments: what "momentum" means in torch's SGD and Adam family.
MOMENTUM_KEYS = ("momentum_buffer", "exp_avg")


class Masters(Protocol):
    """Master weights and per-weight optimizer state of the parameters of one optimizer."""

    def weight(self, parameter: Parameter) -> Tensor:
        """The whole master weight, of the parameter's shape. Under ZeRO-1/2 a collective: call it on every
        rank."""

    def mask_(self, keep: Mapping[Parameter, Tensor]) -> None:
        """Zero the dropped weights of masters and parameters, and their optimizer state (momentum), by
        keep-masks."""

    def reset_momentum_(self) -> None:
        """Zero the momentum of every parameter, masked or not."""

    def state(self, parameter: Parameter) -> dict[str, Tensor]:
        """Whole per-weight optimizer state by key, of the parameter's shape. Collective like `weight`."""

    def load_(self, parameter: Parameter, weight: Tensor, state: Mapping[str, Tensor]) -> None:
        """Put a whole master weight and per-weight optimizer state in their places."""


def masters_of(optimizer: Any) -> Masters:
    """The masters behind a torch optimizer or a DeepSpeed engine.

    Raises TypeError for anything else and ValueError for an engine whose masters are not reached: ZeRO stage
    3 (not proven yet) and the fp16/bf16 modes of stage 0 (use torch_autocast, which keeps fp32 weights).
    """
    if isinstance(optimizer, torch.optim.Optimizer):
        return TorchMasters(optimizer)
    if hasattr(optimizer, "zero_optimization_stage") and hasattr(optimizer, "module"):
        return _engine_masters(optimizer)
    raise TypeError(
        f"attach() takes a torch optimizer or a DeepSpeed engine, not a {type(optimizer).__name__}"
    )


def _engine_masters(engine: Any) -> Masters:
    stage = int(engine.zero_optimization_stage())
    if stage == 0:
        if isinstance(engine.optimizer, torch.optim.Optimizer):
            return TorchMasters(engine.optimizer)
        raise ValueError(
            f"DeepSpeed at ZeRO stage 0 with {type(engine.optimizer).__name__}: masters are hidden in it; "
            'use "torch_autocast" in place of "fp16" or "bf16"'
        )
    if stage in (1, 2):
        return ZeroMasters(engine)
    raise ValueError(f"ZeRO stage {stage} is not supported with masks; use stage 0, 1 or 2")


class TorchMasters:
    """The parameters themselves are the masters."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def weight(self, parameter: Parameter) -> Tensor:
        return parameter.detach()

    def mask_(self, keep: Mapping[Parameter, Tensor]) -> None:
        values, masks = [], []
        for parameter, mask in keep.items():
            for value in (parameter.detach(), *self.state(parameter).values()):
                values.append(value)
                masks.append(mask)
        torch._foreach_mul_(values, masks)

    def reset_momentum_(self) -> None:
        momenta = [
            value
            for group in self.optimizer.param_groups
            for parameter in group["params"]
            for key, value in self.state(parameter).items()
            if key in MOMENTUM_KEYS
        ]
        if momenta:
            torch._foreach_zero_(momenta)

    def state(self, parameter: Parameter) -> dict[str, Tensor]:
        state = self.optimizer.state.get(parameter, {})
        return {key: v for key, v in state.items() if torch.is_tensor(v) and v.shape == parameter.shape}

    def load_(self, parameter: Parameter, weight: Tensor, state: Mapping[str, Tensor]) -> None:
        parameter.detach().copy_(weight)
        own = self.optimizer.state[parameter]
        for key in [key for key in self.state(parameter) if key not in state]:
            del own[key]
        for key, value in state.items():
            # zeros_like keeps the parameter's memory format, as the optimizer's own first step does
            own[key] = torch.zeros_like(parameter, dtype=value.dtype).copy_(value)


class ZeroMasters:
    """ZeRO-1/2: each rank holds, for some parameters, a fragment of the flat fp32 master and of its state.

    The state exists from the first optimizer step on; DeepSpeed hangs its fragments on parameters only then.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def weight(self, parameter: Parameter) -> Tensor:
        # The compute weight is the gathered master unless it is of lower precision.
        return parameter.detach() if parameter.dtype == torch.float32 else self._gather(parameter, None)

    def mask_(self, keep: Mapping[Parameter, Tensor]) -> None:
        values, masks = [], []
        for parameter, mask in keep.items():
            values.append(parameter.detach())
            masks.append(mask)
            for _, fragment, flat in self.fragments(parameter, mask):
                values.append(fragment)
                masks.append(flat)
        torch._foreach_mul_(values, masks)

    def reset_momentum_(self) -> None:
        momenta = [
            fragment
            for parameter in self.engine.module.parameters()
            for key, fragment, _ in self.fragments(parameter, parameter.detach())
            if key in MOMENTUM_KEYS
        ]
        if momenta:
            torch._foreach_zero_(momenta)

    def state(self, parameter: Parameter) -> dict[str, Tensor]:
        # Keys of the flat partitions, which every rank has: one without a fragment takes part in the gathers.
        keys = {key for flat in self._partitions() for key in self._flat_state(flat)}
        return {key: self._gather(parameter, key) for key in sorted(keys)}

    def load_(self, parameter: Parameter, weight: Tensor, state: Mapping[str, Tensor]) -> None:
        parameter.detach().copy_(weight)
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is None:
            return
        flat = self._partitions()[mapping.param_group_index]
        own = self.engine.optimizer.optimizer.state[flat]
        for name in state:
            own.setdefault(name, torch.zeros_like(flat))  # before the first step
        mapping.set_optim_state_fragment(flat, own)
        sources: list[tuple[str | None, Tensor]] = [(None, weight), *state.items()]
        for source, whole in sources:
            for key, fragment, stretch in self.fragments(parameter, whole):
                if key == source:
                    fragment.copy_(stretch)

    @staticmethod
    def fragments(parameter: Any, whole: Tensor) -> Iterator[tuple[str | None, Tensor, Tensor]]:
        """(state key or None for the master, this rank's fragment, the same stretch of `whole`)."""
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is None:
            return
        address = mapping.lp_fragment_address
        stretch = whole.reshape(-1).narrow(0, address.start, address.numel)
        for key, fragment in [(None, mapping.hp_fragment), *(mapping.optim_fragment or {}).items()]:
            yield key, fragment.detach(), stretch.to(fragment.device)

    def _partitions(self) -> list[Tensor]:
        """This rank's flat fp32 master of each parameter group."""
        return self.engine.optimizer.single_partition_of_fp32_groups

    def _flat_state(self, flat: Tensor) -> dict[str, Tensor]:
        state = self.engine.optimizer.optimizer.state.get(flat, {})
        return {key: v for key, v in state.items() if torch.is_tensor(v) and v.shape == flat.shape}

    @staticmethod
    def _gather(parameter: Any, key: str | None) -> Tensor:
        return parameter.get_full_hp_param(optim_state_key=key)
