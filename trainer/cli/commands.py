"""What the subcommands of `acdc` do with models and recipes: a thin function each.

Imports are within the functions, so that a typing error is reported before torch is loaded.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from trainer.distributed.slurm import num_tasks
from trainer.errors import UserError, as_user_error
from trainer.monitor.terminal import announce
from trainer.paths import user_path


def train(options: argparse.Namespace) -> int:
    """Check the recipe, then hand over to the deepspeed launcher on a free port.

    A task of several that srun started becomes a rank itself.
    """
    if os.environ.get("SLURM_PROCID", "0") == "0":
        announce("loading", "PyTorch")
    from trainer.config.load import load_config

    config = load_config(options.config, options.overrides)
    if options.dry_run:
        announce("loading", "DeepSpeed and DALI")
        from trainer.cli.dry_run import dry_run

        return dry_run(config)
    if options.hostfile is not None and options.devices is not None:
        raise UserError("--hostfile and --devices: the file's slots say how many processes a machine has")
    if (tasks := num_tasks()) > 1:
        _check_task(options, tasks)
        arguments = ["-m", "trainer.train", options.config, *options.overrides]
        os.execv(sys.executable, [sys.executable, *arguments])

    import torch

    from data.stream import check_batch
    from trainer.cli.hosts import read_hosts
    from trainer.cli.launch import Launcher, count_devices, launch
    from trainer.cli.restarts import Restarts
    from trainer.engine import check_precision

    hostfile = options.hostfile and str(user_path(options.hostfile))
    hosts = read_hosts(hostfile) if hostfile else {}
    devices = sum(hosts.values()) or count_devices(options.devices)
    given = "--hostfile" if hosts else f"--devices {devices}" if options.devices else "data"
    with as_user_error(given):
        check_batch(config.data.batch_size, devices, config.engine.accumulation_steps)
    if not torch.cuda.is_available() and not hosts:  # a run asks its GPU itself: here that would keep memory
        check_precision(config.engine, torch.device("cpu"))
    launcher = Launcher.on_hosts(hostfile, hosts) if hosts else Launcher.here(devices)
    run_root = user_path(config.run_root)
    where = f" on {len(hosts)} machines" if hosts else ""
    announce("starting", f"the deepspeed launcher, for {devices} process{'es' * (devices > 1)}{where}")
    return launch(launcher, Restarts(options.config, options.overrides, run_root, options.max_restarts or 0))


def _check_task(options: argparse.Namespace, tasks: int) -> None:
    """Raise UserError for options that start processes, where srun has."""
    for name in ("devices", "hostfile", "max_restarts"):
        if (value := getattr(options, name)) is not None:
            option = f"--{name.replace('_', '-')}"
            raise UserError(
                f"{option} {value}: srun has started {tasks} processes, which are this run's; leave {option} "
                "out, or let srun start one, by --ntasks=1"
            )


def evaluate(options: argparse.Namespace) -> int:
    """Accuracy of a saved model, a training checkpoint, or both models of a run folder."""
    import torch
    from rich.console import Console
    from rich.table import Table

    from sparsity.inference import accelerated
    from trainer.checkpoints.run_dir import DENSE_TWIN, EMA, SPARSE
    from trainer.checkpoints.saved_model import load_model
    from trainer.config.load import parse
    from trainer.config.recipes import override
    from trainer.config.schema import EvalConfig
    from trainer.engine import autocast, check_precision, precision_name, set_up_gpu
    from trainer.evaluate import evaluate as measure
    from trainer.loaders import build_test_loader
    from trainer.models.classifier import Classifier

    path = user_path(options.path)
    kept = (DENSE_TWIN, SPARSE, DENSE_TWIN + EMA, SPARSE + EMA)
    pair = [path / "checkpoints" / key for key in kept]
    folders = [folder for folder in pair if folder.is_dir()] or [path]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    table = Table()
    for column in ("model", "top-1 %", "top-5 %", "loss", "images", "zero weights %", "precision"):
        table.add_column(column, justify="left" if column in ("model", "precision") else "right")
    for folder in folders:
        with as_user_error("eval"):
            model, info = load_model(folder)
        content = {key: info["config"][key] for key in ("data", "engine") if key in info["config"]}
        override(content, options.overrides)
        config = parse(EvalConfig, content, str(folder))
        check_precision(config.engine, device)
        set_up_gpu(config.engine, device)
        loader = build_test_loader(config.data, device)
        classifier = Classifier(model, info["model"]["mean"], info["model"]["std"]).to(device)
        weights = torch.cat([weight.flatten() for weight in model.parameters() if weight.dim() > 1])
        zeros = f"{100 * int((weights == 0).sum()) / len(weights):.3f}"
        with autocast(config, device), as_user_error("eval"):
            if options.fast:
                if device.type != "cpu":
                    raise ValueError("--fast: sparse kernels run on a CPU; this machine has a GPU")
                example = torch.randn(config.data.eval_batch_size, *info["model"]["input_shape"])
                classifier.model = accelerated(model, example)
            metrics = measure(classifier, loader, device)
        accuracy = (f"{share:.2f}" for share in (metrics.top1, metrics.top5))
        figures = (*accuracy, f"{metrics.loss:.4f}", f"{metrics.num_images:,}", zeros)
        table.add_row(folder.name, *figures, precision_name(config, device))
    Console().print(table)
    return 0


def import_original(options: argparse.Namespace) -> int:
    """Turn a checkpoint or a recipe of the paper's implementation into one of ours."""
    path = user_path(options.file)
    is_recipe = path.suffix in (".yaml", ".yml")
    default = path.with_suffix(".acdc.yaml") if is_recipe else path.with_suffix("")
    out = user_path(options.out) if options.out else default
    with as_user_error("import"):
        if out.exists():
            raise ValueError(f"{out} exists already; name another with --out")
        if is_recipe:
            return _import_recipe(path, out, options)
        return _import_checkpoint(path, out, options.arch)


