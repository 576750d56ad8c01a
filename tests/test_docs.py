"""The documents: short lines, links and paths that lead somewhere, commands that parse, real messages."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from pydantic import BaseModel

from trainer.cli.main import build_parser, main
from trainer.config.load import load_config
from trainer.config.mistakes import sections_of
from trainer.config.schema import Config
from trainer.errors import UserError

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *PAGES]
USER_DOCUMENTS = [README, *PAGES]
# Words that stand for what the reader has
PLACEHOLDERS = {"CONFIG": "quickstart", "NAME": "peers", "theirs.acdc.yaml": "imagenet/resnet50_90"}


def ids(path: Path) -> str:
    return path.name


def blocks(path: Path) -> list[str]:
    """The lines of indented blocks and of fenced ones that are not code of a language."""
    lines, fenced = [], False
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif line.startswith("    ") and not fenced:
            lines.append(line.strip())
    return lines


def without_blocks(path: Path) -> str:
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"^    .*$", "", text, flags=re.MULTILINE)


def spans(path: Path) -> list[str]:
    """Code within sentences and tables."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", without_blocks(path))]


def commands(path: Path) -> list[str]:
    """What begins with acdc or deepspeed, in blocks and sentences, one command each, without comments."""
    found = []
    for line in [*blocks(path), *spans(path)]:
        for command in re.sub(r"\s+# .*", "", line).split(" && "):
            command = re.sub(r"^(?:[A-Z_]+=\S+ )+", "", command)
            if re.match(r"(acdc|deepspeed) ", command):
                found.append(command)
    return found


def words_of(command: str) -> list[str]:
    return [PLACEHOLDERS.get(word, word) for word in shlex.split(re.sub(r"\[[^]=]*[=-][^]]*\]", "", command))]


@pytest.fixture
def recipes_of_the_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipes that documents show, under the names in their first lines, in the current folder."""
    monkeypatch.chdir(tmp_path)
    for path in USER_DOCUMENTS:
        for recipe in re.findall(r"```yaml\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL):
            (tmp_path / recipe.splitlines()[0].removeprefix("# ")).write_text(recipe, encoding="utf-8")


@pytest.mark.parametrize("path", DOCUMENTS, ids=ids)
def test_lines_are_short(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [f"{path.name}:{number}" for number, line in enumerate(lines, 1) if len(line) > 110] == []


def test_the_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 200


def test_pictures_are_small():
    pictures = [path for path in (ROOT / "docs").iterdir() if path.suffix in (".png", ".webp", ".svg")]
    assert len(pictures) >= 3
    assert [path.name for path in pictures if path.stat().st_size > 120_000] == []


def anchors(path: Path) -> set[str]:
    """Of a page's headings, as GitHub and mkdocs name them."""
    headings = re.findall(r"^#+ (.+)$", without_blocks(path), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=ids)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)]+)\)|src=\"([^\"]+)\"", without_blocks(path)):
        target = "".join(target)
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file) if file else path
        assert there.is_file(), target
        assert not anchor or anchor in anchors(there), target
        if path.parent.name == "docs":
            assert there.parent == path.parent, f"{target} is not on the site"


def check(command: str) -> None:
    """Raises UserError or SystemExit for a command that does not parse."""
    program, *words = words_of(command)
    if program == "deepspeed":
        if "trainer.train" not in words:
            return
        recipe, *overrides = words[words.index("trainer.train") + 1 :]
        load_config(recipe, overrides)
        return
    if len(words) == 1 and words[0] != "doctor":  # the mention of a subcommand
        words.append("--help")
    options, rest = build_parser().parse_known_args(words)
    if rest and (not hasattr(options, "overrides") or any(word.startswith("-") for word in rest)):
        raise UserError(f"arguments that acdc does not know: {rest}")
    if words[0] in ("train", "schedule"):
        load_config(options.config, [*options.overrides, *rest])


def reason_refused(command: str) -> str | None:
    try:
        check(command)
    except UserError as error:
        return str(error)
    except SystemExit as end:  # of argparse, 0 after --help
        return "acdc does not take this" if end.code else None
    return None


@pytest.mark.usefixtures("recipes_of_the_documents")
@pytest.mark.parametrize("path", USER_DOCUMENTS, ids=ids)
def test_commands_parse(path):
    assert {command: wrong for command in commands(path) if (wrong := reason_refused(command))} == {}


