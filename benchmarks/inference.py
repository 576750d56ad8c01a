"""Inference of a finished sparse model, against the fastest that there is without sparse kernels.

On a CPU: sparse kernels against compiled torch, BatchNorm folded and weights frozen, and ONNX Runtime. A
network's name instead of a run measures it with random weights, of which each layer but the first and the
last drops the same share at random places. For 2:4 models, and on a GPU: see inference24.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor import config as inductor

from benchmarks import inference24
from benchmarks.inference_contenders import ours, rivals
from benchmarks.shared.models import NETWORKS
from benchmarks.shared.record import Parser, console, parse, show_spread, show_table, spread, write_record
from benchmarks.shared.turns import ratios, take_turns
from sparsity.kernels.semi_structured.inference import packable
from sparsity.kernels.unstructured.kernel import SparseKernel
from trainer.checkpoints.saved_model import find_model, load_model
from trainer.cli.progress import progress
from trainer.distributed import ranks
from trainer.errors import UserError, as_user_error, exit_code_of
from trainer.paths import user_path

EXACT = 1e-4  # of the largest logit: what fp32 may differ by


def main() -> int:
    parser = Parser("infer", __doc__)
    parser.add_argument(
        "path", metavar="PATH", help=f"a run folder, a checkpoint folder in it, or of {', '.join(NETWORKS)}"
    )
    parser.add_numbers("--percent", float, "P", "of a named network's weights dropped; default: 90 95")
    parser.add_numbers("--batch", int, "N", "images; default: 1 and 32; for 2:4 models 32, on a GPU 256")
    parser.add_number("--turns", 9, "of each")
    parser.add_number("--steps", None, "batches in a turn; default: 16 images; for 2:4 models and on a GPU 5")
    parser.add_argument("--all", action="store_true", help="2:4 in every layer that can, faster or not")
    options = parse(parser, "inference")
    device = ranks.start()
    record = measured(options, device)
    write_record(options.out, {"device": str(device), **record})
    return 0


def measured(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The record, shown. Raises UserError."""
    named = options.path in NETWORKS
    if named and device.type != "cpu":
        raise UserError(f"{options.path}: networks by name are for sparse kernels of CPUs; give a 2:4 run")
    if options.percent and not named:
        raise UserError("--percent is for networks by name: a run has dropped its weights")
    if not named:
        with as_user_error("infer"):
            model, info = load_model(find_model(user_path(options.path)))
        if device.type != "cpu" or _is_24(model):
            if len(options.batch or []) > 1:
                raise UserError("--batch: one number for 2:4 models and on a GPU")
            record = inference24.measure(model, info["model"], device, options)
            inference24.show(record)
            return record
        models: Any = [(model, info["model"])]
    else:
        models = masked(options.path, options.percent or [90, 95])
    results = []
    for model, described in models:
        for batch in options.batch or [1, 32]:
            with inductor.patch(freezing=True):  # every contender is faster with it
                results.append(measure(model, described, batch, options))
            show(results[-1])
    return {"inference": results}


def masked(name: str, percents: list[float]) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
    """The network with random weights, for each share of them dropped."""
    network = NETWORKS[name]
    for percent in percents:
        torch.manual_seed(0)
        model = network.model()
        layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
        for layer in layers[1:-1]:
            layer.weight.data *= torch.rand_like(layer.weight) >= percent / 100
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.momentum = 1.0  # statistics of this pass: activations neither fade nor grow
        with torch.no_grad():
            model.train()(torch.randn(8, *network.image_shape))
        described = {"name": name, "num_classes": network.num_classes, "input_shape": network.image_shape}
        yield model, {**described, "mean": None, "std": None}


