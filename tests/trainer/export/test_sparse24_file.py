import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from sparsity import NM
from trainer.export.sparse24_file import SHAPES, export_sparse24, packed_share, read_sparse24


def make():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 32, 3), nn.Linear(32, 24), nn.Linear(24, 10)
    )
    for layer in (net[2], net[3]):
        layer.weight.data *= NM(2, 4)({"w": layer.weight})["w"]
    return net


def test_what_is_read_is_what_was_written_bit_for_bit(tmp_path):
    net, path = make(), tmp_path / "a.safetensors"
    export_sparse24(net, {"name": "net"}, path)
    state = read_sparse24(path)
    assert state.keys() == net.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())
    with safe_open(path, "pt") as file:
        shapes = json.loads(file.metadata()["sparse24"])
        assert file.metadata()["name"] == "net"
        assert file.get_tensor("2.weight.values").shape == (32, 3 * 3 * 16 // 2)
        assert file.get_tensor("2.weight.places").shape == (32, 3 * 3 * 16 // 8)
    assert shapes == {"2.weight": [32, 16, 3, 3], "3.weight": [24, 32]}
    assert packed_share(net) < 0.62


def test_attentions_projections_are_packed(tmp_path):
    net = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2)})
    for weight in (net["attention"].in_proj_weight, net["attention"].out_proj.weight):
        weight.data *= NM(2, 4)({"w": weight})["w"]
    export_sparse24(net, {}, path := tmp_path / "a.safetensors")
    state = read_sparse24(path)
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())
    with safe_open(path, "pt") as file:
        packed = {"attention.in_proj_weight": [48, 16], "attention.out_proj.weight": [16, 16]}
        assert json.loads(file.metadata()["sparse24"]) == packed


def test_a_model_without_zeros_has_nothing_to_pack(tmp_path):
    with pytest.raises(ValueError, match=r"no layer is 2:4.*sparsity\.pattern=2:4"):
        export_sparse24(nn.Sequential(nn.Linear(32, 16)), {}, tmp_path / "a")


def test_another_file_is_refused(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "plain.safetensors")
    (tmp_path / "none.safetensors").write_bytes(b"no file of that kind")
    shapes = ("[1]", '{"a": 1}', '{"b": [2, 2]}', "[" * 5000)
    for number, text in enumerate(shapes):
        save_file({"a": torch.zeros(2)}, tmp_path / f"{number}.safetensors", {SHAPES: text})
    for name in ("plain", "none", *range(len(shapes))):
        with pytest.raises(ValueError, match=f"{name}.safetensors is not a file of acdc export"):
            read_sparse24(tmp_path / f"{name}.safetensors")
