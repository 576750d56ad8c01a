"""What `acdc doctor` finds, and what it says to do about it."""

import shutil
from types import SimpleNamespace

import pytest

from trainer.checkpoints import environment
from trainer.cli import doctor
from trainer.cli.main import main

GPU = "NVIDIA H200"


def findings(**changed):
    """By what they are about."""
    found = {**environment.environment(), **changed}
    return {each.what: each for each in doctor.examine(found)}


def test_what_is_there_is_told(capsys):
    main(["doctor"])
    out = capsys.readouterr().out
    for what in ("cpu_cores", "torch", "engine.precision=auto", "disk, this folder", "timm"):
        assert f"  {what}" in out or f"- {what}" in out


def test_a_missing_package_ends_with_what_installs_it(monkeypatch, capsys):
    found = {**environment.environment(), "packages": {"torch": "2.13.0", "deepspeed": None}}
    monkeypatch.setattr(environment, "environment", lambda: found)
    assert main(["doctor"]) == 3
    said = capsys.readouterr()
    assert "missing packages: deepspeed; pip install 'acdc-train[train]'" in said.err
    assert "- deepspeed              missing  -> nothing trains without it" in said.out


def test_what_is_optional_says_what_for(monkeypatch):
    monkeypatch.setattr(doctor, "installed_version", lambda package: None if package == "timm" else "1.0")
    found = findings()
    assert found["timm"].mend == "for model.name=timm:NAME: pip install 'acdc-train[timm]'"
    assert not found["timm"].needed
    assert not found["onnx"].mend


@pytest.mark.parametrize(("cuda", "told"), [(None, "torch is built for CPUs"), ("13.0", "torch sees none")])
def test_a_gpu_that_torch_does_not_see(monkeypatch, cuda, told):
    monkeypatch.setattr(doctor.Path, "exists", lambda path: True)
    found = doctor._gpus({"gpus": [], "cuda": cuda})
    assert told in found.found
    assert found.mend


def test_gpus_are_named():
    found = findings(gpus=[GPU], cuda="13.0")
    assert found["gpus"].found == f"{GPU}, CUDA 13.0"
    assert found["engine.precision=auto"].found == "bf16"


def test_a_full_disk_is_said(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5e8))
    found = findings()
    assert found["disk, this folder"].found.startswith("0.5 GB free")
    assert "checkpoints" in found["disk, this folder"].mend
    assert "--shm-size" in found["shared memory"].mend


def test_every_benchmark_says_what_it_measures(capsys):
    with pytest.raises(SystemExit) as end:
        main(["bench", "--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert "throughput       training images per second, from files and on noise" in said
