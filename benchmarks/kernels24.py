"""2:4 against dense kernels, by layer shape: ResNet50, WRN-28-10, and the MLPs of ViT-B and ViT-L.

Forward with compressing, as a training step runs it; input gradient where masks are transposable; each by
cuSPARSELt's default algorithm and by the fastest that a search finds. Times are the device's own, without
what launching costs the host. 3 x 3 convolutions are measured as the GEMMs they would be after im2col,
without the copy that im2col needs: if the GEMM alone does not win, nothing does. Without such kernels the
reference is measured, for a few rows: it shows that the table works, not how fast anything is.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from benchmarks.shared.record import Parser, parse, write_record
from sparsity import count_flops
from sparsity.kernels.measure import Measured, Timing
from sparsity.kernels.semi_structured.family import Family24, Shape
from sparsity.kernels.semi_structured.operator import DTYPES, ROWS, TILE, missing
from trainer.errors import exit_code_of
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
    dtype = DTYPES[0] if needed is None else torch.float32
    searched = Family24(device, dtype, transposable=True)
    default = replace(searched, search=False)
    rows: list[dict[str, Any]] = []
    content = {"device": str(device), "reference": needed is not None, "kernels": rows}
    print(_line("network", "layer", "rows x in x out", *COLUMNS))
    for network, layer, shape in shapes:
        measured = shape if needed is None else _small(shape)
        row = {"network": network, "layer": layer, "shape": measured._asdict()}
        row |= {"default": default.measure(measured).as_dict(), **searched.measure(measured).as_dict()}
        rows.append(row)
        print(_line(network, layer, str(measured), *_figures(row)), flush=True)
        write_record(options.out, content, quietly=True)
    write_record(options.out, content)
    return 0


def _small(shape: Shape) -> Shape:
    """64 rows of it: of one image of as many pixels."""
    if not shape.height:
        return shape._replace(rows=64)
    return shape._replace(rows=64, height=8 * shape.stride_y, width=8 * shape.stride_x)


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
        call = max(layer.calls, key=lambda call: call.outputs)
        shape = Shape(call.outputs * (batch or usual), inputs, outputs)
        if inputs == module.weight.shape[1] and isinstance(module, nn.Conv2d):
            shape = Shape(*shape[:3], call.height, call.width, *map(int, module.stride))
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


TIMES = ("dense µs", "default", "searched")
COLUMNS = (*(f"forward {each}" for each in TIMES), *(f"gradient {each}" for each in TIMES), "choice")


def _figures(row: dict[str, Any]) -> list[str]:
    """Microseconds of COLUMNS, and what auto runs."""
    figures = []
    for product in ("forward", "gradient"):
        found = Timing(**row[product])
        plain = Timing(**row["default"][product])
        figures += [_us(found.dense), _us(plain.sparse, plain.right), _us(found.sparse, found.right)]
    kernel = Family24.choose(Measured.of(row))
    return [*figures, "dense" if kernel is None else kernel.name]


def _us(time: float | None, right: bool = True) -> str:
    return "fails" if time is None else f"{time:,.1f}" if right else "wrong"


def _line(*texts: str) -> str:
    """A row of the table: rows appear as they are measured."""
    widths = (9, 26, 26, *(len(column) for column in COLUMNS[:-1]), 0)
    aligned = ("<", "<", "<", *[">"] * (len(COLUMNS) - 1), "<")
    return "  ".join(f"{text:{to}{width}}" for text, to, width in zip(texts, aligned, widths, strict=True))


if __name__ == "__main__":
    raise SystemExit(exit_code_of(main))