def _import_recipe(path: Path, out: Path, options: argparse.Namespace) -> int:
    from data.atomic import write_text
    from trainer.config.load import load_config, parse
    from trainer.config.schema import Config
    from trainer.originals.recipes import Command, import_config, recipe_text

    command = Command(options.arch, options.dataset, options.epochs, options.batch_size)
    recipe = import_config(path, command)
    parse(Config, {"name": out.name.partition(".")[0], **recipe}, str(path))
    write_text(out, recipe_text(recipe, path.name))
    config = load_config(str(out))
    data = f"{config.data.name}, batches of {config.data.batch_size}"
    print(f"{config.model.name} on {data}, {config.epochs} epochs")
    print(f"{config.sparsity.build_schedule()}    {config.sparsity.build_pattern(config.seed)}")
    print(f"stored in {out}; look at it epoch by epoch: acdc schedule {out}")
    return 0


def _import_checkpoint(path: Path, out: Path, arch: str | None) -> int:
    from sparsity import measure
    from trainer.checkpoints.saved_model import save_model
    from trainer.originals.checkpoints import describe_original, load_original

    model, masks = load_original(path, arch)
    info = describe_original(path, arch, model)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_model(out, model, info)
    sparsity = measure(model, masks)
    print(f"{info['model']['name']} of epoch {info['epoch']}, {len(masks)} sparse layers")
    if masks:
        print(f"sparsity {100 * sparsity.overall:.4f} % over their {sparsity.num_weights:,} weights")
    print(f"stored in {out}; its accuracy: acdc eval {out} data.root=FOLDER")
    return 0


def export(options: argparse.Namespace) -> int:
    """Write a saved model as ONNX, safetensors, packed 2:4 or a torch state_dict."""
    from trainer.checkpoints.saved_model import find_model, load_model
    from trainer.export.formats import FORMATS, export_model

    path = user_path(options.path)
    with as_user_error("export"):
        folder = find_model(path)
        default = folder.resolve().name + FORMATS[options.format][1]
        out = user_path(options.out or default)
        model, info = load_model(folder)
        export_model(options.format, model, info, out)
    print(f"{folder} stored in {out}")
    return 0


def report(options: argparse.Namespace) -> int:
    """Draw a run's report.html again, its accuracy curve as a picture, or several runs on one page."""
    from trainer.checkpoints.run_dir import RunDir
    from trainer.report.compare import write_comparison
    from trainer.report.picture import write_picture
    from trainer.report.run import write_report

    runs = [RunDir(user_path(run)) for run in options.runs]
    made = Path(options.picture or options.out)
    with as_user_error("report"):
        if options.picture is not None:
            if len(runs) > 1:
                raise UserError("--picture draws one run; leave it out to see several on one page")
            write_picture(runs[0], made)
        elif len(runs) > 1:
            write_comparison(runs, made)
        else:
            write_report(runs[0])
            made = runs[0].report
    print(made)
    return 0


def board(options: argparse.Namespace) -> int:
    """Open TensorBoard on the runs of a folder, without smoothing, which would turn phases into ramps."""
    folder = user_path(options.runs)
    if not next(folder.glob("**/events.out.tfevents.*"), None):
        raise UserError(f"board: no run under {folder} has records for TensorBoard")
    port = str(options.port)
    unsmoothed = "?smoothing=0#custom_scalars&_smoothingWeight=0"  # this page has a smoothing of its own
    print(f"http://localhost:{port}/{unsmoothed}   (Ctrl-C ends it)", flush=True)
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--port", port]
    with suppress(KeyboardInterrupt):
        return subprocess.run(command, check=False).returncode
    return 0


BENCHMARKS = {  # name: (module, what it measures)
    "accuracy": ("benchmarks.accuracy", "what methods of sparse training reach, over seeds"),
    "compare": ("benchmarks.compare", "two records of one benchmark: what became slower"),
    "compilation": ("benchmarks.compilation", "what compiling costs, cold and cached"),
    "data": ("benchmarks.data_pipeline", "how fast image files become batches"),
    "host_memory": ("benchmarks.host_memory", "what kept memory saves a step on a CPU"),
    "infer": ("benchmarks.inference", "saved sparse models against torch and ONNX Runtime"),
    "kernels24": ("benchmarks.kernels24", "2:4 products on a GPU, by layer shape"),
    "overhead": ("benchmarks.overhead", "what masks cost a step against stock layers"),
    "peers": ("benchmarks.peers", "a step against other people's training loops"),
    "phase_switch": ("benchmarks.phase_switch", "compressing and decompressing, graphs over phases"),
    "sparse_kernels": ("benchmarks.sparse_kernels", "sparse products on a CPU, by layer shape"),
    "sparse_step": ("benchmarks.sparse_step", "a sparse phase's step against a dense one's, on a CPU"),
    "throughput": ("benchmarks.throughput", "training images per second, from files and on noise"),
    "variants": ("benchmarks.variants", "what settings gain a step"),
}


def bench(options: argparse.Namespace) -> int:
    """Run a benchmark: a table on the screen, a JSON record beside it."""
    name, _ = BENCHMARKS[options.benchmark]
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as in trainer.train
    return subprocess.run([sys.executable, "-m", name, *options.arguments], check=False).returncode
