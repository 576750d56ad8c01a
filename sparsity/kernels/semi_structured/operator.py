"""2:4 execution: rows @ weight.T with the weight compressed to half, in linear layers and 1 x 1 convolutions.

One operator, acdc::mm24, compresses the masked weight and multiplies, in the forward pass of every step:
weights change with every step, and what compressing costs belongs to the choice between kernels. On a GPU it
runs cuSPARSELt (bf16, fp16); elsewhere a reference that packs, unpacks and multiplies: the same meaning, no
gain. For inference the weight is compressed once: see compress24 and semi_structured.inference.

    forward           rows @ weight.T            sparse
    input gradient    grad @ weight              sparse where the mask is transposable, else dense
    weight gradient   grad.T @ rows              dense
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparsity.kernels.semi_structured.packing import Packed24, pack24, unpack24

TILE = 16  # cuSPARSELt: rows and columns of a bf16 weight are multiples of it
ROWS = 8  # and the rows of the other operand of this
DTYPES = (torch.bfloat16, torch.float16)


def compress24(weight: Tensor) -> Tensor:
    """(M, K), 2:4 along K, as one tensor that matmul24 takes on this device: cuSPARSELt's layout on a GPU,
    values and places side by side in the reference."""
    if weight.device.type == "cuda":
        return torch._cslt_compress(weight.contiguous())
    packed = pack24(weight)
    return torch.cat([packed.values, packed.places.to(weight.dtype)], 1)


@torch.library.custom_op("acdc::matmul24", mutates_args=())
def matmul24(rows: Tensor, compressed: Tensor, outputs: int) -> Tensor:
    """rows: (R, K). compressed: of compress24, for `outputs` rows of weight. Returns (R, outputs); no
    gradient."""
    values, places = torch.split(compressed, [rows.shape[1] // 2, rows.shape[1] // 8], 1)
    return rows @ unpack24(Packed24(values, places.to(torch.uint8))).t()


@matmul24.register_kernel("cuda")
def _(rows: Tensor, compressed: Tensor, outputs: int) -> Tensor:
    return torch._cslt_sparse_mm(compressed, rows.contiguous().t(), transpose_result=True)


@matmul24.register_fake
def _(rows: Tensor, compressed: Tensor, outputs: int) -> Tensor:
    return rows.new_empty(rows.shape[0], outputs)


@torch.library.custom_op("acdc::mm24", mutates_args=())
def mm24(rows: Tensor, weight: Tensor, sparse_backward: bool) -> Tensor:
    """rows: (R, K). weight: (M, K), 2:4 along K. Returns (R, M). sparse_backward: the weight is 2:4 along M,
    too, and the gradient of the rows uses that."""
    return matmul24(rows, compress24(weight), weight.shape[0])


@mm24.register_fake
def _(rows: Tensor, weight: Tensor, sparse_backward: bool) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
    rows, weight, ctx.sparse_backward = inputs
    ctx.save_for_backward(rows, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    rows, weight = ctx.saved_tensors
    of_rows = of_weight = None
    if ctx.needs_input_grad[0]:
        of_rows = mm24(grad, weight.t(), False) if ctx.sparse_backward else grad @ weight
    if ctx.needs_input_grad[1]:
        of_weight = grad.t() @ rows
    return of_rows, of_weight, None


mm24.register_autograd(_backward, setup_context=_setup_context)
torch.library.register_autocast(mm24, "cuda", torch.bfloat16)
torch.library.register_autocast(mm24, "cpu", torch.bfloat16)


def linear24(input: Tensor, weight: Tensor, bias: Tensor | None, sparse_backward: bool) -> Tensor:
    """torch.nn.functional.linear with a weight that is 2:4 along its inputs."""
    output = mm24(input.flatten(0, -2), weight, sparse_backward).view(*input.shape[:-1], -1)
    return output if bias is None else output + bias.to(output.dtype)


def conv24(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...], sparse_backward: bool
) -> Tensor:
    """A 1 x 1 convolution as linear24. Of channels_last memory nothing is copied, unless the stride is above
    1: then the pixels that count are."""
    pixels = input[:, :, :: stride[0], :: stride[1]].permute(0, 2, 3, 1)
    output = linear24(pixels.contiguous(), weight.flatten(1), bias, sparse_backward)
    return output.permute(0, 3, 1, 2)


def reason_unsupported(layer: nn.Module, num_rows: int) -> str | None:
    """Why a layer cannot run mm24 over `num_rows` rows (images times output positions), or None."""
    if isinstance(layer, nn.Conv2d):
        if layer.kernel_size != (1, 1):
            return f"{layer.kernel_size[0]}x{layer.kernel_size[1]} kernel"  # im2col would copy k * k inputs
        if layer.groups > 1 or layer.padding not in ((0, 0), "valid"):
            return "groups or padding"
        outputs, inputs = layer.out_channels, layer.in_channels
    else:
        assert isinstance(layer, nn.Linear)
        outputs, inputs = layer.out_features, layer.in_features
    if outputs % TILE or inputs % TILE:
        return f"{outputs}x{inputs} is not a multiple of {TILE}"
    if num_rows % ROWS:
        return f"{num_rows} rows are not a multiple of {ROWS}"
    return None


def missing(device: torch.device, dtype: torch.dtype = DTYPES[0]) -> str | None:
    """What 2:4 kernels need and this machine or precision does not give, or None."""
    if device.type != "cuda":
        return "a GPU: 2:4 kernels run on NVIDIA's from Ampere (compute capability 8.0) on"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"compute capability 8.0 or more; {torch.cuda.get_device_name(device)} has less"
    if not torch.backends.cusparselt.is_available():
        return "cuSPARSELt in this build of torch"
    return None if dtype in DTYPES else "bf16: engine.precision=bf16"
