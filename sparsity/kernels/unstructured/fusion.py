"""A backend of torch.compile that gives kernels to what stands between layers on sparse kernels, too.

    torch.compile(model, backend=sparsity.inductor)

It is Inductor, for a graph that was changed: where maps lie in memory with their images innermost, BatchNorm
in training with the addition and the ReLU behind it becomes acdc::batch_norm, and max pooling acdc::max_pool;
a change to that format moves up past these. In graphs without sparse kernels nothing changes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from sparsity.kernels.unstructured import batch_norm, pooling
from sparsity.kernels.unstructured.graphs import (
    is_addition,
    is_relu,
    max_pool_window,
    only_user,
    summand,
)

_TO_INNERMOST = torch.ops.acdc.to_innermost.default


def inductor(graph: fx.GraphModule, inputs: list[Any], **options: Any) -> Callable[..., Any]:
    """As torch.compile calls a backend."""
    fuse(graph)
    compiled: Callable[..., Any] = torch._dynamo.lookup_backend("inductor")(graph, inputs, **options)
    return compiled


def fuse(graph: fx.GraphModule) -> int:
    """Change the graph, which Dynamo made, in place; how many operators were replaced."""
    nodes = graph.graph.nodes
    for node in [node for node in nodes if node.target is _TO_INNERMOST]:
        _move_up(graph.graph, node)
    found = [node for node in nodes if _has_kernel(node) and _is_innermost(node.args[0])]
    for node in found:
        replace = _replace_norm if _is_norm(node) else _replace_pool
        replace(graph.graph, node)
    if found:
        graph.graph.lint()
        graph.recompile()
    return len(found)


def _move_up(graph: fx.Graph, change: fx.Node) -> None:
    """Change the format where the maps come from, not behind their BatchNorm, ReLU and pooling."""
    behind: list[fx.Node] = []
    source: Any = change.args[0]
    while isinstance(source, fx.Node) and (_has_kernel(source) or _keeps_maps(source)):
        behind.append(source)
        source = source.args[0]
    if not _is_innermost(source):
        while behind and _keeps_maps(behind[-1]):  # a ReLU in place would change the moved maps alone
            source = behind.pop()
        if not behind:
            return
        with graph.inserting_before(behind[-1]):
            moved = graph.call_function(_TO_INNERMOST, (source,))
        moved.meta["example_value"] = _innermost(source.meta["example_value"])
        behind[-1].replace_input_with(source, moved)
    for node in behind:
        node.meta["example_value"] = _innermost(node.meta["example_value"])
    change.replace_all_uses_with(change.all_input_nodes[0])
    graph.erase_node(change)


def _has_kernel(node: fx.Node) -> bool:
    """Whether there is a kernel, once its maps have the format."""
    window = max_pool_window(node)
    if not (window or _is_norm(node)):
        return False
    maps = node.args[0].meta.get("example_value")  # type: ignore[union-attr]
    if not isinstance(maps, Tensor) or maps.dim() != 4:
        return False
    return pooling.takes(maps, window[0]) if window else batch_norm.takes(_innermost(maps))


def _innermost(value: Any) -> Tensor:
    innermost: Tensor = value.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    return innermost


def _is_innermost(node: Any) -> bool:
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return isinstance(value, Tensor) and batch_norm.takes(value)


def _keeps_maps(node: fx.Node) -> bool:
    """Whether it is a ReLU, or a conversion to the dtype that its maps have."""
    if not node.args or node.kwargs.keys() - {"inplace"}:
        return False
    if node.target == "to" and isinstance(node.args[0], fx.Node):
        before, after = node.args[0].meta.get("example_value"), node.meta.get("example_value")
        return isinstance(before, Tensor) and isinstance(after, Tensor) and before.dtype == after.dtype
    return is_relu(node)


def _is_norm(node: fx.Node) -> bool:
    """Whether it is a BatchNorm in training, with plain weights and a momentum."""
    if node.target is not functional.batch_norm or node.kwargs or len(node.args) != 8:
        return False
    _, mean, _, weight, bias, training, momentum, _ = node.args
    momentum_is_known = mean is None or isinstance(momentum, float)
    return training is True and momentum_is_known and all(map(_is_plain, (weight, bias)))


def _is_plain(node: Any) -> bool:
    """Whether it is numbers one after another, in float32."""
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return isinstance(value, Tensor) and value.dtype == torch.float32 and value.is_contiguous()


def _replace_pool(graph: fx.Graph, pool: fx.Node) -> None:
    window = max_pool_window(pool)
    assert window is not None
    with graph.inserting_before(pool):
        both = graph.call_function(torch.ops.acdc.max_pool.default, (pool.args[0], *window))
        output = graph.call_function(operator.getitem, (both, 0))
    output.meta.update(pool.meta)
    pool.replace_all_uses_with(output)
    graph.erase_node(pool)


def _replace_norm(graph: fx.Graph, norm: fx.Node) -> None:
    maps, mean, variance, weight, bias, _, momentum, epsilon = norm.args
    fused, other, place = [norm], None, norm
    shared = isinstance(mean, fx.Node) and len(mean.users) > 1  # others may need it before the addition
    if (relu := only_user(norm, is_relu)) is not None:
        fused = [norm, relu]
    elif not shared and (addition := only_user(norm, is_addition)) is not None:
        added, relu = summand(addition, norm), only_user(addition, is_relu)
        if relu is not None and added is not None and _is_like(added, norm):
            fused, other, place = [norm, addition, relu], added, addition
    last = fused[-1]
    with graph.inserting_before(place):
        operands = (maps, other, weight, bias, epsilon, last is not norm)
        both = graph.call_function(torch.ops.acdc.batch_norm.default, operands)
        output, statistics = (graph.call_function(operator.getitem, (both, index)) for index in (0, 1))
        if mean is not None:
            statistics = graph.call_method("detach", (statistics,))
            for running, row in ((mean, 0), (variance, 2)):
                now = graph.call_function(operator.getitem, (statistics, row))
                graph.call_method("lerp_", (running, now, momentum))
    output.meta.update(last.meta)
    last.replace_all_uses_with(output)
    for node in reversed(fused):
        graph.erase_node(node)


def _is_like(added: fx.Node, norm: fx.Node) -> bool:
    if not _is_innermost(added):
        return False
    one, other = added.meta["example_value"], norm.meta["example_value"]
    return bool(one.shape == other.shape and one.dtype == other.dtype)
