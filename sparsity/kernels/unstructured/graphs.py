"""What compiled graphs are searched for: additions and ReLUs that stand behind a layer alone."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch.fx import Node
from torch.nn import functional

ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
RELUS = (functional.relu, functional.relu_, torch.relu, torch.relu_, "relu", "relu_")


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
