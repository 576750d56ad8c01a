"""Variants of a step: one that fails stops no other, and Inductor's options compute the same."""

import json
import sys
import time

import pytest
import torch
from torch import nn
from torch.nn import functional

from benchmarks import variants
from sparsity import mask_layers
from trainer.engine import missing_for_compilation

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
SMALL = ["resnet20", "--batch", "4", "--steps", "2", "--warmup", "1"]


def run(monkeypatch, tmp_path, *arguments):
    out = tmp_path / "record.json"
    monkeypatch.setattr(sys, "argv", ["bench", *SMALL, *arguments, "--out", str(out)])
    assert variants.main() == 0
    return json.loads(out.read_text())["variants"]


def test_a_variant_that_fails_stops_no_other(monkeypatch, tmp_path, capsys):
    broken = variants.Variant(inductor={"no_such_option": True})
    monkeypatch.setitem(variants.VARIANTS, "broken", broken)
    found = run(monkeypatch, tmp_path, "--only", "broken", "eager", "eager+compressed")
    assert list(found) == ["broken", "eager", "eager+compressed"]
    assert "no_such_option" in found["broken"]["error"]
    for name in ("eager", "eager+compressed"):
        assert found[name]["images_per_second"] > 0
        assert 0 < found[name]["step_p50"] <= found[name]["step_p95"]
        assert found[name]["graphs"] == 0
    assert found["eager"]["losses"] != found["eager+compressed"]["losses"]
    assert "variants of a training step" in capsys.readouterr().out


def test_the_record_is_there_after_each_variant(monkeypatch, tmp_path):
    seen = []

    def attempt(network, variant, device, options, seconds):
        seen.append(list(json.loads(options.out.read_text())["variants"]) if options.out.exists() else [])
        return {"error": "none"}

    monkeypatch.setattr(variants, "attempt", attempt)
    run(monkeypatch, tmp_path, "--only", "as_is", "eager", "zero1")
    assert seen == [[], ["as_is"], ["as_is", "eager"]]


def test_a_variant_beyond_the_budget_is_stopped_and_the_rest_left_out(monkeypatch, tmp_path):
    monkeypatch.setattr(variants, "measure", lambda *arguments: time.sleep(60))
    begin = time.monotonic()
    found = run(monkeypatch, tmp_path, "--only", "eager", "as_is", "--seconds", "2")
    assert time.monotonic() - begin < 30
    assert "TimeoutError" in found["eager"]["error"]
    assert "left out" in found["as_is"]["error"]


def test_what_a_variant_sets_is_put_back(monkeypatch, tmp_path):
    seen = {}

    def measure(*arguments):
        seen["within"] = torch._inductor.config.conv_1x1_as_mm
        raise ValueError

    monkeypatch.setattr(variants, "measure", measure)
    run(monkeypatch, tmp_path, "--only", "conv_1x1_as_mm")
    assert seen["within"] is True
    assert torch._inductor.config.conv_1x1_as_mm is False


def test_sums_of_variants():
    both = variants.variant_of("compressed+batch_512+conv_1x1_as_mm+combo_kernels")
    assert (both.schedule, both.batch) == ("sparse 2", 512)
    assert both.inductor == {"conv_1x1_as_mm": True, "combo_kernels": True}


def test_an_unknown_variant_is_an_error(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path, "--only", "eager+fast")
    assert "no variant 'fast'; there are as_is, " in capsys.readouterr().err


class Block(nn.Module):
    """What a residual network has: 1 x 1 and 3 x 3 convolutions, BatchNorm, ReLU, an addition."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(16, 16, side, padding=side // 2, bias=False) for side in (1, 3, 1)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(16) for _ in self.convs)
        self.fc = nn.Linear(16, 8)

    def forward(self, x):
        y = x
        for conv, norm in zip(self.convs, self.norms, strict=True):
            y = functional.relu(norm(conv(y)))
        return self.fc((x + y).mean((2, 3)))


@pytest.mark.slow
@pytest.mark.rare
@pytest.mark.skipif(missing_for_compilation("cpu") is not None, reason="torch.compile does not work here")
@pytest.mark.parametrize("name", [name for name, variant in variants.VARIANTS.items() if variant.inductor])
def test_options_of_inductor_compute_the_same(name):
    torch.manual_seed(0)
    model = Block()
    mask_layers(model)
    model.to(memory_format=torch.channels_last)
    images = torch.randn(8, 16, 10, 10).to(memory_format=torch.channels_last)
    state = {key: value.clone() for key, value in model.state_dict().items()}

    def gradients(module):
        model.load_state_dict(state)
        model.zero_grad()
        loss = functional.cross_entropy(module(images), torch.arange(8))
        loss.backward()
        return [loss.detach(), *(parameter.grad for parameter in model.parameters()), *model.buffers()]

    expected = [value.clone() for value in gradients(model)]
    torch._dynamo.reset()
    with torch._inductor.config.patch(dict(variants.VARIANTS[name].inductor)):
        found = gradients(torch.compile(model, dynamic=False))
    torch._dynamo.reset()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
