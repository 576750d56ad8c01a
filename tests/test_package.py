"""What is installed: a wheel of the tree, the library with torch alone, the trainer as an extra."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

TREE = Path(__file__).parents[1]
PACKAGES = ("trainer", "sparsity", "data", "configs", "benchmarks")
# What torch brings along is not among these.
EXTRA = ["torchvision", "deepspeed", "nvidia", "tensorboard", "yaml", "pydantic", "PIL", "safetensors"]
EXTRA += ["psutil", "rich", "matplotlib"]
WITHOUT = f"""
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {EXTRA}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy: setuptools writes into the tree that it builds from."""
    copy = tmp_path_factory.mktemp("tree")
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(TREE / name, copy)
    for name in PACKAGES:
        shutil.copytree(TREE / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", "out", "."]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = (copy / "out").glob("acdc_train-*.whl")
    return built


@pytest.mark.slow
def test_a_wheel_holds_all_that_runs_and_no_tests(wheel):
    files = {
        path.relative_to(TREE).as_posix()
        for name in PACKAGES
        for pattern in ("*.py", "*.yaml", "*.npz", "LICENSE*", "*.cpp", "*.h", "*.css", "*.js")
        for path in (TREE / name).rglob(pattern)
    }
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = (archive.read(n).decode() for n in archive.namelist() if n.endswith("METADATA"))
        (scripts,) = (archive.read(n).decode() for n in archive.namelist() if n.endswith("entry_points.txt"))
    assert held == files
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist")]
    assert [line for line in required if "extra ==" not in line] == ["Requires-Dist: torch<2.14,>=2.11"]
    assert "acdc = trainer.cli.main:main" in scripts


@pytest.mark.slow
@pytest.mark.usefixtures("needs_runs")
def test_the_wheel_trains_the_quickstart(wheel, tmp_path):
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", target, wheel]
    subprocess.run(command, capture_output=True, check=True)
    short = ["epochs=2", "sparsity.schedule=dense 1, sparse 1", "steps_per_epoch=3", "engine.compile=false"]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "trainer.cli.main", "train", "quickstart", *short],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "sparse model" in done.stdout
    assert str(target) in done.stdout  # the subset that came with it
    assert list(tmp_path.glob("runs/quickstart/*/report.html"))


def without_the_extra(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT + code]
    return subprocess.run(command, cwd=TREE, capture_output=True, text=True, check=False)


def test_the_library_needs_torch_alone():
    code = """
import torch
from sparsity import ACDC, GlobalMagnitude, PhaseSchedule
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
acdc = ACDC(model, GlobalMagnitude(0.5), PhaseSchedule.parse("dense 1, sparse 1"), steps_per_epoch=1)
acdc.attach(torch.optim.SGD(model.parameters(), 0.1))
acdc.before_step()
acdc.before_step()
assert sum(int(mask.sum()) for mask in acdc.masks().values()) == 64
"""
    done = without_the_extra(code)
    assert done.returncode == 0, done.stderr


def test_a_missing_part_names_the_extra():
    code = "from trainer.cli.main import main\nsys.exit(main(['train', 'quickstart']))"
    done = without_the_extra(code)
    assert done.returncode == 3, done.stderr
    assert "pip install 'acdc-train[train]'" in done.stderr
    assert "Traceback" not in done.stderr
