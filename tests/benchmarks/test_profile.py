"""Where a step's time goes: each kernel of a GPU counts once, and is of the right kind."""

from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType
from torch.nn import functional

from benchmarks.shared.profile import kind_of, profile_steps, summary

# Of compiled ResNet50 training steps, bf16, on an H200
NAMES = {
    "sm90_xmma_dgrad_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64": "convolution",
    "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816fprop_optimized_bf16_256x64>": "convolution",
    "_ZN17cutlass__5x_cudnn6KernelINS_4conv6kernel23ImplicitGemmConvolutionINS_11threadblock": "convolution",
    "nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_TNT": "convolution",
    "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>": "convolution",
    "void cask_plugin__5x_cudnn::xmma__5x_cudnn::init_device_workspace_kernel<>": "convolution",
    "void nhwcAddPaddingKernel<__nv_bfloat16, __nv_bfloat16, float, true>(int, int)": "convolution",
    "triton_red_fused__native_batch_norm_legit_functional_8": "BatchNorm",
    "triton_per_fused__native_batch_norm_legit_functional_copy__44": "BatchNorm",
    "triton_red_fused_native_batch_norm_backward_threshold_backward_25": "BatchNorm",
    "triton_poi_fused__native_batch_norm_legit_functional_add_relu_18": "element-wise",
    "triton_poi_fused__native_batch_norm_legit_functional_convolution_backward_native_batch_norm_backward"
    "_threshold_backward_57": "element-wise",
    "triton_poi_fused__to_copy_46": "element-wise",
    "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>": "element-wise",
    "triton_poi_fused_max_pool2d_with_indices_6": "pooling",
    "triton_poi_fused_add_max_pool2d_with_indices_max_pool2d_with_indices_backward_64": "pooling",
    "triton_per_fused__native_batch_norm_legit_functional_add_mean_relu_threshold_backward_62": "pooling",
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::TensorListMetadata<3>, "
    "at::native::FusedSgdMathFunctor<float, 3>>": "optimizer",
    "Memset (Device)": "copies",
    "Memcpy DtoD (Device -> Device)": "copies",
    "triton_per_fused__log_softmax__to_copy_argmax_prepare_softmax_online_65": "other",
}


@pytest.mark.parametrize("name", NAMES)
def test_kinds_of_kernels(name):
    assert kind_of(name) == NAMES[name]


def average(key, count, microseconds, on_device=True, annotation=False):
    """An entry of key_averages, as torch 2.11 to 2.13 have them."""
    return SimpleNamespace(
        key=key,
        count=count,
        device_type=DeviceType.CUDA if on_device else DeviceType.CPU,
        is_user_annotation=annotation,
        self_device_time_total=microseconds,
        self_cpu_time_total=0.0 if on_device else 5.0,
    )


NORM, SGD = "triton_red_fused__native_batch_norm_legit_functional_8", "FusedSgdMathFunctor"
AVERAGES = [
    average("aten::cudnn_convolution", 4, 400.0, on_device=False),
    average("sm90_xmma_fprop", 4, 400.0),
    average(NORM, 2, 100.0, on_device=False),
    average(NORM, 2, 100.0),
    average(NORM, 2, 110.0, annotation=True),
    average("Optimizer.step#SGD.step", 2, 70.0, annotation=True),
    average("Optimizer.step#Adam.step", 2, 70.0),
    average("ProfilerStep#1", 2, 900.0),
    average("aten::_fused_sgd_", 2, 60.0, on_device=False),
    average(SGD, 2, 60.0),
    average("cudaStreamIsCapturing", 2, 60.0, on_device=False),
]


def test_a_kernel_counts_once():
    found = summary(AVERAGES, steps=2, wall=1e-3, on_gpu=True)
    assert [(row["name"], row["kind"], row["calls"]) for row in found["kernels"]] == [
        ("sm90_xmma_fprop", "convolution", 2),
        (NORM, "BatchNorm", 1),
        (SGD, "optimizer", 1),
    ]
    assert [row["microseconds"] for row in found["kernels"]] == pytest.approx([200, 50, 30])
    assert found["step_seconds"] == 5e-4
    busy = {name: share for name, share in found["shares"].items() if share}
    assert busy == pytest.approx({"convolution": 0.4, "BatchNorm": 0.1, "optimizer": 0.06, "waiting": 0.44})


@pytest.mark.parametrize("wall", [1e-3, 560e-6, 100e-6])
def test_shares_are_1_together_also_where_kernels_overlap(wall):
    shares = summary(AVERAGES, steps=2, wall=wall, on_gpu=True)["shares"]
    assert sum(shares.values()) == pytest.approx(1)
    assert (shares["waiting"] > 0.01) == (wall > 560e-6)
    assert shares["convolution"] == pytest.approx(400e-6 / max(wall, 560e-6))


def test_steps_on_a_cpu():
    x, weight = torch.randn(4, 3, 32, 32), torch.randn(8, 3, 3, 3)
    calls = []

    def step():
        calls.append(None)
        with torch.profiler.record_function("a region of one's own"):
            functional.max_pool2d(functional.conv2d(x, weight), 2)

    found = profile_steps(step, 3, torch.device("cpu"))
    assert len(calls) == 4
    assert sum(found["shares"].values()) == pytest.approx(1)
    assert found["shares"]["convolution"] > 0
    assert found["shares"]["pooling"] > 0
    assert "a region of one's own" not in {row["name"] for row in found["kernels"]}
    assert next(row for row in found["kernels"] if "max_pool2d_with" in row["name"])["calls"] == 1