@torch.no_grad()
def measure(
    model: nn.Module, described: dict[str, Any], batch: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Milliseconds of a batch of each, ours against the fastest rival, and how far answers differ."""
    torch._dynamo.reset()  # the next begins afresh
    layers = [layer for layer in model.eval().modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    pruned = [layer.weight for layer in layers if not layer.weight.all()]
    if not pruned:
        raise UserError("no layer of this model drops weights; train with sparsity.target=0.9")
    dropped = sum(int((weight == 0).sum()) for weight in pruned) / sum(weight.numel() for weight in pruned)
    title = f"{described['name']}, {100 * dropped:.1f} % dropped, batch {batch}"
    images = torch.randn(batch, *described["input_shape"]).to(memory_format=torch.channels_last)
    fast = ours(model, images)
    contenders = {**{who: answer for who, (_, answer) in fast.items()}, **rivals(model, described, images)}
    found = {}
    with progress(f"{title}: compiling") as on_progress:
        for done, (who, answer) in enumerate(contenders.items()):
            found[who] = _difference(answer(), model(images))
            on_progress(done + 1, len(contenders))
    for who, (difference, _) in found.items():
        if "fp32" in who and difference > EXACT:
            raise SystemExit(f"{who} differs from the dense model by {difference:.1e} of the largest logit")
    steps = options.steps or max(1, 16 // batch)
    with progress(f"{title}: turns") as on_progress:
        seconds = take_turns(contenders, options.turns, steps, torch.device("cpu"), on_progress)
    times = {who: spread([1000 * value for value in values]) for who, values in seconds.items()}
    best, rival = (
        min(group, key=lambda who: times[who]["median"]) for group in (fast, contenders.keys() - fast.keys())
    )
    return {
        "network": described["name"],
        "percent": round(100 * dropped, 1),
        "batch": batch,
        "layers": len(layers),
        "layers_on_kernels": {
            who: sum(_is_sparse(layer) for layer in network.modules()) for who, (network, _) in fast.items()
        },
        "ms_per_batch": times,
        "fastest_rival": rival,
        "fastest_of_ours": best,
        "ours_over_fastest_rival": {who: ratios(seconds[rival], seconds[who]) for who in fast},
        "largest_difference": {who: difference for who, (difference, _) in found.items()},
        "same_answer": {who: same for who, (_, same) in found.items()},
    }


def _difference(logits: Tensor, expected: Tensor) -> tuple[float, float]:
    """The greatest, as a share of the largest logit; the share of images with the same answer."""
    greatest = (logits.float() - expected).abs().max() / expected.abs().max()
    return greatest.item(), (logits.argmax(1) == expected.argmax(1)).float().mean().item()


def _is_sparse(layer: nn.Module) -> bool:
    return isinstance(getattr(layer, "kernel", None), SparseKernel)


def _is_24(model: nn.Module) -> bool:
    """Whether its layers drop two of four: sparser ones may by chance, too."""
    layers = dict(model.named_modules())
    kept = [(layers[name].weight != 0).float().mean().item() for name in packable(model)]
    return bool(kept) and min(kept) > 0.4


def show(result: dict[str, Any]) -> None:
    rows = []
    for who, times in result["ms_per_batch"].items():
        kernels, gain = result["layers_on_kernels"].get(who), result["ours_over_fastest_rival"].get(who)
        layers = "-" if kernels is None else f"{kernels} of {result['layers']}"
        rate = f"{1000 * result['batch'] / times['median']:,.1f}"
        answers = (f"{result['largest_difference'][who]:.1e}", f"{100 * result['same_answer'][who]:.0f} %")
        faster = "-" if gain is None else show_spread(gain, 2)
        rows.append((who, layers, show_spread(times), rate, *answers, faster))
    columns = ("", "sparse layers", "ms", "images/s", "logits differ", "same answer", "fastest rival / ours")
    title = f"{result['network']}, {result['percent']:g} % dropped, batch {result['batch']}"
    show_table(columns, rows, texts=("",), title=title)
    best, rival = result["fastest_of_ours"], result["fastest_rival"]
    gain = show_spread(result["ours_over_fastest_rival"][best], 2)
    console().print(f"{best} is {gain} times as fast as the fastest rival, {rival}")


if __name__ == "__main__":
    raise SystemExit(exit_code_of(main))
