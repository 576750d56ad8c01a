"""2:4 execution: rows @ weight.T with the weight compressed to half, in linear layers and 1 x 1 convolutions.

Two operators, acdc::mm24 and acdc::conv24, compress the masked weight and multiply, in the forward pass of
every step: weights change with every step, and what compressing costs belongs to the choice between kernels.
On a GPU they run cuSPARSELt (bf16, fp16); elsewhere a reference that packs, unpacks and multiplies: the same
meaning, no gain. For inference the weight is compressed once: see compress24 and semi_structured.inference.

    forward           rows @ weight.T            sparse
    input gradient    grad @ weight              sparse where the mask is transposable, else dense
    weight gradient   grad.T @ rows              dense

Dense products are those of the dense layer: for a convolution its own, by cuDNN. So only what is sparse makes
a difference. A sparse input gradient compresses the transpose of the weight, which is copied for that:
cuSPARSELt skips zeros of its first operand along the sum alone, and torch compresses along rows alone. Both
passes over the weight are small beside the product where there are many rows.

An algorithm is that of semi_structured.search.Algorithm, as a list that a graph can hold; None: the default.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsity.kernels.semi_structured.packing import Packed24, pack24, unpack24

TILE = 16  # cuSPARSELt: rows and columns of a bf16 weight are multiples of it
ROWS = 8  # and the rows of the other operand of this
DTYPES = (torch.bfloat16, torch.float16)


def compress24(weight: Tensor) -> Tensor:
    """(M, K), 2:4 along K, as one tensor that matmul24 takes on this device: cuSPARSELt's layout on a GPU,
    values and places side by side in the reference. Any strides: torch's own reads memory in order,
    whatever they are."""
    if weight.device.type == "cuda":
        return torch._cslt_compress(weight.contiguous())
    packed = pack24(weight)
    return torch.cat([packed.values, packed.places.to(weight.dtype)], 1)


@torch.library.custom_op("acdc::matmul24", mutates_args=())
def matmul24(
    rows: Tensor, compressed: Tensor, outputs: int, algorithm: Sequence[int] | None = None
) -> Tensor:
    """rows: (R, K). compressed: of compress24, for `outputs` rows of weight. Returns (R, outputs); no
    gradient."""
    values, places = torch.split(compressed, [rows.shape[1] // 2, rows.shape[1] // 8], 1)
    return rows @ unpack24(Packed24(values, places.to(torch.uint8))).t()


@matmul24.register_kernel("cuda")
def _(rows: Tensor, compressed: Tensor, outputs: int, algorithm: Sequence[int] | None = None) -> Tensor:
    number, split_k, split_k_mode = algorithm or (0, 1, -1)
    return torch._cslt_sparse_mm(
        compressed,
        rows.contiguous().t(),
        transpose_result=True,  # (R, outputs) in memory: nothing is transposed afterwards
        alg_id=number,
        split_k=split_k,
        split_k_mode=split_k_mode,
    )


@matmul24.register_fake
def _(rows: Tensor, compressed: Tensor, outputs: int, *_: Any) -> Tensor:
    return rows.new_empty(rows.shape[0], outputs)


@torch.library.custom_op("acdc::mm24", mutates_args=())
def mm24(
    rows: Tensor,
    weight: Tensor,
    sparse_backward: bool,
    algorithm: Sequence[int] | None = None,
    gradient_algorithm: Sequence[int] | None = None,
) -> Tensor:
    """rows: (R, K). weight: (M, K), 2:4 along K. Returns (R, M). sparse_backward: the weight is 2:4 along M,
    too, and the gradient of the rows uses that."""
    return matmul24(rows, compress24(weight), weight.shape[0], algorithm)


@mm24.register_fake
def _(rows: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[0])


def _setup_mm24(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, weight, ctx.sparse_backward, _, ctx.algorithm = inputs
    ctx.save_for_backward(rows, weight)


def _backward_mm24(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
    rows, weight = ctx.saved_tensors
    of_rows = of_weight = None
    if ctx.needs_input_grad[0]:
        of_rows = mm24(grad, weight.t(), False, ctx.algorithm) if ctx.sparse_backward else grad @ weight
    if ctx.needs_input_grad[1]:
        of_weight = grad.t() @ rows
    return of_rows, of_weight, None, None, None


@torch.library.custom_op("acdc::conv24", mutates_args=())
def conv24(
    images: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    sparse_backward: bool,
    algorithm: Sequence[int] | None = None,
    gradient_algorithm: Sequence[int] | None = None,
) -> Tensor:
    """A 1 x 1 convolution. images: (N, K, height, width). weight: (M, K, 1, 1). Returns (N, M, height, width)
    in channels_last memory. Of images in that memory nothing is copied, unless the stride is above 1: then
    the pixels that count are. The rest as in mm24."""
    pixels = images[:, :, :: stride[0], :: stride[1]].permute(0, 2, 3, 1)
    rows = pixels.reshape(-1, images.shape[1])
    output = matmul24(rows, compress24(weight.flatten(1)), weight.shape[0], algorithm)
    return output.view(*pixels.shape[:3], -1).permute(0, 3, 1, 2)


@conv24.register_fake
def _(images: Tensor, weight: Tensor, stride: Sequence[int], *_: Any) -> Tensor:
    height, width = images[:, :, :: stride[0], :: stride[1]].shape[2:]
    return images.new_empty(images.shape[0], height, width, weight.shape[0]).permute(0, 3, 1, 2)


def _setup_conv24(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, weight, ctx.stride, ctx.sparse_backward, _, ctx.algorithm = inputs
    ctx.save_for_backward(images, weight)


def _backward_conv24(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
    images, weight = ctx.saved_tensors
    sparse = ctx.sparse_backward and ctx.needs_input_grad[0]
    of_images, of_weight, _ = dense_gradients(
        grad, images, weight, ctx.stride, [ctx.needs_input_grad[0] and not sparse, ctx.needs_input_grad[1]]
    )
    if sparse:
        of_images = input_gradient24(grad, images, weight, ctx.stride, ctx.algorithm)
    return of_images, of_weight, None, None, None, None


def dense_gradients(
    grad: Tensor, images: Tensor, weight: Tensor, stride: Sequence[int], wanted: Sequence[bool]
) -> tuple[Any, ...]:
    """(of the images, of the weight, None), as the dense convolution computes them; None where not wanted."""
    if not any(wanted):
        return None, None, None
    given = (stride, (0, 0), (1, 1), False, (0, 0), 1)
    return torch.ops.aten.convolution_backward(grad, images, weight, None, *given, [*wanted, False])


def input_gradient24(
    grad: Tensor, images: Tensor, weight: Tensor, stride: Sequence[int], algorithm: Sequence[int] | None
) -> Tensor:
    """The gradient of conv24's images, with a weight that is 2:4 along its outputs."""
    pixels = grad.permute(0, 2, 3, 1)
    rows = pixels.reshape(-1, grad.shape[1])
    gradient = mm24(rows, weight.flatten(1).t(), False, algorithm).view(*pixels.shape[:3], -1)
    if tuple(stride) != (1, 1):
        count, channels, height, width = images.shape
        full = gradient.new_zeros(count, height, width, channels)
        full[:, :: stride[0], :: stride[1]] = gradient
        gradient = full
    return gradient.permute(0, 3, 1, 2)


mm24.register_autograd(_backward_mm24, setup_context=_setup_mm24)
conv24.register_autograd(_backward_conv24, setup_context=_setup_conv24)
for _operator in (mm24, conv24):
    for _device in ("cuda", "cpu"):
        torch.library.register_autocast(_operator, _device, torch.bfloat16)


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
