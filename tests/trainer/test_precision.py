"""Which precision a run chooses and says; what a live engine computes in, layer by layer, and that everything
kept stays float32.
"""

import json
import logging
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from torch import nn

from sparsity.masters import masters_of
from tests.trainer.distributed.small_net import WHOLE, small
from tests.trainer.runs import assert_equal_states, build, final_state, fit_and_close, newest_run
from trainer import engine
from trainer.checkpoints import checkpoint, environment
from trainer.checkpoints.environment import cpu_multiplies_bf16
from trainer.cli import launch
from trainer.cli.main import main as acdc_command
from trainer.config.load import load_config
from trainer.distributed import ranks
from trainer.train import main

pytestmark = pytest.mark.usefixtures("small_net")
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("instructions", "used", "expected"),
    [
        ({"avx512_f": True, "avx512_bf16": True, "amx_bf16": False}, "AVX512", "bf16"),  # AMD Zen 4
        ({"avx512_f": True, "avx512_bf16": True, "amx_bf16": True}, "AVX512", "bf16"),
        ({"avx512_f": True, "avx512_bf16": False, "amx_bf16": True}, "AVX512", "bf16"),
        ({"avx512_f": True, "avx512_bf16": True, "amx_bf16": True}, "AVX2", "fp32"),  # torch is held to it
        ({"avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, "AVX512", "fp32"),
        ({"avx2": True}, "AVX2", "fp32"),
        ({"neon": True, "bf16": True, "sve_bf16": True}, "SVE256", "bf16"),  # AWS Graviton 3
        ({"neon": True, "bf16": True}, "DEFAULT", "bf16"),
        ({"neon": True, "bf16": False}, "DEFAULT", "fp32"),
        ({}, "DEFAULT", "fp32"),
    ],
)
def test_auto_is_bf16_where_the_hardware_multiplies_it(instructions, used, expected, monkeypatch, capsys):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: used)
    config = load_config("quickstart")
    assert engine.precision_name(config, CPU) == expected
    assert engine.precision_name(config, GPU) == "bf16"
    assert environment.environment()["cpu_bf16"] is (expected == "bf16")
    assert acdc_command(["doctor"]) == 0
    assert f"engine.precision=auto  {expected}\n" in capsys.readouterr().out
    for name in ("fp32", "tf32", "bf16", "fp16"):
        assert engine.precision_name(load_config("quickstart", [f"engine.precision={name}"]), CPU) == name
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert engine.precision_name(config, CPU) == "fp32"


@pytest.mark.parametrize("held_to", [None, "avx2"])
def test_this_cpus_own_instructions_decide(held_to):
    flags = Path("/proc/cpuinfo").read_text().split()
    variables = {name: value for name, value in os.environ.items() if name != "ATEN_CPU_CAPABILITY"}
    code = "from trainer.checkpoints.environment import cpu_multiplies_bf16 as f; print(f())"
    variables |= {"ATEN_CPU_CAPABILITY": held_to} if held_to else {}
    found = subprocess.check_output([sys.executable, "-c", code], env=variables, text=True)
    x86 = held_to is None and not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags)
    assert found == f"{x86 or 'bf16' in flags}\n"


