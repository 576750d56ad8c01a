"""The `acdc` command: one thin function per subcommand."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from trainer.errors import EnvironmentLacks, Failure, as_user_error


def train(options: argparse.Namespace) -> int:
    """Check the recipe, then hand over to the deepspeed launcher on a free port."""
    from trainer.load import load_config

    load_config(options.config, options.overrides)

    from trainer.launch import launch

    return launch(["trainer.train", options.config, *options.overrides], options.devices)


def evaluate(options: argparse.Namespace) -> int:
    """Accuracy of a saved model, a training checkpoint, or both models of a run folder."""
    import torch
    from rich.console import Console
    from rich.table import Table

    from trainer.classifier import Classifier
    from trainer.engine import precision
    from trainer.evaluate import evaluate as measure
    from trainer.export import load_model
    from trainer.load import parse_eval_config
    from trainer.loaders import build_test_loader
    from trainer.recipes import override
    from trainer.run_dir import DENSE_TWIN, SPARSE

    path = Path(options.path).expanduser()
    pair = [path / "checkpoints" / key for key in (DENSE_TWIN, SPARSE)]
    folders = [folder for folder in pair if folder.is_dir()] or [path]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    table = Table()
    for column in ("model", "top-1 %", "top-5 %", "loss", "images", "zero weights %"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for folder in folders:
        with as_user_error("eval"):
            model, info = load_model(folder)
        content = {key: info["config"][key] for key in ("data", "engine") if key in info["config"]}
        override(content, options.overrides)
        config = parse_eval_config(content, str(folder))
        loader = build_test_loader(config.data, device)
        classifier = Classifier(model, info["model"]["mean"], info["model"]["std"]).to(device)
        dtype = precision(config, device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):  # as in training
            metrics = measure(classifier, loader, device)
        weights = [weight for weight in model.parameters() if weight.dim() > 1]
        zeros = sum(int((weight == 0).sum()) for weight in weights) / sum(
            weight.numel() for weight in weights
        )
        figures = (
            f"{metrics.top1:.2f}",
            f"{metrics.top5:.2f}",
            f"{metrics.loss:.4f}",
            f"{metrics.num_images:,}",
        )
        table.add_row(folder.name, *figures, f"{100 * zeros:.3f}")
    Console().print(table)
    return 0


def import_original(options: argparse.Namespace) -> int:
    """Turn a checkpoint of the paper's implementation into a saved model of ours."""
    from sparsity import measure
    from trainer.export import save_model
    from trainer.originals import describe_original, load_original

    path = Path(options.file).expanduser()
    out = Path(options.out) if options.out else path.with_suffix("")
    with as_user_error("import"):
        if out.exists():
            raise ValueError(f"{out} exists already; name another folder with --out")
        model, masks = load_original(path, options.arch)
        info = describe_original(path, options.arch, model)
        save_model(out, model, info)
    sparsity = measure(model, masks)
    print(f"{info['model']['name']} of epoch {info['epoch']}, {len(masks)} sparse layers")
    if masks:
        print(f"sparsity {100 * sparsity.overall:.4f} % over their {sparsity.num_weights:,} weights")
    print(f"stored in {out}; its accuracy: acdc eval {out} data.root=FOLDER")
    return 0


def prepare(options: argparse.Namespace) -> int:
    """Store a data set where training finds it."""
    from data import fashion_mnist
    from data.places import data_home

    source = None if options.source is None else Path(options.source).expanduser()
    with as_user_error("prepare fashion-mnist"):
        print(f"stored in {fashion_mnist.prepare(source, data_home())}")
    return 0


