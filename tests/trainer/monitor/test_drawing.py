"""A schedule drawn in text: what stands where, within 80 columns, at any number of epochs and phases."""

import pytest

from trainer.config.load import load_config
from trainer.monitor.drawing import draw_schedule, for_encoding, phase_table


def drawn(*overrides):
    """Label -> the drawing's line at it."""
    lines = draw_schedule(load_config("quickstart", overrides), 10)
    assert max(map(len, lines)) <= 80
    assert all(line == line.rstrip() for line in lines)
    return {line[:10].strip(): line[10:] for line in lines if line[:10].strip()}


def test_phases_rates_and_sparsity_stand_at_their_epochs():
    lines = drawn()
    each = 5  # columns of an epoch: 14 of them in 70
    assert lines["phase"][::each] == "░░█░█░░░░░████"
    assert lines["90 %"].ljust(70)[::each] == "  █ █     ████"
    assert lines["0.05"][0] == "█"  # the whole warm-up, an epoch
    assert lines["0"] == lines["90 %"]  # the lower line of that name: sparsity's last
    assert lines["epoch"].split() == ["0", "2", "3", "4", "5", "10", "14"]
    assert [lines["epoch"].index(f" {at}") + 1 for at in (2, 10, 14)] == [2 * each, 10 * each, 14 * each - 2]


def test_rates_by_steps_rise_within_an_epoch():
    top = draw_schedule(load_config("quickstart", ["lr={by: step, kind: constant, warmup: 2ep}"]), 10)
    lowest = next(line for line in top if line.startswith("0   "))[10:]
    assert lowest[0] < lowest[1] < lowest[2] <= "█" == lowest[-1]


def test_more_epochs_than_columns_share_them():
    schedule = "(dense 1, sparse 1) x100, sparse 100"
    lines = drawn("epochs=300", f"sparsity.schedule={schedule}")
    assert lines["phase"] == "▒" * 47 + "█" * 23
    assert lines["epoch"].endswith("300")


def test_gradual_pruning_climbs_and_a_dense_run_has_no_sparsity():
    lines = drawn("sparsity.schedule=dense 1, sparse 13", "sparsity.gradual={initial: 0.1, end: 9, every: 2}")
    assert lines["0"][5] in "▁▂▃"
    assert lines["0"][-1] == "█"
    assert not {"sparsity", "90 %"} & drawn("sparsity.schedule=dense 14").keys()
    assert "50 %" in drawn("sparsity.pattern=2:4", "sparsity.target=null")


def test_an_output_without_blocks_gets_ascii():
    text = "\n".join(draw_schedule(load_config("quickstart", []), 10))
    assert for_encoding(text, "utf-8") == text
    plain = for_encoding(text, "ascii")
    assert plain.isascii()
    assert "....#####" in plain.splitlines()[0]


@pytest.mark.parametrize(
    ("schedule", "epochs", "lines", "last"),
    [
        ("dense 2, sparse 3", 5, ["    1-2 dense", "    3-5 sparse 90 %"], ""),
        ("(dense 1, sparse 5) x10", 60, None, "56-60 sparse 90 %"),
        ("(dense 1, sparse 1) x50", 100, None, "81 more phases"),
    ],
)
def test_the_table_of_phases_stays_short(schedule, epochs, lines, last):
    config = load_config("quickstart", [f"epochs={epochs}", f"sparsity.schedule={schedule}"])
    table = phase_table(config)
    assert len(table) <= 5
    assert max(map(len, table)) <= 80
    assert lines is None or table == lines
    assert table[-1].endswith(last)


@pytest.mark.usefixtures("needs_runs")
def test_a_run_begins_with_its_phases_in_few_lines():
    from trainer.summary import phase_lines

    long = ", ".join(f"dense {length}, sparse 1" for length in range(1, 11))
    config = load_config("quickstart", ["epochs=65", f"sparsity.schedule={long}"])
    lines = phase_lines(config)
    assert lines[0] == "phases      20 of them, 10 of 65 epochs sparse"
    assert len(lines) == 6
    assert max(map(len, lines)) <= 80
    assert phase_lines(load_config("quickstart", ["sparsity.schedule=dense 14"])) == ["phases      dense 14"]
