import math
from collections.abc import Callable

import pytest
import torch
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    SequentialLR,
)

from data.torchvision_import import import_torchvision
from tests.trainer.distributed.small_net import small
from tests.trainer.runs import (
    assert_equal_states,
    build,
    final_state,
    fit_and_close,
    newest_run,
    records,
    refusal,
)
from trainer.cli.main import main
from trainer.config.optimization import LRConfig
from trainer.optim import learning_rate
from trainer.optim.rates import check_warmup


def test_constant():
    assert learning_rate(LRConfig(kind="constant", warmup_epochs=2), 0.4, 0, 10) == 0.2
    assert learning_rate(LRConfig(kind="constant", warmup_epochs=2), 0.4, 9, 10) == 0.4


STEPS, EPOCHS = 7, 6  # of an epoch; of the run


def ours(config: LRConfig) -> list[float]:
    places = [(epoch, step) for epoch in range(EPOCHS) for step in range(STEPS)]
    return [learning_rate(config, 0.4, epoch, EPOCHS, step, STEPS) for epoch, step in places]


def torchs(*parts: tuple[int, Callable[[torch.optim.Optimizer], LRScheduler]]) -> list[float]:
    """parts: from which step on, and which scheduler."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.4)
    schedulers = [make(optimizer) for _, make in parts]
    scheduler = SequentialLR(optimizer, schedulers, [begin for begin, _ in parts[1:]])
    rates = []
    for _ in range(EPOCHS * STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")  # torch's own call
@pytest.mark.parametrize(
    ("options", "warmup"), [({"warmup": "10st"}, 10), ({"warmup_epochs": 2}, 14), ({}, 0)]
)
def test_rates_by_steps_are_torchs(options, warmup):
    total = EPOCHS * STEPS
    rising = [(0, lambda o: LinearLR(o, 1 / warmup, total_iters=warmup - 1))] if warmup else []
    cosine = (warmup, lambda o: CosineAnnealingLR(o, total - warmup, eta_min=0.01))
    config = LRConfig(by="step", floor=0.01, **options)
    assert ours(config) == pytest.approx(torchs(*rising, cosine), rel=1e-6)
    constant = (warmup, lambda o: ConstantLR(o, factor=1))
    config = LRConfig(by="step", kind="constant", **options)
    assert ours(config) == pytest.approx(torchs(*rising, constant), rel=1e-6)
    # torch counts milestones from the end of the warm-up
    steps = (warmup, lambda o: MultiStepLR(o, [3 * STEPS - warmup, 5 * STEPS - warmup], 0.2))
    config = LRConfig(by="step", kind="step", milestones=[3, 5], gamma=0.2, **options)
    assert ours(config) == pytest.approx(torchs(*rising, steps), rel=1e-6)


def test_rates_by_steps_are_timms_after_its_warm_up():
    """timm's warm-up begins at a rate of its own, before the first step of ours."""
    import_torchvision()  # timm does, too, where it can
    pytest.importorskip("timm", reason="timm is not installed")
    from timm.scheduler import CosineLRScheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.4)
    theirs = CosineLRScheduler(
        optimizer, EPOCHS * STEPS - 14, lr_min=0.01, warmup_t=14, warmup_prefix=True, t_in_epochs=False
    )
    expected = []
    for step in range(EPOCHS * STEPS):
        theirs.step_update(step)
        expected.append(optimizer.param_groups[0]["lr"])
    found = ours(LRConfig(by="step", floor=0.01, warmup="2ep"))
    assert found[14:] == pytest.approx(expected[14:], rel=1e-9)
    assert found[:14] == pytest.approx([0.4 * (step + 1) / 14 for step in range(14)])


def test_within_an_epoch_the_rate_stays_unless_it_goes_by_steps():
    for options in ({"warmup": "2ep"}, {"warmup_epochs": 2}):
        found = ours(LRConfig(floor=0.1, **options))
        assert len(set(found)) == 5  # the cosine begins where the warm-up ends
        assert found[::STEPS] == [
            0.2, 0.4, *(0.1 + 0.3 * 0.5 * (1 + math.cos(math.pi * part / 4)) for part in range(4))
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["lr.warmup=3"], "3 is not a duration"),
        (["lr.warmup=2ep"], "warmup=2ep and warmup_epochs=1 say the same; leave one out (warmup_epochs=0)"),
        (["lr={warmup: 20st}"], "warmup=20st in steps needs by: step"),
        (["lr={warmup: 14ep}"], "lr.warmup is 14, not below epochs, 14"),
        (["lr.floor=0.05"], "lr.floor is 0.05, not below optimizer.lr, 0.05"),
        (["lr={kind: constant, floor: 0.01}"], "floor=0.01 belongs to kind: cosine"),
    ],
)
def test_mistakes(overrides, expected):
    assert expected in refusal(*overrides)


def test_a_warm_up_as_long_as_the_run_is_refused():
    config = LRConfig(by="step", warmup="42st")
    with pytest.raises(ValueError, match="warmup 42st takes the whole run, 6 epochs of 7 steps"):
        check_warmup(config, EPOCHS, STEPS)
    check_warmup(config, EPOCHS, STEPS + 1)


def test_the_command_shows_rates_by_steps(capsys):
    options = ["lr={by: step, warmup: 20st}", "steps_per_epoch=10"]
    assert main(["schedule", "quickstart", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:3] == ["epoch   0  dense   lr 0.0025 to 0.025", "epoch   1  dense   lr 0.0275 to 0.05"]
    assert main(["schedule", "quickstart", options[0]]) == 2
    assert "how long that is, the data will tell" in capsys.readouterr().err


@pytest.mark.usefixtures("small_net")
@pytest.mark.parametrize("stage", [0, 1])
def test_a_run_takes_each_step_at_its_rate_and_resumes_bit_for_bit(stage, tiny_data, tmp_path):
    options = ["lr={by: step, warmup: 2st, floor: 0.001}", f"engine.zero_stage={stage}"]
    taken = {}
    for name, stop in (("whole", None), ("stopped", 4), ("stopped", None)):
        overrides = small(tiny_data, tmp_path / name, "{}", *options, "resume=auto")
        trainer = build(overrides)
        inner = getattr(trainer.engine.optimizer, "optimizer", trainer.engine.optimizer)
        rates = taken.setdefault(name, [])
        inner.register_step_pre_hook(lambda o, *_, rates=rates: rates.append(o.param_groups[0]["lr"]))
        fit_and_close(trainer, stop)
    config = trainer.config
    expected = [learning_rate(config.lr, 0.05, epoch, 2, step, 3) for epoch in (0, 1) for step in range(3)]
    assert len(set(expected)) == 5  # the warm-up ends with the rate that the cosine begins with
    assert taken == {"whole": expected, "stopped": expected}
    for name in taken:
        logged = [record["lr"] for record in records(newest_run(tmp_path / name), None)]
        assert logged == expected  # steps 1, 2, the epoch; steps 4, 5, the epoch
    assert_equal_states(*(final_state(newest_run(tmp_path / name), 6) for name in taken))
