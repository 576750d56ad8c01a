"""The host file of `acdc train`, and machines that cannot be reached; test_cluster.py trains on such."""

import shlex
import subprocess
import sys
from argparse import Namespace

import pytest

from tests.trainer.stand_ins import install
from trainer.cli.hosts import first_address, for_remote_shell, read_hosts
from trainer.cli.main import main
from trainer.errors import EnvironmentFailure, UserError


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    for key, value in install(tmp_path / "commands").items():
        monkeypatch.setenv(key, value)
    return tmp_path / "commands"


def test_a_host_file(tmp_path):
    file = tmp_path / "hosts"
    file.write_text("# two machines\nnode1 slots=8\n\n  node2   slots=4  \n")
    assert read_hosts(str(file)) == {"node1": 8, "node2": 4}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("node1\n", "line 1: 'node1' is not HOST slots=NUMBER"),
        ("node1 slots=8\nnode2 slots=0\n", "line 2: 'node2 slots=0' is not HOST slots=NUMBER"),
        ("node1 slots=8\nnode1 slots=8\n", "line 2: node1 is there twice; add its slots up"),
        ("# none\n", "it lists no machine; a line each, HOST slots=NUMBER"),
    ],
)
def test_mistakes_in_a_host_file(tmp_path, text, expected, capsys):
    (tmp_path / "hosts").write_text(text)
    assert main(["train", "quickstart", "--hostfile", str(tmp_path / "hosts")]) == 2
    assert expected in capsys.readouterr().err


def test_other_mistakes_with_host_files(tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match="No such file"):
        read_hosts(str(tmp_path / "hosts"))
    (tmp_path / "hosts").write_text("a slots=3\nb slots=2\n")
    words = ["train", "quickstart", "--hostfile", str(tmp_path / "hosts")]
    assert main(words) == 2
    assert "--hostfile: a batch of 64 does not divide by 5 devices" in capsys.readouterr().err
    assert main([*words, "--devices", "2"]) == 2
    assert "--hostfile and --devices: the file's slots say" in capsys.readouterr().err
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    assert main(words) == 2
    assert (
        "srun has started 4 processes, which are this run's; leave --hostfile out" in capsys.readouterr().err
    )
    assert main(["train", "quickstart", "--devices", "2"]) == 2
    assert "--devices 2: srun has started 4 processes" in capsys.readouterr().err


def test_the_first_machines_address(stand_ins):
    assert first_address({"127.0.0.2": 1, "127.0.0.1": 1}) == "127.0.0.1"


@pytest.mark.parametrize("missing", ["ssh", "pdsh"])
def test_a_program_that_is_missing_is_said_in_one_line(stand_ins, missing, monkeypatch, tmp_path, capsys):
    (stand_ins / missing).unlink()
    monkeypatch.setenv("PATH", str(stand_ins))
    (tmp_path / "hosts").write_text("127.0.0.1 slots=1\n127.0.0.2 slots=1\n")
    assert main(["train", "quickstart", "--hostfile", str(tmp_path / "hosts")]) == 3
    message = capsys.readouterr().err
    assert f"error: --hostfile: the launcher needs {missing}, which is not on this machine: apt " in message
    assert message.count("\n") == 1


def test_a_machine_that_cannot_be_reached_is_named(stand_ins, tmp_path, capsys):
    (tmp_path / "hosts").write_text("127.0.0.1 slots=1\nnode7 slots=1\n")
    assert main(["train", "quickstart", "--hostfile", str(tmp_path / "hosts")]) == 3
    expected = (
        "node7 cannot be reached by ssh without a password: ssh: connect to host node7 port 22: No route"
    )
    assert expected in capsys.readouterr().err


def test_a_machine_without_this_python_is_named(stand_ins, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/bin/python")
    with pytest.raises(EnvironmentFailure, match="has no /nowhere/bin/python or no /"):
        first_address({"127.0.0.1": 1})


@pytest.mark.parametrize(
    "argument",
    ["epochs=2", "sparsity.schedule=dense 1, (sparse 1, dense 1) x2", "a=$HOME`x`'\"", "a b=$HOME `x`'\" \\"],
)
def test_arguments_arrive_on_other_machines_as_they_were(argument):
    """Through DeepSpeed's own quoting, and a shell."""
    from deepspeed.launcher.multinode_runner import PDSHRunner

    runner = PDSHRunner(Namespace(user_args=[for_remote_shell(argument)], user_script="x"), "")
    line = shlex.join([sys.executable, "-c", "import sys; print(sys.argv[1:])"])
    done = subprocess.run(
        ["sh", "-c", f"{line} {' '.join(runner.user_arguments)}"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{[argument]}\n"