def schedule(options: argparse.Namespace) -> int:
    """A recipe's phases and learning rates, epoch by epoch, without running anything."""
    from trainer.load import load_config
    from trainer.optim import learning_rate

    config = load_config(options.config, options.overrides)
    phases = config.sparsity.build_schedule()
    print(f"{phases}    {config.sparsity.build_pattern()}")
    for epoch in range(config.epochs):
        phase = phases.phase_at(epoch)
        switch = {"sparse": "compress", "dense": "decompress" if epoch else ""}[phase.kind]
        lr = learning_rate(config.lr, config.optimizer.lr, epoch, config.epochs)
        print(
            f"epoch {epoch:3}  {phase.kind:6}  lr {lr:.6g}  {switch if epoch == phase.start else ''}".rstrip()
        )
    return 0


def report(options: argparse.Namespace) -> int:
    """Draw a run's report.html again, or its accuracy curve as a picture."""
    from trainer.report import write_picture, write_report
    from trainer.run_dir import RunDir

    run_dir = RunDir(Path(options.run).expanduser())
    with as_user_error("report"):
        if options.picture is None:
            write_report(run_dir)
        else:
            write_picture(run_dir, Path(options.picture))
    print(options.picture or run_dir.report)
    return 0


def doctor(options: argparse.Namespace) -> int:
    """What this machine has for training, and what is missing."""
    from trainer.environment import environment

    found = environment()
    for key in ("python", "platform", "cpu", "cpu_cores", "gpus", "cuda"):
        print(f"{key:22} {found[key]}")
    for package, version in found["packages"].items():
        print(f"{package:22} {version or 'missing'}")
    if found["packages"]["torch"] is not None:
        from trainer.engine import missing_for_compilation

        lacking = missing_for_compilation("cuda" if found["gpus"] else "cpu")
        print(f"{'torch.compile':22} {f'lacks {lacking}: models run uncompiled' if lacking else 'works'}")
    if missing := [package for package, version in found["packages"].items() if version is None]:
        raise EnvironmentLacks(f"missing packages: {', '.join(missing)}; pip install {' '.join(missing)}")
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="acdc", description="AC/DC training: one run, a sparse model and its dense twin."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function: Any) -> argparse.ArgumentParser:
        summary = function.__doc__.splitlines()[0]
        sub = commands.add_parser(name, help=summary, description=summary)
        sub.set_defaults(function=function)
        return sub

    for name, function in (("train", train), ("schedule", schedule)):
        sub = command(name, function)
        sub.add_argument("config", metavar="CONFIG", help="a recipe's name under configs/, or a path")
        sub.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. optimizer.lr=0.05")
        if function is train:
            sub.add_argument(
                "--devices", type=int, metavar="N", help="processes on this machine; default: all GPUs"
            )
    sub = command("eval", evaluate)
    sub.add_argument("path", metavar="PATH", help="a run folder, or a checkpoint folder in it")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. data.root=/data/fashion-mnist")
    sub = command("import", import_original)
    sub.add_argument("file", metavar="FILE", help="a .ckpt file")
    sub.add_argument("--arch", help="a name of trainer.models; default: what the file says")
    sub.add_argument("--out", metavar="FOLDER", help="default: the file's name without .ckpt")
    sub = command("prepare", prepare)
    sub.add_argument("dataset", choices=["fashion-mnist"])
    sub.add_argument("source", nargs="?", metavar="FOLDER", help="with the four idx files; default: Debian's")
    sub = command("report", report)
    sub.add_argument("run", metavar="RUN", help="a run folder")
    sub.add_argument("--picture", metavar="FILE", help="write the accuracy curve there instead (.svg, .png)")
    command("doctor", doctor)
    return parser


def main(arguments: list[str] | None = None) -> int:
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and (not hasattr(options, "overrides") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides = [*options.overrides, *rest]  # overrides may follow options
    try:
        return options.function(options)
    except Failure as failure:
        print(f"error: {failure}", file=sys.stderr)
        return failure.exit_code
    except ModuleNotFoundError as error:
        print(f"error: {error}; make setup installs what is needed, acdc doctor lists it", file=sys.stderr)
        return EnvironmentLacks.exit_code


if __name__ == "__main__":
    sys.exit(main())
