"""What compiled graphs are searched for: additions and ReLUs that stand behind a layer alone, max pooling."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node
from torch.nn import functional

ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
RELUS = (functional.relu, functional.relu_, torch.relu, torch.relu_, "relu", "relu_")
POOLS = (functional.max_pool2d, torch.max_pool2d)


def only_user(node: Node, matches: Callable[[Node], bool]) -> Node | None:
    """What uses the node, if nothing else does and it matches."""
    users = list(node.users)
    return users[0] if len(users) == 1 and matches(users[0]) else None


def is_relu(node: Node) -> bool:
    """Whether it is one by a function or a method."""
    return node.target in RELUS


def is_addition(node: Node) -> bool:
    return node.target in ADDITIONS


def summand(addition: Node, node: Node) -> Node | None:
    """What is added to the node; None where that is no node, or would be changed in place."""
    if len(addition.args) != 2 or addition.kwargs:
        return None
    first, second = addition.args
    if first is not node and addition.target in (operator.iadd, "add_"):
        return None
    other = second if first is node else first
    return other if isinstance(other, Node) and other is not node else None


def max_pool_window(node: Node) -> tuple[tuple[int, int], ...] | None:
    """(kernel, stride, padding) of a max pooling without dilation that gives no indices; None for anything
    else."""
    if node.target not in POOLS or not node.args:
        return None
    names = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    if given.get("dilation", 1) not in (1, (1, 1)) or given.get("ceil_mode") or given.get("return_indices"):
        return None
    kernel: Any = given["kernel_size"]
    sizes: tuple[Any, ...] = (kernel, given.get("stride") or kernel, given.get("padding", 0))
    return tuple((size, size) if isinstance(size, int) else tuple(size) * (2 // len(size)) for size in sizes)
