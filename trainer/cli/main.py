"""The `acdc` command: its subcommands and their arguments."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from trainer.cli import commands, data_commands, doctor, predict
from trainer.cli.schedule import schedule
from trainer.errors import exit_code_of
from trainer.monitor.terminal import lasting_output


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


_positive.__name__ = "number of 1 or more"  # what argparse says was expected


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="acdc", description="AC/DC training: one run, a sparse model and its dense twin."
    )
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function: Any, among: Any = None) -> argparse.ArgumentParser:
        summary = function.__doc__.splitlines()[0]
        sub = (among or subparsers).add_parser(name, help=summary, description=summary)
        sub.set_defaults(function=function)
        return sub

    for name, function in (("train", commands.train), ("schedule", schedule)):
        sub = command(name, function)
        sub.add_argument("config", metavar="CONFIG", help="a recipe's name under configs/, or a path")
        sub.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. optimizer.lr=0.05")
        if function is schedule:
            cost = "measure a few steps, dense and sparse: FLOPs and time, against dense training"
            sub.add_argument("--cost", action="store_true", help=cost)
        if function is commands.train:
            devices = "processes on this machine; default: all GPUs"
            sub.add_argument("--devices", type=int, metavar="N", help=devices)
            hosts = "machines to train on, by ssh and pdsh: lines HOST slots=PROCESSES"
            sub.add_argument("--hostfile", metavar="FILE", help=hosts)
            again = "how often to go on from the newest checkpoint when a process died; default: 0"
            sub.add_argument("--max-restarts", type=_positive, metavar="N", help=again)
            dry = "show what would be trained, on which data and layers, and end"
            sub.add_argument("--dry-run", action="store_true", help=dry)
    sub = command("eval", commands.evaluate)
    sub.add_argument("path", metavar="PATH", help="a run folder, or a checkpoint folder in it")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. data.root=/data/fashion-mnist")
    sub.add_argument("--fast", action="store_true", help="on a CPU: by sparse kernels where they are faster")
    sub = command("predict", predict.predict)
    sub.add_argument("path", metavar="RUN", help="a run folder, or a checkpoint folder in it")
    sub.add_argument("images", nargs="+", metavar="IMAGE", help="files of images, of any size")
    sub = command("import", commands.import_original)
    sub.add_argument("file", metavar="FILE", help="a checkpoint (.ckpt) or a recipe (.yaml)")
    sub.add_argument("--arch", help="a name of trainer.models; default: what the file says")
    sub.add_argument("--out", metavar="PATH", help="default: beside the file")
    sub.add_argument("--dataset", help="of a recipe; default: by its network")
    sub.add_argument("--epochs", type=_positive, metavar="N", help="of a recipe; default: what the file says")
    batch_size = "of a recipe; default: 256, as in the paper's command"
    sub.add_argument("--batch-size", type=_positive, metavar="N", help=batch_size)
    sub = command("export", commands.export)
    path = "a run folder (its sparse model), or a checkpoint folder in it"
    sub.add_argument("path", metavar="PATH", help=path)
    sub.add_argument(
        "--format", choices=["onnx", "safetensors", "sparse", "sparse24", "torch"], default="onnx"
    )
    sub.add_argument("--out", metavar="FILE", help="default: named after the model, in the current folder")
    prepare = subparsers.add_parser("prepare", help="Store a data set in another form.")
    kinds = prepare.add_subparsers(required=True, metavar="WHAT")
    sub = command("fashion-mnist", data_commands.prepare_fashion_mnist, kinds)
    sub.add_argument("source", nargs="?", metavar="FOLDER", help="with the four idx files; default: Debian's")
    sub = command("shards", data_commands.prepare_shards, kinds)
    sub.add_argument("source", metavar="SRC", help="a folder with train/CLASS/*.JPEG and val")
    sub.add_argument("destination", metavar="DST", help="an empty folder, or one of an interrupted call")
    sub.add_argument("--split", choices=["train", "val", "both"], default="both")
    sub.add_argument("--shard-mb", type=_positive, default=256, metavar="MB", help="of a tar; default: 256")
    sub.add_argument("--seed", type=int, default=0, help="of the order of the images; default: 0")
    sub.add_argument("--val-labels", type=Path, metavar="FILE", help="label file of a flat val folder")
    sub.add_argument("--workers", type=_positive, metavar="N", help="processes; default: one a core")
    sub = command("verify-data", data_commands.verify_data)
    sub.add_argument("root", metavar="ROOT", help="a folder with train/CLASS/*.JPEG and val")
    sub.add_argument("--exclude", action="store_true", help="list bad files in ROOT/excluded.txt")
    sub.add_argument("--manifest", metavar="FILE", help="SHA-256 sums that the files must have")
    sub.add_argument("--write-manifest", metavar="FILE", help="write such sums once all is well")
    sub.add_argument("--workers", type=_positive, metavar="N", help="processes; default: one a core")
    sub = command("report", commands.report)
    sub.add_argument("runs", nargs="+", metavar="RUN", help="a run folder; several come onto one page")
    sub.add_argument("--picture", metavar="FILE", help="write the accuracy curve there instead (.svg, .png)")
    sub.add_argument("--out", default="runs.html", metavar="FILE", help="of several; default: runs.html")
    sub = command("board", commands.board)
    sub.add_argument("runs", nargs="?", default="runs", metavar="RUNS", help="a folder; default: runs")
    sub.add_argument("--port", type=_positive, default=6006, metavar="N", help="default: 6006")
    sub = command("bench", commands.bench)
    sub.add_argument("benchmark", choices=sorted(commands.BENCHMARKS), metavar="NAME", help="see below")
    sub.formatter_class = argparse.RawDescriptionHelpFormatter
    sub.epilog = "\n".join(f"{name:16} {about}" for name, (_, about) in sorted(commands.BENCHMARKS.items()))
    sub.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="its own; --help lists them")
    command("doctor", doctor.doctor)
    return parser


def _hint(options: argparse.Namespace, rest: list[str]) -> str:
    if not hasattr(options, "overrides"):
        return ""
    from trainer.config.mistakes import meant_by_options

    return f"; keys of a recipe have no dashes: write {meant_by_options(rest)}"


def main(arguments: list[str] | None = None) -> int:
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and (not hasattr(options, "overrides") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}{_hint(options, rest)}")
    if rest:
        options.overrides = [*options.overrides, *rest]  # overrides may follow options
    with lasting_output():
        return exit_code_of(lambda: options.function(options))


if __name__ == "__main__":
    sys.exit(main())
