"""Changes of a finished model's graph, where torch.fx can follow it."""

from __future__ import annotations

import itertools
import logging
import operator
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node
from torch.fx.experimental.optimization import fuse

from sparsity.inference.chain import Chain, Step
from sparsity.kernels.unstructured.graphs import is_addition, is_relu, only_user, summand

log = logging.getLogger(__name__)


def fold_batch_norm(model: nn.Module) -> nn.Module:
    """A model in evaluation mode without the BatchNorms behind its convolutions, where torch.fx can follow
    it; elsewhere as it is."""
    try:
        return fuse(model)
    except Exception as error:
        log.warning("BatchNorm is not folded: torch.fx cannot follow the model (%s)", error)
        return model


def dense_beside(model: GraphModule, sparse: type[nn.Module]) -> Iterator[str]:
    """Names of the dense convolutions whose maps meet those of sparse layers, in shortcuts: compiled code
    that reads two memory formats at once takes many times as long, so these change it themselves."""
    origins: dict[Node, set[str]] = {}  # the last layers that a node's maps come from
    for node in model.graph.nodes:
        if isinstance(_module(model, node), nn.Conv2d | nn.Linear):
            origins[node] = {node.target}
            continue
        origins[node] = set().union(*(origins[given] for given in node.all_input_nodes))
        layers = {name: model.get_submodule(name) for name in origins[node]}
        if len(node.all_input_nodes) > 1 and any(isinstance(layer, sparse) for layer in layers.values()):
            yield from (name for name, layer in layers.items() if type(layer) is nn.Conv2d)


def take_in(model: GraphModule, takes: Callable[[nn.Module], bool]) -> None:
    """Give the layers that take it the addition and the ReLU behind them: layer(input, other, relu)."""

    def is_any_relu(node: Node) -> bool:
        return is_relu(node) or type(_module(model, node)) is nn.ReLU

    for node in list(model.graph.nodes):
        layer = _module(model, node)
        if layer is None or not takes(layer) or len(node.args) != 1:
            continue
        taken, other = [node], None
        addition = only_user(node, is_addition)
        if addition is not None and len(node.args[0].users) == 1:  # the layer moves behind the summand
            other = summand(addition, node)
        if other is not None:
            taken.append(addition)
        relu = only_user(taken[-1], is_any_relu)
        if relu is not None:
            taken.append(relu)
        if len(taken) > 1:
            # at an addition, whose summand may be computed behind the layer; a ReLU alone takes nothing else
            with model.graph.inserting_before(node if other is None else taken[-1]):
                whole = model.graph.call_module(node.target, (node.args[0], other, relu is not None))
            taken[-1].replace_all_uses_with(whole)
            for old in reversed(taken):
                model.graph.erase_node(old)
    model.recompile()


def join(model: GraphModule, takes: Callable[[nn.Module], bool]) -> None:
    """Compute neighbours that it takes, which take_in has gone through before, in one call."""
    neighbours: list[list[Node]] = [[]]
    for node in model.graph.nodes:
        layer = _module(model, node)
        if layer is not None and takes(layer) and not node.kwargs:
            neighbours[-1].append(node)
        elif neighbours[-1]:
            neighbours.append([])
    names = (f"chain{number}" for number in itertools.count())
    free = (name for name in names if not hasattr(model, name))
    for nodes in neighbours:
        if len(nodes) > 1:
            _join(model, nodes, next(free))
    model.recompile()


def _join(model: GraphModule, nodes: list[Node], name: str) -> None:
    used = dict.fromkeys(given for node in nodes for given in node.all_input_nodes)
    inputs = [node for node in used if node not in nodes]
    values = {node: value for value, node in enumerate([*inputs, *nodes])}
    outputs = [node for node in nodes if any(user not in nodes for user in node.users)]
    steps = []
    for node in nodes:
        given: Any = node.args
        input, other, relu = (*given, None, False)[:3]
        steps.append(Step(model.get_submodule(str(node.target)), values[input], values.get(other), relu))
    model.add_submodule(name, Chain(steps, len(inputs), [values[node] for node in outputs]))
    with model.graph.inserting_after(nodes[-1]):
        whole = model.graph.call_module(name, tuple(inputs))
    with model.graph.inserting_after(whole):
        for place, node in enumerate(outputs):
            of_node = model.graph.call_function(operator.getitem, (whole, place))
            node.replace_all_uses_with(of_node, lambda user: user not in nodes)
    for node in reversed(nodes):
        model.graph.erase_node(node)


def _module(model: GraphModule, node: Node) -> nn.Module | None:
    return model.get_submodule(str(node.target)) if node.op == "call_module" else None