def test_commands_are_found_and_wrong_ones_refused():
    assert len(commands(README)) >= 10
    assert "acdc train quickstart --devices 2" in commands(README)
    for wrong in (
        "acdc train quickstart lr=1",
        "acdc trian quickstart",
        "acdc eval RUN --quick",
        "acdc bench x",
    ):
        with pytest.raises((UserError, SystemExit)):
            check(wrong)
    with pytest.raises(UserError):
        check("deepspeed --num_gpus 2 --module trainer.train quickstart optimizer.lrr=1")


@pytest.mark.parametrize("path", DOCUMENTS, ids=ids)
def test_make_targets_exist(path):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    for command in [*blocks(path), *spans(path)]:
        if made := re.match(r"make ([\w-]+)", command):
            assert made[1] in targets, command


@pytest.mark.usefixtures("recipes_of_the_documents")
def test_the_readmes_first_commands_run(capsys):
    assert main(["doctor"]) == 0
    assert main(["schedule", "flowers.yaml"]) == 0
    capsys.readouterr()
    assert main(["schedule", "quickstart"]) == 0
    printed = capsys.readouterr().out.splitlines()
    shown = blocks(ROOT / "docs" / "recipes.md")
    assert [line for line in shown if line.startswith(("dense 2", "epoch "))] == printed[:5]


def test_the_shown_recipe_is_the_quickstart(recipes_of_the_documents):
    shown, real = load_config("my_recipe.yaml"), load_config("quickstart")
    assert shown.model_copy(update={"name": real.name}) == real


def test_paths_of_the_architecture_page_exist():
    page = ROOT / "docs" / "architecture.md"
    named = [line.split()[0] for line in blocks(page)] + spans(page)
    paths = [name for name in named if re.fullmatch(r"[\w.-]+/[\w./-]*", name)]
    assert len(paths) > 60
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_architecture_page_has_every_room():
    shown = {line.split()[0] for line in blocks(ROOT / "docs" / "architecture.md")}
    rooms = [
        f"{folder.relative_to(ROOT)}/"
        for package in ("trainer", "data", "sparsity")
        for folder in (ROOT / package, *sorted((ROOT / package).glob("*/")))
        if (folder / "__init__.py").exists()
    ]
    assert [room for room in rooms if room not in shown] == []


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        sections = sections_of(field.annotation)
        for section in sections:
            yield from keys(section, f"{prefix}{name}.")
        if not sections:
            yield prefix + name


def test_every_field_of_a_recipe_has_a_row_with_its_meaning(hooks):
    rows = [row for section in hooks.recipe_fields().values() for row in section]
    assert sorted(row.key for row in rows) == sorted(keys(Config))
    assert [row.key for row in rows if not row.meaning] == []
    by_key = {row.key: row for row in rows}
    assert by_key["optimizer.lr"][1:4] == ("number", "required", "above 0")
    assert by_key["sparsity.target"][1:4] == ("number or null", "`null`", "at least 0, below 1")
    assert by_key["save.every"][1:3] == ("duration", '`"1ep"`')
    assert by_key["sparsity.recompute_batch_norm"].type == "duration or null"
    assert by_key["lr.kind"].allowed == "`cosine`, `step`, `constant`"


def test_every_section_is_on_the_recipes_page(hooks):
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert sorted(hooks.MARKER.findall(page)) == sorted(hooks.recipe_fields())
    built = hooks.on_page_markdown(page)
    assert "<!-- fields" not in built
    assert "| `optimizer.momentum` | number | `0.9` | at least 0, below 1 |" in built
    with pytest.raises(KeyError):
        hooks.on_page_markdown("<!-- fields: optimiser -->")


def test_every_page_is_in_the_sites_navigation():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = [page if isinstance(page, str) else next(iter(page.values())) for page in site["nav"]]
    assert sorted(listed) == [page.name for page in PAGES]


def literals() -> Iterator[str]:
    """Every text in the packages' code, what is put into it as "..."."""
    for package in ("trainer", "data", "sparsity"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = (part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
                    yield "".join(map(str, parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield re.sub("%[sd]", "...", node.value)


def test_messages_of_the_troubleshooting_page_are_the_codes():
    page = ROOT / "docs" / "troubleshooting.md"
    messages = re.findall(r"^(?:\| )?`([^`]+)`", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    messages = [message for message in messages if " " in message and message != "address already in use"]
    assert len(messages) > 40
    known = list(literals())
    for message in messages:
        pattern = re.compile(".*".join(map(re.escape, message.split("..."))), re.DOTALL)
        assert any(map(pattern.search, known)), message
