"""Which runs belong to which table. All recipes but the quickstart are in configs/fashion_mnist/.

Seeds count from 1 in tables that count, and from FIRST_TUNING_SEED in `tuning`, whose runs are also evaluated
on held-out training images: what was chosen by it was not chosen by the figures that are published.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsity.schedule import PhaseSchedule
from trainer.config.load import load_config
from trainer.config.schema import Config

FIRST_TUNING_SEED = 101
ACDC = "dense 2, (sparse 1, dense 1) x6, sparse 1, dense 2, sparse 3"  # of the recipe fashion_mnist/acdc


@dataclass(frozen=True)
class Row:
    """One method, over seeds. name: of its records. images: which of the training images, see
    benchmarks.accuracy.images. after: the row of the same table whose dense network it starts from."""

    name: str
    title: str
    recipe: str
    overrides: tuple[str, ...] = ()
    seeds: int = 3
    images: str = "all"
    after: str | None = None

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
    return tuple(
        Row(f"{name}_{epochs}_epochs", f"{title}, {epochs} epochs", name, _epochs(epochs, schedule))
        for name, title, schedule in (("dense", "dense", "dense 20"), ("acdc", "AC/DC 90 %", ACDC))
        for epochs in (10, 15, 20, 30)
    )


def _ablations() -> tuple[Row, ...]:
    phases = {
        "long_phases": ("phases twice as long", "dense 2, (sparse 2, dense 2) x3, dense 3, sparse 3"),
        "few_phases": ("one sparse phase in between", "dense 8, sparse 2, dense 7, sparse 3"),
        "no_warm_up": ("no dense warm-up", "(sparse 1, dense 1) x7, dense 3, sparse 3"),
        "long_warm_up": ("dense warm-up of 6 epochs", "dense 6, (sparse 1, dense 1) x4, dense 3, sparse 3"),
        "short_end": ("last phase of 1 epoch", "dense 2, (sparse 1, dense 1) x7, dense 3, sparse 1"),
        "long_end": ("last phase of 6 epochs", "dense 2, (sparse 1, dense 1) x5, dense 2, sparse 6"),
    }
    settings = {
        "momentum_kept": ("momentum kept at decompressions", "sparsity.reset_momentum=false"),
        "batch_norm": ("BatchNorm statistics recomputed", "sparsity.recompute_batch_norm=1ep"),
        "ends_dense": ("first and last layer dense", 'sparsity.exclude=["conv1", "fc"]'),
        "ema": ("EMA of weights, 0.999", "ema={decay: 0.999}"),
    }
    changes = {name: (title, f"sparsity.schedule={text}") for name, (title, text) in phases.items()}
    rows = [Row(name, title, "acdc", (change,)) for name, (title, change) in {**settings, **changes}.items()]
    return (Row("as_it_is", "AC/DC 90 % as it is", "acdc"), *rows)


def _tuning() -> tuple[Row, ...]:
    rows = [
        Row(f"{recipe}_lr_{lr}", f"{recipe}, lr {lr}", recipe, (f"optimizer.lr={lr}",), 1, "held_out")
        for recipe in ("dense", "acdc", "gmp", "set")
        for lr in (0.05, 0.1, 0.2)
    ]
    for recipe in ("dense", "acdc"):
        for lr in (0.05, 0.1):
            name, title = f"{recipe}_width_16_lr_{lr}", f"{recipe}, width 16, lr {lr}"
            narrow = (f"optimizer.lr={lr}", "model.arguments.width=16")
            rows.append(Row(name, title, recipe, narrow, 1, "held_out"))
    for name, text in (
        ("long_phases", "dense 2, (sparse 2, dense 2) x3, dense 2, sparse 4"),
        ("long_end", "dense 2, (sparse 1, dense 1) x4, sparse 1, dense 3, sparse 6"),
        ("three_phases", "dense 4, sparse 2, dense 2, sparse 2, dense 4, sparse 6"),
        ("two_phases", "dense 6, sparse 4, dense 4, sparse 6"),
    ):
        phases = (f"sparsity.schedule={text}",)
        rows.append(Row(f"acdc_{name}", f"acdc, {name}", "acdc", phases, 1, "held_out"))
    wide = ("model.arguments.width=48", "model.arguments.stem_stride=4")
    three_phases = "sparsity.schedule=dense 4, sparse 2, dense 2, sparse 2, dense 4, sparse 6"
    for recipe in ("dense", "gmp", "acdc"):
        chosen = (*wide, three_phases) if recipe == "acdc" else wide
        rows.append(Row(f"{recipe}_width_48", f"{recipe}, width 48", recipe, chosen, 1, "held_out"))
        rows.append(
            Row(
                f"{recipe}_width_48_no_crop",
                f"{recipe}, width 48, no crops",
                recipe,
                (*chosen, "data.crop_padding=0"),
                1,
                "held_out",
            )
        )
        small = (*chosen, "data.batch_size=64", "optimizer.lr=0.05")
        title = f"{recipe}, width 48, batch 64"
        rows.append(Row(f"{recipe}_width_48_batch_64", title, recipe, small, 1, "held_out"))
    for recipe in ("dense", "acdc", "gmp"):
        decay = ("optimizer.weight_decay=2e-4",)
        rows.append(Row(f"{recipe}_decay_2e-4", f"{recipe}, weight decay 2e-4", recipe, decay, 1, "held_out"))
    rows.append(Row("dense_12", "dense, 12 epochs", "dense", _epochs(12, "dense 12"), 1, "held_out"))
    for lr in (0.02, 0.05, 0.1):
        name, title, change = f"one_shot_lr_{lr}", f"one-shot, lr {lr}", (f"optimizer.lr={lr}",)
        rows.append(Row(name, title, "one_shot", change, 1, "held_out", after="dense_12"))
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
