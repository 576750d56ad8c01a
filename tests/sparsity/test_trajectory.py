"""Our masks, switches and momentum reset against the paper's implementation, step by step in float64."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from sparsity import ACDC, NM, GlobalMagnitude, PhaseSchedule, UniformMagnitude, num_leaked
from tests.slow import slow
from trainer.models import get_model

COMPRESS_AT = (3, 9)
CASES = {
    "global90": (GlobalMagnitude(0.9, rule="original"), False),
    "global90_nesterov": (GlobalMagnitude(0.9, rule="original"), True),
    "uniform90": (UniformMagnitude(0.9, rule="original"), False),
    "nm24": (NM(2, 4, rule="original"), False),
}


def recorded_model(inputs):
    """ResNet20 as it was before the first step."""
    model = get_model("resnet20", num_classes=10)
    names = [key.removeprefix("init/") for key in inputs if key.startswith("init/")]
    model.load_state_dict({name: torch.from_numpy(inputs[f"init/{name}"]) for name in names}, strict=False)
    return model


def recorded_masks(reference, step, acdc):
    for name, mask in acdc.masks().items():
        bits = np.unpackbits(reference[f"mask/step{step}/{name}"])[: mask.numel()]
        yield name, torch.from_numpy(bits.astype(bool)).view(mask.shape)


@pytest.mark.parametrize("case", ["global90", *slow(*(case for case in CASES if case != "global90"))])
def test_recorded_trajectory(case, golden):
    pattern, nesterov = CASES[case]
    inputs, reference = np.load(golden / "trajectory_inputs.npz"), np.load(golden / f"trajectory_{case}.npz")
    model = recorded_model(inputs).double()
    schedule = PhaseSchedule.parse("(dense 3, sparse 3) x2")
    acdc = ACDC(model, pattern, schedule, steps_per_epoch=1, include=list(map(str, reference["layers"])))
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=nesterov
    )
    acdc.attach(optimizer)
    x, y = torch.from_numpy(inputs["x"]).double(), torch.from_numpy(inputs["y"])

    for step in range(12):
        acdc.before_step()
        if step in COMPRESS_AT:
            for name, mask in recorded_masks(reference, step, acdc):
                assert torch.equal(acdc.masks()[name], mask), (step, name)
            recorded = reference["relative_mask_difference_percent"][COMPRESS_AT.index(step)]
            assert 100 * (acdc.mask_difference or 0.0) == pytest.approx(recorded, abs=1e-9)
        loss = functional.cross_entropy(model(x[step]), y[step])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert loss.item() == pytest.approx(reference["loss"][step], rel=1e-12), step
    assert num_leaked(acdc.weights(), acdc.masks()) == 0
    for name, parameter in model.named_parameters():
        final = torch.from_numpy(reference[f"final/{name}"])
        assert (parameter.detach() - final).norm() <= 1e-12 * final.norm(), name
