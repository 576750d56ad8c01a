"""Which runs belong to which table. All recipes but the quickstart are in configs/fashion_mnist/.

Seeds count from 1 in tables that count, and from FIRST_TUNING_SEED in `tuning`, whose runs are also evaluated
on held-out training images: what was chosen by it was not chosen by the figures that are published.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from sparsity.schedule import PhaseSchedule
from trainer.config.load import load_config
from trainer.config.schema import Config

FIRST_TUNING_SEED = 101
ACDC = "dense 4, sparse 2, dense 2, sparse 2, dense 4, sparse 6"  # of the recipe fashion_mnist/acdc
NOT_FINE_TUNED = "finetune_dense=false"  # the sparse model is the same


@dataclass(frozen=True)
class Row:
    """One method, over seeds. name: of its records. images: which of the training images, see
    benchmarks.accuracy.images. after: the row of the same table whose dense network it starts from.
    same_as: the row of the main table whose recipe it has, and so its runs and records."""

    name: str
    title: str
    recipe: str
    overrides: tuple[str, ...] = ()
    seeds: int = 3
    images: str = "all"
    after: str | None = None
    same_as: str | None = None

    def config(self) -> Config:
        """Without what only a run knows: its folder, and whose weights it starts from."""
        weights = ("model.weights=FILE",) if self.after else ()
        return load_config(self.recipe_name, [*self.overrides, *weights])

    @property
    def recipe_name(self) -> str:
        """As `acdc train` takes it."""
        return self.recipe if self.recipe == "quickstart" else f"fashion_mnist/{self.recipe}"


def _target(percent: int) -> str:
    return f"sparsity.target={percent / 100}"


def _epochs(epochs: int, schedule: str) -> tuple[str, ...]:
    return f"epochs={epochs}", f"sparsity.schedule={PhaseSchedule.parse(schedule).scaled(epochs)}"


def _main() -> tuple[Row, ...]:
    rows = [Row("dense", "dense", "dense", seeds=5)]
    for percent, seeds in ((80, 3), (90, 5), (95, 5), (98, 3)):
        rows.append(Row(f"acdc_{percent}", f"AC/DC {percent} %", "acdc", (_target(percent),), seeds))
    uniform = (_target(90), "sparsity.pattern=uniform")
    rows.append(Row("acdc_uniform_90", "AC/DC uniform 90 %", "acdc", uniform, 5))
    for pattern, name in (("2:4", "2_4"), ("2:4 transposable", "2_4_transposable")):
        chosen = (f"sparsity.pattern={pattern}", "sparsity.target=null")
        rows.append(Row(f"acdc_{name}", f"AC/DC {pattern}", "acdc", chosen))
    rows.append(Row("dense_12", "dense, 12 epochs", "dense", _epochs(12, "dense 12"), 5))
    for percent in (90, 95):
        target = (_target(percent),)
        rows += [
            Row(f"gmp_{percent}", f"GMP {percent} %", "gmp", target, 5),
            Row(f"one_shot_{percent}", f"one-shot {percent} %", "one_shot", target, 5, after="dense_12"),
            Row(f"set_{percent}", f"SET {percent} %", "set", target, 5),
            Row(f"random_{percent}", f"random mask {percent} %", "random", target, 5),
        ]
    return tuple(rows)


def _memorisation() -> tuple[Row, ...]:
    return tuple(
        Row(f"memorisation_{percent}", f"{percent} %", "memorisation", (_target(percent),), 1, "first_10000")
        for percent in (50, 75, 90, 95)
    )


def _compute() -> tuple[Row, ...]:
    """Dense training and AC/DC at 90 % over epochs: what they reach for as many FLOPs, and as many hours."""
    rows = []
    for recipe, title, same_as in (("dense", "dense", "dense"), ("acdc", "AC/DC 90 %", "acdc_90")):
        schedule = "dense 20" if recipe == "dense" else ACDC
        for epochs in (10, 15, 20, 30):
            row = Row(f"{recipe}_{epochs}_epochs", f"{title}, {epochs} epochs", recipe)
            changes = (*_epochs(epochs, schedule), NOT_FINE_TUNED)
            rows.append(replace(row, same_as=same_as) if epochs == 20 else replace(row, overrides=changes))
    return tuple(rows)


def _ablations() -> tuple[Row, ...]:
    phases = {
        "short_phases": ("phases of one epoch", "dense 4, (sparse 1, dense 1) x4, dense 2, sparse 6"),
        "long_phases": ("one sparse phase of 4 epochs in between", "dense 6, sparse 4, dense 4, sparse 6"),
        "no_warm_up": ("no dense warm-up", "(sparse 2, dense 2) x2, sparse 2, dense 4, sparse 6"),
        "long_warm_up": ("dense warm-up of 8 epochs", "dense 8, sparse 2, dense 4, sparse 6"),
        "short_end": ("last phase of 3 epochs", "dense 4, (sparse 2, dense 2) x3, dense 1, sparse 3"),
        "long_end": ("last phase of 9 epochs", "dense 4, sparse 2, dense 2, sparse 2, dense 1, sparse 9"),
    }
    settings = {
        "momentum_kept": ("momentum kept at decompressions", "sparsity.reset_momentum=false"),
        "batch_norm": ("BatchNorm statistics recomputed", "sparsity.recompute_batch_norm=1ep"),
        "ends_dense": ("first and last layer dense", 'sparsity.exclude=["conv1", "fc"]'),
        "ema": ("EMA of weights, 0.999", "ema={decay: 0.999}"),
        "crops": ("images cropped, too", "data.crop_padding=2"),
    }
    changes = {name: (title, f"sparsity.schedule={text}") for name, (title, text) in phases.items()}
    rows = [
        Row(name, title, "acdc", (change, NOT_FINE_TUNED))
        for name, (title, change) in {**settings, **changes}.items()
    ]
    dense = Row("dense_crops", "dense, images cropped, too", "dense", ("data.crop_padding=2",))
    return (Row("as_it_is", "AC/DC 90 % as it is", "acdc", same_as="acdc_90"), *rows, dense)


def _tuning() -> tuple[Row, ...]:
    """What was tried, in the order of time. Schedules are those of AC/DC."""
    schedules = {
        "": "dense 2, (sparse 1, dense 1) x6, sparse 1, dense 2, sparse 3",
        "long_end": "dense 2, (sparse 1, dense 1) x4, sparse 1, dense 3, sparse 6",
        "three_phases": ACDC,
        "two_phases": "dense 6, sparse 4, dense 4, sparse 6",
    }
    networks = {"16": (16, 2), "32": (32, 2), "48": (48, 4)}  # by width: and stride of the stem
    rows = []

    def add(
        recipe: str,
        width: str,
        name: str = "",
        *changes: str,
        schedule: str = "three_phases",
        after: str | None = None,
    ) -> None:
        channels, stride = networks[width]
        network = (f"model.arguments.width={channels}", f"model.arguments.stem_stride={stride}")
        phases = (f"sparsity.schedule={schedules[schedule]}",) if recipe == "acdc" else ()
        row = "_".join(filter(None, (recipe, f"width_{width}", name.replace(" ", "_"))))
        title = ", ".join(filter(None, (recipe, f"width {width}", name.replace("_", " "))))
        rows.append(Row(row, title, recipe, (*network, *phases, *changes), 1, "held_out", after))

    crops = "data.crop_padding=2"
    for recipe, lr in (("dense", 0.05), ("dense", 0.1), ("acdc", 0.05), ("acdc", 0.1)):
        add(recipe, "16", f"lr {lr}", f"optimizer.lr={lr}", crops, schedule="")
    for recipe, rates in {"dense": (0.05, 0.1), "acdc": (0.1, 0.2), "gmp": (0.1,), "set": (0.1,)}.items():
        for lr in rates:
            add(recipe, "32", f"lr {lr}", f"optimizer.lr={lr}", crops, schedule="")
    for schedule in ("long_end", "three_phases", "two_phases"):
        add("acdc", "32", schedule, crops, schedule=schedule)
    for recipe in ("dense", "acdc", "gmp"):
        add(recipe, "48", "", crops)
    add("acdc", "48", "batch 64", crops, "data.batch_size=64", "optimizer.lr=0.05")
    for recipe in ("dense", "acdc"):
        add(recipe, "48", "no crop", "data.crop_padding=0")
    add("dense", "48", "12 epochs", "data.crop_padding=0", *_epochs(12, "dense 12"))
    for rate in (0.02, 0.05, 0.1):
        changes = ("data.crop_padding=0", f"optimizer.lr={rate}")
        add("one_shot", "48", f"lr {rate}", *changes, after="dense_width_48_12_epochs")
    return tuple(rows)


def _quickstart() -> tuple[Row, ...]:
    """Precision and sparse kernels of CPUs change how fast it is, and its figures by rounding alone."""
    return tuple(
        Row(
            f"{precision}_{name}",
            f"{precision}, {title}",
            "quickstart",
            (f"engine.precision={precision}", f"sparsity.accelerate={accelerate}"),
            images="bundled",
        )
        for precision in ("fp32", "bf16")
        for name, title, accelerate in (("masked", "masked", "off"), ("kernels", "sparse kernels", "require"))
    )


TABLES = {
    "main": _main(),
    "memorisation": _memorisation(),
    "compute": _compute(),
    "ablations": _ablations(),
    "quickstart": _quickstart(),
    "tuning": _tuning(),
}
