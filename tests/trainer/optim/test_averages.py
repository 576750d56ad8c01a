"""Moving averages of weights: their law, their masks, and runs that keep them."""

import json

import pytest
import torch

from data.torchvision_import import import_torchvision
from sparsity import ACDC, GlobalMagnitude, PhaseSchedule
from tests.slow import slow
from tests.trainer.distributed.small_net import SmallNet, evaluated_by_hand, small
from tests.trainer.runs import assert_equal_states, build, final_state, fit_and_close, newest_run, records
from trainer.checkpoints.saved_model import load_model
from trainer.cli.main import main as acdc_command
from trainer.config.load import load_config
from trainer.errors import UserError
from trainer.optim.averages import Averages
from trainer.train import main

SCHEDULE = "(dense 1, sparse 1) x2"


def masked_net():
    torch.manual_seed(0)
    net = SmallNet(10, norm=True)
    acdc = ACDC(net, GlobalMagnitude(0.5), PhaseSchedule.parse(SCHEDULE), steps_per_epoch=3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    acdc.attach(optimizer)
    return net, acdc, optimizer


def one_step(net, optimizer):
    optimizer.zero_grad()
    net(torch.randn(8, 1, 8, 8)).square().mean().backward()
    optimizer.step()


def test_averages_are_timms_bit_for_bit():
    import_torchvision()
    pytest.importorskip("timm", reason="timm is not installed")
    from timm.utils import ModelEmaV3

    net, acdc, optimizer = masked_net()
    theirs, ours = ModelEmaV3(net, decay=0.9), Averages(acdc, 0.9)
    for _ in range(3):  # dense steps
        acdc.before_step()
        one_step(net, optimizer)
        theirs.update(net)
        ours.update()
    expected = theirs.module.state_dict()
    found = {**ours.weights(), **ours.statistics()}
    assert found.keys() == {name for name, value in expected.items() if value.is_floating_point()}
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name
        if name not in ("conv1.bias", "conv2.bias"):  # before BatchNorm they hardly move
            assert not torch.equal(value, net.state_dict()[name]), name


def test_averages_have_the_masks_of_the_model():
    net, acdc, optimizer = masked_net()
    averages = Averages(acdc, 0.9)
    for step in range(12):
        acdc.before_step()
        if step in (3, 9):
            averages.mask_()
        one_step(net, optimizer)
        averages.update()
        for name, mask in acdc.masks().items():
            average = averages.weights()[f"{name}.weight"]
            assert not average[~mask].any()
            assert average[mask].all()
    assert acdc.phase.kind == "sparse"


def test_in_place_of_the_model_and_back():
    net, acdc, optimizer = masked_net()
    averages = Averages(acdc, 0.9)
    acdc.before_step()
    one_step(net, optimizer)
    averages.update()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    mean = {name: value.clone() for name, value in averages.statistics().items()}
    with averages.in_place() as model:
        assert torch.equal(model.bn1.running_mean, mean["bn1.running_mean"])
        assert not torch.equal(model.conv1.weight, before["conv1.weight"])
        model.bn1.running_mean.add_(1)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(averages.statistics()["bn1.running_mean"], mean["bn1.running_mean"] + 1)


def options(data, root, *overrides):
    schedule = ["epochs=4", f"sparsity.schedule={SCHEDULE}", "ema.decay=0.8"]
    return small(data, root, "{norm: true}", *schedule, *overrides)


def run(data, root, *overrides, stop=None):
    trainer = build(options(data, root, *overrides))
    fit_and_close(trainer, stop)
    return trainer


@pytest.mark.usefixtures("small_net")
@pytest.mark.parametrize("stage", [0, 1, *slow(2)])
def test_a_run_resumes_its_averages_bit_for_bit(stage, tiny_data, tmp_path):
    stages = f"engine.zero_stage={stage}"
    run(tiny_data, tmp_path / "whole", stages)
    whole = final_state(newest_run(tmp_path / "whole"), 12)
    assert whole["averages"].keys() == whole["optimizer"].keys()
    for stop in (2, 7):
        root = tmp_path / f"at{stop}"
        run(tiny_data, root, stages, stop=stop)
        run(tiny_data, root, stages, "resume=auto")
        assert_equal_states(whole, final_state(newest_run(root), 12))


@pytest.mark.usefixtures("small_net")
def test_a_run_evaluates_keeps_and_shows_them(tiny_data, tmp_path, capsys):
    assert main(["quickstart", *options(tiny_data, tmp_path)]) == 0
    folder = newest_run(tmp_path)
    assert "sparse model, EMA" in capsys.readouterr().out
    result = json.loads((folder / "result.json").read_text())
    epochs = records(folder)
    state = final_state(folder, 12)
    for key, epoch in (("dense_twin", 2), ("sparse", 3)):
        expected = evaluated_by_hand(folder / "checkpoints" / f"{key}_ema", tiny_data)
        row = result[f"{key}_ema"]
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-5)
        for name in ("loss", "top1"):
            assert epochs[epoch][f"ema_{name}"] == pytest.approx(expected[name], rel=1e-5)
        assert row["loss"] != result[key]["loss"]
        assert {name: row[name] for name in ("epoch", "sparsity", "num_kept", "inference_flops")} == {
            name: result[key][name] for name in ("epoch", "sparsity", "num_kept", "inference_flops")
        }
    saved = load_model(folder / "checkpoints" / "sparse_ema")[0].state_dict()
    for name, average in state["averages"].items():
        assert torch.equal(saved[name], average), name
        mask = state["model"].get(name.removesuffix("weight") + "mask")
        assert mask is None or not average[~mask].any()
    assert (saved["conv2.weight"] == 0).any()
    assert acdc_command(["eval", str(folder)]) == 0
    assert "sparse_ema" in capsys.readouterr().out


@pytest.mark.usefixtures("small_net")
def test_a_branch_takes_them_over_and_off_is_as_before(tiny_data, tmp_path):
    """The dense branch ends with the averages of a run that was dense to the end."""
    assert main(["quickstart", *options(tiny_data, tmp_path / "both", "finetune_dense=true")]) == 0
    dense = "sparsity.schedule=dense 1, sparse 1, dense 2"
    other = run(tiny_data, tmp_path / "other", dense).run_dir.path
    branch = newest_run(tmp_path / "both") / "finetuned_dense"
    assert_equal_states(*(final_state(path, 12)["averages"] for path in (branch, other)))
    result = json.loads((newest_run(tmp_path / "both") / "result.json").read_text())
    assert result["finetuned_dense_ema"]["epoch"] == 3

    run(tiny_data, tmp_path / "off", "ema=null")
    off, on = (final_state(newest_run(tmp_path / name), 12) for name in ("off", "both"))
    assert "averages" not in off
    for key in ("model", "optimizer"):
        assert_equal_states(off[key], on[key])  # averages change nothing
    run(tiny_data, tmp_path / "off", f"resume={newest_run(tmp_path / 'off') / 'checkpoints/step-000000009'}")
    assert final_state(newest_run(tmp_path / "off"), 12)["averages"]  # begun at step 9


def test_mistakes():
    for value in ("0", "1", "2.5"):
        with pytest.raises(UserError, match=r"ema\.decay"):
            load_config("quickstart", [f"ema.decay={value}"])
