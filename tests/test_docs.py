"""Documents: links and paths resolve, commands parse, every field of a recipe is in the tables."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from trainer.cli.main import build_parser, main
from trainer.config.load import load_config
from trainer.config.schema import Config
from trainer.errors import UserError

TREE = Path(__file__).parents[1]
DOCUMENTS = [*TREE.glob("*.md"), *(TREE / "docs").glob("*.md")]
COMMAND = re.compile(r"^ {4}(?:[A-Z_]+=\S+ )?(acdc .+|deepspeed .+)$", re.M)
STAND_INS = ("CONFIG", "RECIPE", "NAME", "...", "theirs", "flowers.yaml", "my_recipe.yaml")


def commands():
    """(document, words) of every command that stands on a line of its own."""
    for path in DOCUMENTS:
        for line in COMMAND.findall(path.read_text()):
            words = shlex.split(line, comments=True)
            if not any(stand_in in word for stand_in in STAND_INS for word in words):
                yield pytest.param(words, id=f"{path.name}: {' '.join(words)}")


def test_the_readme_is_short():
    assert len((TREE / "README.md").read_text().splitlines()) <= 200


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_lines_fit_and_links_resolve(path):
    text = path.read_text()
    assert [line for line in text.splitlines() if len(line) > 110] == []
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        assert target.startswith("https://") or (path.parent / target).exists(), target


def test_the_architecture_names_what_there_is():
    named = re.findall(
        r"`((?:trainer|data|sparsity|benchmarks|tests)/[\w./]*)`", text := read("architecture")
    )
    assert len(named) > 20
    assert [path for path in named if not (TREE / path).exists()] == []
    rooms = re.findall(r"^ {6}(\w+)/ ", text, re.M)
    assert {path.parent.name for path in (TREE / "trainer").glob("*/__init__.py")} <= set(rooms)
    assert text.count("\n| ") >= 12


@pytest.mark.parametrize("words", list(commands()))
def test_commands_parse(words):
    if words[0] == "deepspeed":
        words = ["acdc", "train", *words[words.index("trainer.train") + 1 :]]
    options, rest = build_parser().parse_known_args([word for word in words[1:] if word != "&&"])
    assert not any(word.startswith("-") for word in rest)
    if words[1] in ("train", "schedule"):
        assignments = [word for word in [*options.overrides, *rest] if "=" in word]
        try:
            load_config(options.config, assignments)
        except UserError as error:  # of a recipe that begins with another run, which has to be named
            pytest.fail(str(error))


@pytest.mark.parametrize(
    ("words", "shown"), [(["schedule", "quickstart"], "compress"), (["doctor"], "torch.compile")]
)
def test_short_commands_of_the_readme_run(words, shown, capsys):
    assert main(words) == 0
    assert shown in capsys.readouterr().out


def test_every_field_of_a_recipe_is_in_the_tables():
    spec = importlib.util.spec_from_file_location("hooks", TREE / "docs" / "hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    page = hooks.on_page_markdown(read("recipes"))
    sections = hooks.recipe_fields()
    rows = [row for section in sections.values() for row in section]
    assert hooks.MARKER.search(page) is None
    assert [row.key for row in rows if f"| `{row.key}` |" not in page] == []
    assert [row.key for row in rows if not row.meaning] == []
    assert {key.partition(".")[0] for key in (row.key for row in rows)} == set(Config.model_fields)


def read(page):
    return (TREE / "docs" / f"{page}.md").read_text()
