"""Recipes that hypothesis makes up: each is taken, or refused in words."""

from __future__ import annotations

import contextlib
import io
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import yaml
from hypothesis import strategies as st
from pydantic import BaseModel

from trainer.cli.main import main
from trainer.config.load import load_config, parse
from trainer.config.mistakes import sections_of
from trainer.config.recipes import dump_recipe, find_recipe, read_recipe, read_yaml, recipe_names
from trainer.config.schema import Config
from trainer.errors import UserError
from trainer.optim import learning_rate

Case = tuple[str | bytes, list[str]]  # a recipe's name or a file's content, and overrides

# What breaks readers of YAML, of numbers, of paths, and of a recipe's own small languages
WORDS = (
    *("null", "true", "0", "-1", "1e309", "nan", ".inf", "9" * 20, "9" * 5000, "0x1F", "1_000", "1:30"),
    *("[]", "{}", "[1, [2]]", "{a: {b: c}}", "!!timestamp x", "!!binary x", "&a [*a]", "2020-01-01", "'"),
    *("!!python/object/apply:os.getcwd []", "{<<: 1}", "{<<: {a: 1}}", "{? [a]: 1}", "{1: 2}", "&a {b: *a}"),
    *("\x00", "~nobody/x", "../..", "/dev/null", "é", "🙂", "\udcff", "a=b", "--help"),
    *("a" * 5000, "[" * 3000),
    *("dense", "dense 0", "dense 1", "sparse 1e9", "(dense 1) x99999", "(((dense 1) x9) x9) x9", "dense 1.5"),
    *("dense 99999999999", "2:4", "4:2", "0:0", "1ep", "1st", "-1ep", "99999999999ep", "quickstart", "."),
    # ten levels of eight times the one before: short to write, endless to show
    "[&a [x, x]"
    + "".join(f", &{b} [{', '.join([f'*{a}'] * 8)}]" for a, b in zip("abcdefghi", "bcdefghij", strict=True))
    + "]",
)
SHOWN = 300  # epochs that `acdc schedule` is asked to print
LONGEST = 50_000  # characters of a message


def keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The dotted keys of a recipe, of whole sections too."""
    for name, field in section.model_fields.items():
        yield prefix + name
        for kind in sections_of(field.annotation):
            yield from keys(kind, f"{prefix}{name}.")


def cases() -> st.SearchStrategy[Case]:
    """A packaged recipe or a file, and up to four overrides: of half of them the value is one that some
    recipe has for this very key, or near it."""
    known = sorted(set(keys(Config)))
    odd = st.tuples(st.sampled_from(known), st.sampled_from(["", ".x", ".name", ".", ". "])).map("".join)
    names = st.one_of(st.sampled_from(known), odd, st.text(max_size=9))
    wild = st.tuples(names, st.sampled_from(WORDS) | _values().map(_as_yaml) | st.text(max_size=12))
    tame = st.tuples(_in_use(), st.sampled_from([None, None, 0.5, 2, -1])).map(_near)
    one = st.integers(0, 9).flatmap(lambda n: tame if n < 5 else wild)
    overrides = st.lists(one.map("=".join) | st.text(max_size=9), max_size=4)
    packaged, own = st.sampled_from(recipe_names()), _files()
    recipe = st.integers(0, 9).flatmap(lambda n: packaged if n < 6 else own)
    return st.tuples(recipe, overrides)


def _in_use() -> st.SearchStrategy[tuple[str, Any]]:
    """Dotted keys, with a value that a packaged recipe has there."""
    values: dict[str, list[Any]] = {}
    for name in recipe_names():
        for key, value in read_recipe(find_recipe(name)).items():
            inner = value.items() if isinstance(value, dict) else ()
            for dotted, each in [(key, value), *((f"{key}.{last}", each) for last, each in inner)]:
                values.setdefault(dotted, []).append(each)
    return st.sampled_from(sorted(values)).flatmap(
        lambda key: st.tuples(st.just(key), st.sampled_from(values[key]))
    )


def _near(choice: tuple[tuple[str, Any], float | None]) -> tuple[str, str]:
    (key, value), factor = choice
    if factor is not None and isinstance(value, int | float) and not isinstance(value, bool):
        value = type(value)(value * factor)
    return key, _as_yaml(value)


def _values() -> st.SearchStrategy[Any]:
    """What YAML can say, much of it as packaged recipes do."""
    in_use = [value for name in recipe_names()[::4] for value in read_recipe(find_recipe(name)).values()]
    in_use += [value for section in in_use if isinstance(section, dict) for value in section.values()]
    leaves = st.one_of(
        st.none(), st.booleans(), st.integers(-3, 300), st.integers(), st.floats(), st.sampled_from(WORDS),
        st.text(max_size=9), st.dates(), st.binary(max_size=4), st.sampled_from(in_use),
    )  # fmt: skip
    return st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(st.text(max_size=9) | leaves.filter(_is_key), inner, max_size=4)
        ),
        max_leaves=8,
    )


def _is_key(value: Any) -> bool:
    return not isinstance(value, dict | list)


def _files() -> st.SearchStrategy[bytes]:
    """Packaged recipes with sections or values replaced, and what is no recipe."""
    known = sorted(set(keys(Config)))

    def changed(name: str, changes: dict[str, Any]) -> bytes:
        content: dict[str, Any] = {"base": name}
        for key, value in changes.items():
            *above, last = key.split(".")
            section = content
            for part in above:
                inner = section.get(part)
                section[part] = section = dict(inner) if isinstance(inner, dict) else {}
            section[last] = value
        return _as_yaml(content).encode(errors="surrogateescape")

    some = st.lists(_in_use() | st.tuples(st.sampled_from(known), _values()), max_size=3).map(dict)
    whole = st.builds(changed, st.sampled_from(recipe_names()), some)
    rest = st.one_of(st.sampled_from(WORDS), _values().map(_as_yaml))
    none = rest.map(lambda text: text.encode(errors="surrogateescape")) | st.binary(max_size=20)
    return st.integers(0, 9).flatmap(lambda n: whole if n < 7 else none)


def _as_yaml(value: Any) -> str:
    return yaml.dump(value, default_flow_style=True, allow_unicode=True, width=10**6)


def recipes(count: int, seed: int) -> Iterator[bool]:
    """For each of `count` recipes: whether it was taken or refused in words. The least case that hypothesis
    finds for the first that was not is printed."""
    outcomes: list[bool] = []
    often = hypothesis.settings(
        max_examples=count, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
    )

    @hypothesis.seed(seed)
    @hypothesis.settings(often, phases=[hypothesis.Phase.generate])
    @hypothesis.given(cases())
    def each(case: Case) -> None:
        outcomes.append(fault(case) is None)

    each()
    if not all(outcomes):
        least = hypothesis.find(
            cases(), lambda case: fault(case) is not None, settings=often, random=random.Random(seed)
        )
        print(f"\n{least!r}\n{fault(least)}", file=sys.stderr)
    yield from outcomes


def fault(case: Case) -> str | None:
    """What is wrong with how a recipe was received, or None: it was taken, and what a run would keep of it
    reads back as the same; or a command refused it with exit code 2, and said why."""
    recipe, overrides = case
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(recipe, bytes):
            path = Path(folder) / "recipe.yaml"
            path.write_bytes(recipe)
            recipe = str(path)
        try:
            config = _taken(recipe, overrides)
            if config is not None:
                _use(config, Path(folder) / "kept.yaml")
            shown = config is None or config.epochs <= SHOWN
            code, said = _answer(["schedule", recipe, *overrides]) if shown else (0, "")
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    if code == 0 or (code == 2 and "error:" in said and len(said) < LONGEST):
        return None
    return f"exit code {code}, and {len(said)} characters: {said[:300]}"


def _taken(recipe: str, overrides: list[str]) -> Config | None:
    try:
        return load_config(recipe, overrides)
    except UserError:
        return None


def _answer(arguments: list[str]) -> tuple[int, str]:
    """The exit code of `acdc ...`, and what it said of errors."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", errors) for errors in ("strict", "backslashreplace"))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(arguments)
        except SystemExit as end:  # of argparse
            code = int(end.code or 0)
    err.flush()
    return code, err.buffer.getvalue().decode()


def _use(config: Config, file: Path) -> None:
    file.write_text(dump_recipe(config.model_dump(mode="json")), encoding="utf-8")
    assert parse(Config, read_yaml(file), "kept") == config
    phases = config.sparsity.build_schedule()
    for epoch in (0, config.epochs - 1):
        phases.phase_at(epoch)
        rate = learning_rate(
            config.lr, config.optimizer.lr, epoch, config.epochs, 0, config.steps_per_epoch or 9
        )
        assert 0 <= rate < float("inf")