def test_a_run_says_its_precision_and_warns_where_it_resumes_in_another(
    tiny_data, tmp_path, monkeypatch, capsys, caplog
):
    """The CPU of another machine is a fake."""
    auto = small(tiny_data, tmp_path, "{}", "engine.precision=auto", "save.every=1st", "save.keep=9")

    def train(able, *options):
        monkeypatch.setattr(engine, "cpu_multiplies_bf16", lambda: able)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert main(["quickstart", *auto, *options]) == 0
        run = newest_run(tmp_path)
        manifests = [run / "checkpoints" / name / "manifest.json" for name in ("step-000000006", "sparse")]
        (kept,) = {json.loads(manifest.read_text())["info"]["precision"] for manifest in manifests}
        return kept, capsys.readouterr().out, [line for line in caplog.messages if "so far and" in line]

    kept, shown, warnings = train(False)
    assert (kept, warnings) == ("fp32", [])
    assert "1 x cpu, fp32 (engine.precision=auto), ZeRO stage 0" in shown
    resume = f"resume={newest_run(tmp_path)}/checkpoints/step-00000000"
    kept, shown, warnings = train(True, f"{resume}4")
    assert "1 x cpu, bf16 (engine.precision=auto), ZeRO stage 0" in shown
    (warning,) = warnings
    assert warning.startswith(
        "the run was in fp32 so far and goes on in bf16, which engine.precision=auto is"
    )
    assert warning.endswith("; engine.precision=fp32 keeps to the former")
    assert kept == "bf16"
    assert train(True, f"{resume}5")[2] == []  # that one was saved in bf16
    kept, shown, warnings = train(True, f"{resume}4", "engine.precision=bf16")
    assert (kept, warnings) == ("bf16", [])  # whoever names it knows
    assert "1 x cpu, bf16, ZeRO stage 0" in shown
    assert acdc_command(["eval", str(newest_run(tmp_path)), "engine.precision=fp32"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "fp32" in line]
    assert [line.replace("│", " ").split()[0] for line in lines] == ["dense_twin", "sparse"]


def test_a_checkpoint_from_before_it_was_recorded_was_in_fp32(tiny_data, tmp_path, monkeypatch, caplog):
    options = small(tiny_data, tmp_path, "{}", "save.every=1st", "save.keep=9")
    assert main(["quickstart", *options]) == 0
    point = newest_run(tmp_path) / "checkpoints" / "step-000000004"
    manifest = json.loads((point / "manifest.json").read_text())
    del manifest["info"]["precision"], manifest[checkpoint.OWN_DIGEST]
    manifest["format"] = 1
    (point / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setattr(engine, "cpu_multiplies_bf16", lambda: True)
    with caplog.at_level(logging.WARNING):
        assert main(["quickstart", *options, "engine.precision=auto", f"resume={point}"]) == 0
    assert "the run was in fp32 so far and goes on in bf16" in caplog.text


def test_a_resumed_run_equals_the_uninterrupted_in_bf16_too(tiny_data, tmp_path):
    """Bit for bit; in fp32: test_resume."""

    def options(name):
        return small(tiny_data, tmp_path / name, WHOLE, "engine.precision=bf16")

    assert main(["quickstart", *options("whole")]) == 0
    fit_and_close(build(options("stopped")), stop=5)
    assert main(["quickstart", *options("stopped"), "resume=auto"]) == 0
    whole, resumed = (final_state(newest_run(tmp_path / name), 6) for name in ("whole", "stopped"))
    assert_equal_states(whole, resumed)


@pytest.fixture
def torch_flags():
    """As they were, afterwards."""
    before = switches()
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before[2:]
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = before[:2]


def switches():
    """cuDNN measures; deterministic; TF32 in convolutions; in matrix products."""
    cudnn = torch.backends.cudnn
    return cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


@pytest.mark.usefixtures("torch_flags")
@pytest.mark.parametrize(("precision", "tf32"), [("fp32", False), ("tf32", True), ("bf16", False)])
@pytest.mark.parametrize("benchmark", [True, False])
def test_products_on_a_gpu_are_rounded_to_tf32_only_when_asked(precision, tf32, benchmark):
    options = [f"engine.precision={precision}", f"engine.cudnn_benchmark={str(benchmark).lower()}"]
    config = load_config("quickstart", options)
    engine.set_up_gpu(config.engine, GPU)
    assert switches() == (benchmark, not benchmark, tf32, tf32)
    newer = torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    assert [name == "tf32" for name in newer] == [tf32] * 2
    assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")  # Inductor asks
    assert engine.precision_name(config, GPU) == precision


@pytest.mark.usefixtures("torch_flags")
def test_the_engine_and_acdc_eval_set_a_gpu_up(tiny_data, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(engine, "set_up_gpu", lambda *given: seen.append((given[0].precision, given[1].type)))
    assert main(["quickstart", *small(tiny_data, tmp_path)]) == 0
    assert seen == [("fp32", "cpu")]
    assert acdc_command(["eval", str(newest_run(tmp_path) / "checkpoints" / "sparse")]) == 0
    assert seen == [("fp32", "cpu")] * 2
    before = switches()
    monkeypatch.undo()
    engine.set_up_gpu(load_config("quickstart", ["engine.precision=tf32"]).engine, CPU)
    assert switches() == before


@pytest.mark.parametrize(
    ("precision", "message"), [("tf32", "tf32 needs an NVIDIA GPU"), ("fp16", "fp16 needs a GPU; on a CPU")]
)
def test_what_a_cpu_lacks_ends_before_any_process_starts(
    precision, message, monkeypatch, tiny_data, tmp_path, capsys
):
    monkeypatch.setattr(launch, "launch", lambda *_: pytest.fail("a process was started"))
    options = small(tiny_data, tmp_path, "{}", f"engine.precision={precision}")
    for command in (acdc_command, main):
        arguments = ["quickstart", *options]
        assert command(["train", *arguments] if command is acdc_command else arguments) == 3
        assert f"engine.precision={message}" in capsys.readouterr().err
    assert not (tmp_path / "quickstart").exists()


LOWER = ["torch.nn.Conv2d", "torch.nn.Linear", "sparsity.layers.MaskedConv2d"]


@pytest.mark.parametrize(("stage", "named"), [(1, None), (2, None), (1, LOWER)])
def test_ranks_add_gradients_of_masked_and_other_layers_up_in_one_type(stage, named, tiny_data, tmp_path):
    """By class, DeepSpeed would take bf16 for Conv2d and Linear alone."""
    from deepspeed.runtime.torch_autocast import get_comm_dtype

    options = ["engine.precision=bf16", f"engine.zero_stage={stage}", "sparsity.include=[conv2]"]
    if named is not None:
        file = tmp_path / "deepspeed.json"
        file.write_text(json.dumps({"torch_autocast": {"lower_precision_safe_modules": named}}))
        options += [f"engine.deepspeed={file}"]
    trainer = build(small(tiny_data, tmp_path, WHOLE, *options))
    trainer.close()
    types = defaultdict(set)
    for layer in trainer.acdc.model.modules():
        for parameter in layer.parameters(recurse=False):
            types[type(layer).__name__].add(get_comm_dtype(parameter))
    expected = {torch.float32 if named is None else torch.bfloat16}
    assert types.pop("BatchNorm2d") == {torch.float32}
    assert types == dict.fromkeys(("Conv2d", "MaskedConv2d", "Linear"), expected)
    assert set(trainer.engine.optimizer.ipg_buckets) == expected | {torch.float32}


@pytest.mark.parametrize("stage", [1, 2])
def test_a_users_file_may_keep_optimizer_state_off_the_device(stage, tiny_data, tmp_path):
    """For which DeepSpeed insists on the gradients' norm, which is left out otherwise."""
    file = tmp_path / "deepspeed.json"
    theirs = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    file.write_text(json.dumps({**theirs, "zero_force_ds_cpu_optimizer": False}))
    options = [f"engine.zero_stage={stage}", f"engine.deepspeed={file}"]
    assert main(["quickstart", *small(tiny_data, tmp_path, "{}", *options)]) == 0


def test_a_users_file_may_name_the_type_of_an_autocast_that_is_off(tmp_path):
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps({"torch_autocast": {"enabled": False, "dtype": "bfloat16"}}))
    config = load_config("quickstart", ["engine.precision=fp32", f"engine.deepspeed={file}"])
    assert not engine.deepspeed_config(config, CPU)["torch_autocast"]["enabled"]


def test_machines_that_differ_have_to_be_told(tiny_data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ranks, "all_gather", lambda mine: [mine, "bf16" if mine == "fp32" else "fp32"])
    assert main(["quickstart", *small(tiny_data, tmp_path, "{}", "engine.precision=auto")]) == 2
    assert "choose engine.precision=fp32 or bf16 for all" in capsys.readouterr().err
    assert not (tmp_path / "quickstart").exists()


@pytest.mark.parametrize(
    ("precision", "stage", "expected"),
    [
        ("bf16", 0, torch.bfloat16),
        ("bf16", 1, torch.bfloat16),
        ("fp32", 0, torch.float32),
        ("auto", 0, torch.bfloat16 if cpu_multiplies_bf16() else torch.float32),
    ],
)
def test_products_are_in_the_recipes_precision_and_all_else_in_float32(
    precision, stage, expected, tiny_data, tmp_path
):
    """In training, in evaluation, and where BatchNorm statistics are taken anew."""
    options = [f"engine.precision={precision}", f"engine.zero_stage={stage}", "data.batch_size=8"]
    options += ["steps_per_epoch=1", "data.eval_batch_size=150"]
    options += ["sparsity.recompute_batch_norm=1st"]
    overrides = small(tiny_data, tmp_path, "{norm: true}", *options)
    trainer = build(overrides)
    products, losses, gradients = [], [], []
    for layer in trainer.engine.module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(lambda *call: products.append((call[0].training, call[-1].dtype)))
    trainer.engine.module.register_forward_hook(lambda *call: losses.append(call[-1][0].dtype))
    sgd = trainer.engine.optimizer.optimizer if stage else trainer.engine.optimizer
    sgd.register_step_pre_hook(
        lambda *_: gradients.extend(p.grad.dtype for p in sgd.param_groups[0]["params"])
    )
    trainer.fit()
    trainer.close()
    layers = 3
    calls = {training: [dtype for t, dtype in products if t is training] for training in (True, False)}
    assert calls == {True: [expected] * layers * (2 + 1), False: [expected] * layers * 2}
    assert losses == [torch.float32] * 4
    assert set(gradients) == {torch.float32}
    masters = masters_of(trainer.engine)
    for parameter in trainer.engine.module.parameters():
        assert parameter.dtype == masters.weight(parameter).dtype == torch.float32
        assert [value.dtype for value in masters.state(parameter).values()] == [torch.float32]
    for name, buffer in trainer.engine.module.named_buffers():
        if not name.endswith(("mask", "num_batches_tracked")):
            assert buffer.dtype == torch.float32, name
