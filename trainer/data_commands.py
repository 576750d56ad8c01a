"""What the subcommands of `acdc` do with data: a thin function each."""

from __future__ import annotations

import argparse
from pathlib import Path

from trainer.errors import as_user_error


def prepare(options: argparse.Namespace) -> int:
    """Store a data set where training finds it."""
    from data import fashion_mnist
    from data.places import data_home

    source = None if options.source is None else Path(options.source).expanduser()
    with as_user_error("prepare fashion-mnist"):
        print(f"stored in {fashion_mnist.prepare(source, data_home())}")
    return 0
