"""2:4 against dense kernels, by layer shape: ResNet50, WRN-28-10, and the MLPs of ViT-B and ViT-L.

Forward with compressing, as a training step runs it; input gradient where masks are transposable. 3 x 3
convolutions are measured as the GEMMs they would be after im2col, without the copy that im2col needs: if the
GEMM alone does not win, nothing does. Without such kernels the reference is measured, for a few rows: it
shows that the table works, not how fast anything is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.shared.record import Parser, parse, show_table, write_record
from sparsity import count_flops
from sparsity.kernels.measure import Measured
from sparsity.kernels.semi_structured.kernel import Family24, Shape
from sparsity.kernels.semi_structured.operator import DTYPES, ROWS, TILE, missing
from trainer.cli.progress import progress
from trainer.models import get_model

VIT = {"ViT-B": 768, "ViT-L": 1024}  # width; the MLP is four times as wide, 197 tokens an image
NETWORKS = {
    "resnet50": ("resnet50", 1000, (3, 224, 224), 256),
    "wrn-28-10": ("wide_resnet28_10", 100, (3, 32, 32), 256),
}


def main() -> int:
    parser = Parser("kernels24", __doc__)
    parser.add_number("--batch", None, "images; default: 256, ViT 128")
    parser.add_number("--most", None, "shapes of each network at most; default: all")
    options = parse(parser, "kernels24")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    needed = missing(device)
    if needed is not None:
        print(f"no 2:4 kernels on this machine: they need {needed}. The reference is measured, 64 rows each.")
    networks = [_network(name, options.batch) for name in NETWORKS]
    networks += [_vit(name, options.batch) for name in VIT]
    shapes = [entry for entries in networks for entry in entries[: options.most]]
    rows = []
    with progress("shapes") as on_progress:
        for done, (network, layer, shape) in enumerate(shapes):
            measured = shape if needed is None else shape._replace(rows=64)
            dtype = DTYPES[0] if needed is None else torch.float32
            found = Family24(device, dtype, transposable=True).measure(measured)
            rows.append({"network": network, "layer": layer, "shape": measured._asdict(), **found.as_dict()})
            on_progress(done + 1, len(shapes))
    show(rows, needed is None)
    write_record(options.out, {"device": str(device), "reference": needed is not None, "kernels": rows})
    return 0


def _network(name: str, batch: int | None) -> list[tuple[str, str, Shape]]:
    """(network, first layer of it, shape) of the distinct shapes that the hardware takes."""
    model_name, num_classes, image, usual = NETWORKS[name]
    model = get_model(model_name, num_classes)
    layers = dict(model.named_modules())
    found: dict[Shape, str] = {}
    for layer in count_flops(model, image).layers:
        module = layers[layer.name]
        assert isinstance(module, nn.Conv2d | nn.Linear)
        outputs, inputs = module.weight.shape[0], module.weight[0].numel()
        shape = Shape(max(call.outputs for call in layer.calls) * (batch or usual), inputs, outputs)
        if not (inputs % TILE or outputs % TILE or shape.rows % ROWS):
            kernel = "x".join(map(str, getattr(module, "kernel_size", ())))
            found.setdefault(shape, f"{layer.name} {kernel}".strip())
    return [(name, layer, shape) for shape, layer in found.items()]


def _vit(name: str, batch: int | None) -> list[tuple[str, str, Shape]]:
    width, rows = VIT[name], 197 * (batch or 128)
    return [
        (name, "mlp.fc1", Shape(rows, width, 4 * width)),
        (name, "mlp.fc2", Shape(rows, 4 * width, width)),
    ]


def show(measured: list[dict[str, Any]], real: bool) -> None:
    rows = []
    for row in measured:
        forward, gradient = row["forward"], row["gradient"]
        gains = (f"{t['dense'] / t['sparse']:.2f}x" if t["sparse"] else "-" for t in (forward, gradient))
        shape = " x ".join(f"{size:,}" for size in row["shape"].values())
        sparse = "-" if forward["sparse"] is None else f"{forward['sparse']:,.1f}"
        kernel = Family24.choose(Measured.of(row))
        figures = (f"{forward['dense']:,.1f}", sparse, *gains)
        rows.append(
            (row["network"], row["layer"], shape, *figures, "dense" if kernel is None else kernel.name)
        )
    texts = ("network", "layer", "rows x in x out", "choice")
    columns = (*texts[:3], "dense µs", "2:4 µs", "gain", "gradient gain", "choice")
    show_table(columns, rows, texts, "2:4 against dense" + ("" if real else ": the reference, not a kernel"))


if __name__ == "__main__":
    raise SystemExit(main())
