"""What the subcommands of `acdc` do with data: a thin function each."""

from __future__ import annotations

import argparse
import os

from trainer.errors import as_user_error
from trainer.paths import user_path


def prepare_fashion_mnist(options: argparse.Namespace) -> int:
    """Store the full Fashion-MNIST, from its four idx files, where training finds it."""
    from data.datasets import fashion_mnist
    from data.places import data_home

    source = None if options.source is None else user_path(options.source)
    with as_user_error("prepare fashion-mnist"):
        print(f"stored in {fashion_mnist.prepare(source, data_home())}")
    return 0


def prepare_shards(options: argparse.Namespace) -> int:
    """Pack a tree of image files into WebDataset tars, with an index and SHA-256 of every image."""
    from data.images.files import FOLDERS, load_image_files
    from data.images.shards import write_shards
    from trainer.cli.progress import progress

    source, destination = user_path(options.source), user_path(options.destination)
    with as_user_error("prepare shards"):
        for split, folder in FOLDERS.items():
            if options.split not in (folder, "both"):
                continue
            files = load_image_files(source, "train" if split == "train" else "test", options.val_labels)
            with progress(f"{folder}, images") as on_progress:
                shards = write_shards(
                    files,
                    destination / folder,
                    shard_bytes=options.shard_mb * 10**6,
                    seed=options.seed,
                    workers=_workers(options.workers),
                    on_progress=on_progress,
                )
            left_out = f", {files.num_excluded} excluded" if files.num_excluded else ""
            counts = f"{shards.num_samples:,} images in {len(shards.tars)} shards"
            print(f"{destination / folder}: {counts}{left_out}")
    print(f"train with data.root={destination} data.format=webdataset")
    return 0


def verify_data(options: argparse.Namespace) -> int:
    """Decode every image below ROOT and report the damaged ones; exit code 2 if some are not excluded."""
    from data.checks.verify import make_manifest, read_manifest, verify, write_exclusions, write_manifest
    from data.images.files import EXCLUSIONS, read_exclusions
    from trainer.cli.progress import progress

    root, workers = user_path(options.root), _workers(options.workers)
    with as_user_error("verify-data"):
        manifest = None if options.manifest is None else read_manifest(user_path(options.manifest))
        with progress("decoding") as on_progress:
            problems = verify(root, manifest=manifest, workers=workers, on_progress=on_progress)
        for problem in problems:
            print(f"{problem.kind:10}  {problem.file}  {problem.detail}")
        if options.exclude:
            write_exclusions(root / EXCLUSIONS, problems)
        excluded = read_exclusions(root / EXCLUSIONS)
        open_ones = [p for p in problems if not p.warning and p.file not in excluded]
        bad, warnings = sum(not p.warning for p in problems), sum(p.warning for p in problems)
        listed = f"{bad - len(open_ones)} of the bad ones are excluded by {root / EXCLUSIONS}"
        print(f"{bad} bad files, {warnings} odd ones that decode" + (f"; {listed}" if bad else ""))
        if options.write_manifest is not None:
            if open_ones:
                raise ValueError("no manifest written: it would vouch for bad files; use --exclude first")
            with progress("SHA-256") as on_progress:
                sums = make_manifest(root, workers, on_progress)
            write_manifest(user_path(options.write_manifest), sums)
            print(f"SHA-256 of {len(sums):,} files in {options.write_manifest}")
    return 2 if open_ones else 0


def _workers(given: int | None) -> int:
    return given or len(os.sched_getaffinity(0))
