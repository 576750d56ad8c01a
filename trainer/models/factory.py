"""Networks of one's own: "package.module:function" names what makes one.

    def make(num_classes: int, in_channels: int = 3, width: int = 64) -> nn.Module: ...

It is called with num_classes, with in_channels if it takes that, and with the recipe's model.arguments.
It gives logits, (images, num_classes), of images that are normalised.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import nn

from trainer.errors import did_you_mean

# A checkpoint names its function, too, and some that are on every machine run any code: torch.hub.load
_NOT_ONES_OWN = {"torch", *sys.stdlib_module_names}


def from_factory(name: str, num_classes: int, arguments: dict[str, Any]) -> nn.Module:
    """The model that the function `name` makes. Raises ValueError that says what is wrong: no such module or
    function, arguments that it does not take, or whatever fails in it."""
    make = _find(name)
    try:
        taken = inspect.signature(make).parameters
    except (TypeError, ValueError) as error:
        raise ValueError(f"model.name {name!r}: {error}; a function in Python is needed") from error
    if "in_channels" not in taken:
        arguments = {key: value for key, value in arguments.items() if key != "in_channels"}
    try:
        inspect.signature(make).bind(num_classes=num_classes, **arguments)
    except TypeError as error:
        given = ", ".join(["num_classes", *arguments])
        raise ValueError(
            f"model.name {name!r}: {error}; it takes ({', '.join(map(str, taken.values()))}), and is given "
            f"{given}; model.arguments={{}} leaves out those of the recipe"
        ) from error
    try:
        model = make(num_classes=num_classes, **arguments)
    except Exception as error:
        raise ValueError(f"model.name {name!r} failed: {_told(error)}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"model.name {name!r} gives a {type(model).__name__}, not a torch.nn.Module")
    return model


def _find(name: str) -> Callable[..., Any]:
    module_name, _, function = name.partition(":")
    if module_name.partition(".")[0] in _NOT_ONES_OWN:
        raise ValueError(
            f"model.name {name!r}: a network of one's own is a function of a module of one's own, "
            "not of torch or of Python itself"
        )
    module = _import(name, module_name)
    make = getattr(module, function, None)
    if not callable(make):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        file, hint = getattr(module, "__file__", module_name), did_you_mean(function, known)
        raise ValueError(f"model.name {name!r}: {file} has no function {function!r}{hint}")
    return make


def _import(name: str, module: str) -> ModuleType:
    """From the installed packages or the current folder, which only `python -m` looks into by itself."""
    from data.torchvision_import import import_torchvision

    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())
    importlib.invalidate_caches()
    try:
        import_torchvision()  # which one's own module may import without the care it may need
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError as error:  # of the package that it is in
        raise _no_module(name, error.name or module) from error
    except (ImportError, ValueError, AttributeError) as error:
        raise ValueError(f"model.name {name!r}: {error}; write package.module:function") from error
    if found is None:
        raise _no_module(name, module)
    try:
        return importlib.import_module(module)
    except Exception as error:
        raise ValueError(f"model.name {name!r}: importing {module} failed: {_told(error)}") from error


def _no_module(name: str, module: str) -> ValueError:
    return ValueError(
        f"model.name {name!r}: there is no module {module!r}, neither installed nor in {os.getcwd()}; run "
        "this in the folder that has it, or name that folder in PYTHONPATH"
    )


def _told(error: Exception) -> str:
    """With the line of one's own code that it comes from."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({place.filename}, line {place.lineno})"
