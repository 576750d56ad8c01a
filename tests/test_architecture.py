"""The house: imports run one way, without circles, and rooms say what belongs in them and stay small."""

import ast
from pathlib import Path

import pytest

TREE = Path(__file__).parents[1]
PACKAGES = ("trainer", "sparsity", "data", "benchmarks")
FLOORS = {
    "sparsity": {"sparsity"},
    "data": {"data"},
    "trainer": {"trainer", "data", "sparsity", "configs"},
    "benchmarks": {"benchmarks", "trainer", "data", "sparsity"},
}
MODULES = {
    ".".join(path.relative_to(TREE).with_suffix("").parts): path
    for package in PACKAGES
    for path in (TREE / package).rglob("*.py")
}
ROOMS = {name.removesuffix(".__init__"): path for name, path in MODULES.items() if name.endswith("__init__")}


def imported(path: Path) -> set[str]:
    """Modules of ours that a file names in imports, those within functions among them."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in inner if name in MODULES or name in ROOMS}
            found |= modules or {node.module}
    return {name for name in found if name.partition(".")[0] in FLOORS}


def room(module: str) -> str:
    """The folder that a module is in; the modules beside the rooms of a package stand for themselves."""
    module = module.removesuffix(".__init__")
    parent = module if module in ROOMS else module.rpartition(".")[0]
    return module if parent in PACKAGES else parent


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_one_way(package):
    wrong = {
        (name, other)
        for name, path in MODULES.items()
        if name.partition(".")[0] == package
        for other in imported(path)
        if other.partition(".")[0] not in FLOORS[package]
    }
    assert not wrong


@pytest.mark.parametrize("place", [str, room])
def test_no_circles(place):
    """Neither between modules nor between rooms."""
    graph: dict[str, set[str]] = {}
    for name, path in MODULES.items():
        here = place(name.removesuffix(".__init__"))
        graph.setdefault(here, set()).update(place(other) for other in imported(path))
    for here, others in graph.items():
        others.discard(here)
    while leaves := [name for name, others in graph.items() if not others & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert not graph


@pytest.mark.parametrize("name", ROOMS)
def test_rooms_are_small_and_say_what_belongs_there(name):
    assert (ast.get_docstring(ast.parse(ROOMS[name].read_text())) or "").strip(), "no docstring"
    modules = [path for path in ROOMS[name].parent.glob("*.py") if path.name != "__init__.py"]
    assert len(modules) <= (20 if name == "benchmarks" else 12)


def test_files_are_of_a_size_to_read():
    long = {name: len(path.read_text().splitlines()) for name, path in MODULES.items()}
    assert {name: lines for name, lines in long.items() if lines > 350} == {}
