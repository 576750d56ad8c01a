"""The documents: short lines, links and paths that lead somewhere, commands that parse, real messages."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from benchmarks.accuracy import figures
from benchmarks.accuracy.tables import TABLES
from benchmarks.shared.record import show_spread
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


def record(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


TORTURE = "| `make torture`: kills end with the same bits; damage is refused or harmless | {} |"


def test_what_the_torture_counted_is_its_record():
    """README has its row, docs/security.md its table; until `make torture` has written one, both say so."""
    readme, page = (path.read_text(encoding="utf-8") for path in (README, ROOT / "docs" / "security.md"))
    shown = [line for line in page.splitlines() if re.search(r"\| [\d,]+ of [\d,]+ \|$", line)]
    if not (ROOT / "benchmarks" / "results" / "torture.json").exists():
        assert shown == []
        assert "**Not counted yet.**" in page
        assert TORTURE.format("**not counted yet**") in readme.splitlines()
        return
    claims = record("torture")["claims"]
    assert shown == [f"| {each['claim']} | {each['stood']:,} of {each['of']:,} |" for each in claims.values()]
    kills = [sum(claims[key][which] for key in ("killed", "killed_two_ranks")) for which in ("stood", "of")]
    damages = [claims["damaged"][which] for which in ("stood", "of")]
    counted = "; ".join(f"{stood:,} of {of:,}" for stood, of in (kills, damages))
    assert TORTURE.format(counted) in readme.splitlines()
    assert "Not counted yet" not in page


def test_the_evidence_page_has_the_figures_of_recipes_and_records():
    page = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    for path in (ROOT / "configs" / "imagenet").glob("*.yaml"):
        if found := re.search(r"Paper: +([\d.]+ %)", path.read_text(encoding="utf-8")):
            assert f"| `imagenet/{path.stem}` | {found[1]} |" in page
    for table in TABLES:
        found = figures.read(table, ROOT / "benchmarks" / "results" / "accuracy")
        if any(each.records for each in found if each.row.same_as is None):
            lines = figures.markdown(figures.lines(table, found))
            assert [line for line in lines if line not in page] == [], table


def test_the_readmes_accuracy_is_that_of_the_records():
    found = figures.read("main", ROOT / "benchmarks" / "results" / "accuracy")
    lines = dict(
        zip((each.row.name for each in found if each.records), figures.lines("main", found), strict=True)
    )
    shown = [lines[name] for name in ("dense", "acdc_90", "gmp_90", "one_shot_90", "set_90", "random_90")]
    readme = README.read_text(encoding="utf-8")
    for title, column in (("seeds", 1), ("test top-1, %", 3), ("against dense", 4)):
        assert f"| {title} | {' | '.join(line[column] for line in shown)} |".replace("|  |", "| |") in readme


def test_figures_are_those_of_the_records():
    readme, page = (path.read_text(encoding="utf-8") for path in (README, ROOT / "docs" / "benchmarks.md"))
    for claim in record("quickstart")["claims"]:
        assert f"| {claim['promise']} | {claim['bar']} | {claim['measured']} |" in page
    for network, measured in record("peers")["peers"].items():
        for ratio in ("ours_over_tuned", "ours_over_plain"):
            assert show_spread(measured[ratio], 2) in page
            if network == "resnet50":
                assert show_spread(measured[ratio], 2).replace(" (", " times (") in readme
    for network, measured in record("overhead")["overhead"].items():
        assert show_spread(measured["ratio"], 3) in page
        if network == "resnet50":
            assert show_spread(measured["ratio"], 3).replace(" (", " times (") in readme
    for measured in record("before")["peers"].values():
        assert show_spread(measured["ours_over_before"], 3) in page
    logging = record("logging")["logging"]["resnet20"]
    assert f"{show_spread(logging['ratio'], 3)} times as long as a silent one" in page
    assert f"take {logging['percent_of_step_recording']} % of a step" in page
    steps = {}
    names = [f"sparse_step{which}" for which in ("", "_small", "_wrn", "_wrn_bf16", "_run", "_avx2")]
    for name, result in [(each, result) for each in names for result in record(each)["sparse_step"]]:
        percent = f"{result['percent']:g}"
        gains = (show_spread(result[f"{who}_to_compressed"], 2) for who in ("dense", "stock"))
        whole = f"{result['whole_run']['of_dense']['median']:.2f}"
        network = result["network"] + ", AVX2" * name.endswith("avx2")
        network = "ResNet8, masks of a run" if name.endswith("_run") else network
        row = f"| {network} | {result['precision']} | {percent} | {' | '.join(gains)} | {whole} |"
        assert row in page
        if network == "resnet50":
            gain = show_spread(result["dense_to_compressed"], 2).replace(" (", " times (")
            steps[percent, result["precision"]] = gain
    for percent in ("90", "95"):
        assert f"| {percent} % | {steps[percent, 'fp32']} | {steps[percent, 'bf16']} |" in readme
    for precision, result in record("sparse_kernels")["sparse_kernels"]["resnet50"].items():
        kept = next(each["kept"] for each in result["shapes"] if each["layer"] == "all").values()
        gains = (f"{each['dense_to_sparse']:.2f} ({each['executed_gflops']:.0f})" for each in kept)
        assert f"| {precision} | {' | '.join(gains)} | {result['fma_fp32_gflops']:.0f} |" in page
    gains = {}
    for name in ("inference", "inference_avx2"):
        for result in record(name)["inference"]:
            ms, ratio = result["ms_per_batch"], result["ours_over_fastest_rival"][result["fastest_of_ours"]]
            shown = ("ours fp32", "ours bf16", "torch fp32", result["fastest_rival"])
            times = " | ".join(f"{ms[who]['median']:,.1f}" for who in shown if who in ms)
            percent, batch = f"{result['percent']:g}", result["batch"]
            assert f"| {percent} | {batch} | {times} | {show_spread(ratio, 2)} |" in page
            assert name == "inference" or result["fastest_rival"] == "ONNX Runtime fp32"
            gains[name, percent, batch] = show_spread(ratio, 2).replace(" (", " times (")
    for images, batch in (("one image", 1), ("32 images", 32)):
        gain = gains["inference_avx2", "90", batch]
        assert f"90 % sparse, {images}, AVX2, fp32, against ONNX Runtime | {gain} |" in readme
    variants = record("gpu/variants")["variants"]
    for found in variants.values():
        figures = f"{found['images_per_second']:,.0f} | {1000 * found['step_p50']:.1f}"
        assert f" | {found['batch']} | {figures} | {found['peak_memory_gb']:.1f} |" in page
    assert f"{variants['as_is']['images_per_second']:,.0f} images/s on noise" in readme
    files = record("gpu/files")
    decoders = {
        "engines 1.0": "engines, all images",
        "engines 0.65": "engines 65 %, kernels 35 %",
        "engines 0.3": "engines 30 %, kernels 70 %",
        "cpu": "CPU, 16 threads",
    }
    trained = {
        name: median(turn["images_per_second"] for turn in turns) for name, turns in files["training"].items()
    }
    for name, text in decoders.items():
        speeds = (
            files["alone"][name]["images_per_second"],
            trained[f"{name} | default"],
            trained[f"{name} | own"],
        )
        assert f"| {text} | {' | '.join(f'{speed:,.0f}' for speed in speeds)} |" in page
    assert f"| {trained['noise | default']:,.0f} | {trained['noise | own']:,.0f} |" in page
    assert f"{trained['engines 1.0 | own']:,.0f} from JPEG files" in readme
    for name, times in record("gpu/phase_switch")["seconds"].items():
        made = " | ".join(f"{1000 * times[what]['median']:.0f}" for what in ("compress", "decompress"))
        assert f"| {name} | {made} |" in page
    for row in record("gpu/kernels24")["kernels"]:
        for product in (row["forward"], row["gradient"]):
            assert product["sparse"] > 0.979 * product["dense"]  # "no more than 2 %"
    profiled = record("gpu/step_profile")
    for kind in ("convolution", "element-wise", "BatchNorm", "copies", "optimizer"):
        assert f" | {profiled['milliseconds'][kind]:.1f} |" in page
    assert (
        f"{profiled['copy_bandwidth_tb_s']:.2f} TB/s of a copy, {profiled['peak_bf16_tflop_s']:.0f}" in page
    )
    for line in blocks(README):
        if found := re.match(r"(dense twin|sparse model) +([\d.]+) +([\d.]+)", line):
            result = record("quickstart")["result"][
                {"dense twin": "dense_twin", "sparse model": "sparse"}[found[1]]
            ]
            assert (float(found[2]), float(found[3])) == (result["top1"], result["top5"])
