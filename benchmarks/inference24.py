"""`acdc bench infer` of a 2:4 model: dense against 2:4 kernels with weights compressed once, chosen by layer.

Both are compiled and channels_last, in bf16 on a GPU; they take turns. Every layer's choice is measured and
compared with dense; the whole model's answers are compared, too. Without such kernels the reference runs.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.shared.record import console, show_spread, show_table, spread
from benchmarks.shared.turns import ratios, take_turns
from sparsity import count_flops
from sparsity.kernels.measure import compare
from sparsity.kernels.semi_structured.inference import pack_layers, packable
from sparsity.kernels.semi_structured.operator import ROWS, compress24, matmul24, missing
from trainer.cli.progress import progress
from trainer.errors import UserError
from trainer.export.sparse24_file import packed_share


@torch.no_grad()
def measure(
    model: nn.Module, described: dict[str, Any], device: torch.device, options: argparse.Namespace
) -> dict[str, Any]:
    """Layers chosen, images per second of both, their ratio, and how far answers differ."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    (batch,) = options.batch or [256 if device.type == "cuda" else 32]
    shape = tuple(described["input_shape"])
    dense: Any = model.eval().to(device=device, dtype=dtype)
    dense.to(memory_format=torch.channels_last)
    calls = {
        layer.name: [call.outputs for call in layer.calls]
        for layer in count_flops(model.float(), shape).layers
    }
    dense.to(dtype)
    names = [
        name
        for name in packable(dense)
        if calls.get(name) and not any(rows * batch % ROWS for rows in calls[name])
    ]
    if not names:
        raise UserError("no layer of this model is 2:4; train with sparsity.pattern=2:4 sparsity.target=null")
    layers = dict(dense.named_modules())
    kernels = {name: _layer(layers[name].weight.flatten(1), max(calls[name]) * batch) for name in names}
    chosen = [name for name, kernel in kernels.items() if kernel["right"] and (options.all or kernel["wins"])]
    sparse = copy.deepcopy(dense)
    pack_layers(sparse, chosen, dtype)
    images = torch.randn(batch, *shape, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    expected, found = dense(images).float(), sparse(images).float()
    share = packed_share(model.float().cpu()) if device.type == "cpu" else None
    for network in (dense, sparse):
        network.compile(dynamic=False)
    ways = {"dense": lambda: dense(images), "2:4": lambda: sparse(images)}
    with progress("turns") as on_progress:
        seconds = take_turns(ways, options.turns, options.steps or 5, device, on_progress)
    return {
        "reference": missing(device) is not None,
        "batch": batch,
        "kernels": kernels,
        "chosen": chosen,
        "images_per_second": {who: spread([batch / s for s in values]) for who, values in seconds.items()},
        "ours_over_dense": ratios(seconds["dense"], seconds["2:4"]),
        "largest_difference": ((expected - found).abs().max() / expected.abs().max()).item(),
        "same_answer": (expected.argmax(1) == found.argmax(1)).float().mean().item(),
        "packed_bytes_share": share,
    }


def _layer(weight: Tensor, num_rows: int) -> dict[str, Any]:
    """Microseconds of a layer's product, dense and with the weight compressed before."""
    rows = torch.randn(num_rows, weight.shape[1], device=weight.device, dtype=weight.dtype)
    packed, outputs = compress24(weight), weight.shape[0]
    timing = compare(lambda: functional.linear(rows, weight), lambda: matmul24(rows, packed, outputs))
    figures = {"shape": [num_rows, *weight.shape], "dense": timing.dense, "sparse": timing.sparse}
    return {**figures, "right": timing.right, "wins": timing.wins}


def show(record: dict[str, Any]) -> None:
    rows = []
    for name, kernel in record["kernels"].items():
        choice = "2:4" if name in record["chosen"] else "dense"
        shape = " x ".join(f"{size:,}" for size in kernel["shape"])
        times = ("-" if kernel[how] is None else f"{kernel[how]:,.1f}" for how in ("dense", "sparse"))
        rows.append((name, shape, *times, choice))
    texts = ("layer", "rows x out x in", "choice")
    show_table((*texts[:2], "dense µs", "2:4 µs", "choice"), rows, texts, title="inference")
    screen = console()
    for who, rate in record["images_per_second"].items():
        screen.print(f"{who}: {show_spread(rate)} images/s")
    screen.print(f"2:4 over dense: {show_spread(record['ours_over_dense'], 3)}")
    same, difference = record["same_answer"], record["largest_difference"]
    screen.print(f"same answer: {100 * same:.1f} %; logits differ by at most {difference:.1e} of the largest")
