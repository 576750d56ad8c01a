"""Runs of a vision transformer of torchvision's, whose attention computes past its linear layers."""

import json
import re
import shutil

import pytest
import torch
from torch import nn

from data.torchvision_import import import_torchvision
from tests.slow import slow
from tests.trainer.runs import assert_equal_states, final_state, newest_run, step_folder, tiny
from trainer.checkpoints import checkpoint
from trainer.checkpoints.saved_model import load_model
from trainer.models import MODELS
from trainer.summary import unpruned_line
from trainer.train import main

pytestmark = pytest.mark.usefixtures("needs_runs")
WIDTH, LAYERS, PATCH = 16, 2, 7


class Grey(nn.Module):
    """For images of one channel."""

    def __init__(self, num_classes, in_channels):
        super().__init__()
        vision_transformer = import_torchvision().models.VisionTransformer
        sizes = {"hidden_dim": WIDTH, "mlp_dim": 2 * WIDTH, "num_layers": LAYERS, "num_heads": 2}
        self.vit = vision_transformer(28, PATCH, num_classes=num_classes, dropout=0.1, **sizes)
        nn.init.normal_(self.vit.heads.head.weight, std=0.1)  # 0 otherwise

    def forward(self, x):
        return self.vit(x.expand(-1, 3, -1, -1))


@pytest.fixture(scope="module", autouse=True)
def _own_model():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "grey_vit", Grey)
        yield


def arguments(data, run_root, *overrides):
    model = ["model.name=grey_vit", "model.arguments={}", "optimizer.lr=0.05"]
    phases = ["epochs=2", "sparsity.schedule=dense 1, sparse 1", "save.every=4st", "save.keep=9"]
    kept = [each for each in tiny(data, run_root) if not each.startswith("model.")]
    return [*kept, *model, *phases, *overrides]


@pytest.fixture(scope="module")
def finished(tiny_data, tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    assert main(arguments(tiny_data, root)) == 0
    return newest_run(root)


def copy_of(run, root):
    return shutil.copytree(run, root / "quickstart" / run.name)


def test_attention_is_pruned_and_the_rest_is_told(finished):
    result = json.loads((finished / "result.json").read_text())
    plain = load_model(finished / "checkpoints" / "sparse")[0]
    attention = plain.vit.encoder.layers[1].self_attention
    assert type(attention) is nn.MultiheadAttention
    kept = [(weight != 0).double().mean() for weight in (attention.in_proj_weight, attention.out_proj.weight)]
    assert max(kept) > 0  # of so few weights chance may leave one projection none
    assert all(share < 0.6 for share in kept)
    assert result["sparse"]["sparsity"] == pytest.approx(0.9, abs=1e-3)
    parameters = dict(plain.named_parameters())
    total = sum(map(torch.numel, parameters.values()))
    vectors = [name for name, value in parameters.items() if sum(size > 1 for size in value.shape) < 2]
    assert result["not_pruned"] == {
        "biases, norms and other vectors": sum(parameters[name].numel() for name in vectors) / total,
        "vit.encoder.pos_embedding": 17 * WIDTH / total,
    }
    assert result["sparse"]["num_weights"] / total == pytest.approx(1 - sum(result["not_pruned"].values()))


@pytest.mark.parametrize("number", [16, *slow(8)])
def test_resumed_in_either_phase_it_equals_the_uninterrupted(finished, tiny_data, tmp_path, number):
    run = copy_of(finished, tmp_path)
    (run / "result.json").unlink()
    assert main(arguments(tiny_data, tmp_path, f"resume={step_folder(run, number)}")) == 0
    assert_equal_states(final_state(run, 20), final_state(finished, 20))


def test_a_branch_within_a_sparse_phase_takes_the_masks_over(finished, tiny_data, tmp_path):
    """Of two sparse epochs the first is behind it."""
    longer = ["epochs=3", "sparsity.schedule=dense 1, sparse 2", f"checkpoint={step_folder(finished, 20)}"]
    assert main(arguments(tiny_data, tmp_path, *longer)) == 0
    ours, theirs = final_state(newest_run(tmp_path), 30)["model"], final_state(finished, 20)["model"]
    masks = [name for name in ours if name.endswith("in_proj.mask")]
    assert len(masks) == LAYERS
    assert all(torch.equal(ours[name], theirs[name]) for name in masks)
    assert not all(ours[name].all() for name in masks)


def test_a_run_from_before_attention_was_masked_goes_on_as_it_was(finished, tiny_data, tmp_path, capsys):
    """It had to exclude the output projections, and left the others dense."""
    run = copy_of(finished, tmp_path)
    (run / "result.json").unlink()
    old = step_folder(run, 8)
    state, info = checkpoint.read(old, checkpoint.STATE), checkpoint.read_info(old)
    for name in [name for name in state["model"] if name.endswith("_proj.mask") and "attention" in name]:
        del state["model"][name]
    checkpoint.save(old, {checkpoint.STATE: state}, info)
    resume = f"resume={old}"
    assert main(arguments(tiny_data, tmp_path, 'sparsity.exclude=["*.out_proj"]', resume)) == 2
    assert 'the run left it dense: add "*.in_proj_weight" to sparsity.exclude' in capsys.readouterr().err
    dense = 'sparsity.exclude=["*.out_proj", "*.in_proj_weight"]'
    assert main(arguments(tiny_data, tmp_path, dense, resume)) == 0
    said = " ".join(capsys.readouterr().out.split())
    names = "2 x vit.encoder.layers.encoder_layer_*.self_attention"
    share = r"\d\d\.\d %"
    line = rf"not pruned {share} of all weights: {re.escape(names)}\.in_proj_weight {share}, "
    assert re.search(line, said), said


def test_the_line_about_what_is_not_pruned():
    shares = {"layers.0.out.weight": 0.2, "layers.1.out.weight": 0.1, "fc.weight": 0.0123, "vectors": 0.00001}
    assert unpruned_line(shares, most=2) == (
        "31.2 % of all weights: 2 x layers.*.out 30.0 %, fc 1.2 %, 1 other under 0.01 %"
    )
