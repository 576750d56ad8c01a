"""The C++ of this room, built for this machine at its first use, and its functions by ctypes.

A build takes some seconds and lies beside torch.compile's, by a name that tells source, compiler and
instructions apart: another machine, or another version, has another file.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsity.kernels.interface import KernelUnavailableError

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "native"
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fopenmp", "-fPIC", "-shared")
TIMEOUT = 300.0  # seconds

_int32, _int64, _pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


class Geometry(ctypes.Structure):
    """See native/layer.cpp."""

    _fields_ = (
        *((name, _int32) for name in ("outputs", "inputs", "groups", "height", "width")),
        *((f"{name}_{axis}", _int32) for name in ("stride", "padding", "dilation") for axis in "yx"),
        ("strides", _int64 * 4),
    )


class Size(ctypes.Structure):
    """See native/layer.cpp."""

    _fields_ = (
        ("images", _int64),
        *((name, _int32) for name in ("in_height", "in_width", "out_height", "out_width")),
    )


class Tile(ctypes.Structure):
    """See native/plan.h."""

    _fields_ = tuple((name, _int32) for name in ("rows", "columns", "units", "slab_bytes"))


class Epilogue(ctypes.Structure):
    """See native/convolve.h."""

    _fields_ = (("bias", _pointer), ("other", _pointer), ("relu", _int32))


class Step(ctypes.Structure):
    """See native/layer.cpp."""

    _fields_ = (
        ("layer", _pointer),
        ("size", Size),
        ("epilogue", Epilogue),
        *((name, _int32) for name in ("input", "other", "output", "past_caches")),
    )


class Norm(ctypes.Structure):
    """See native/batch_norm.h."""

    _fields_ = (
        *((name, _int64) for name in ("channels", "count")),
        ("epsilon", ctypes.c_float),
        *((name, _int32) for name in ("behind", "past_caches")),
    )


class Pool(ctypes.Structure):
    """See native/max_pool.h."""

    _fields_ = (
        *((name, _int64) for name in ("channels", "images")),
        *((f"{side}_{size}", _int32) for side in ("in", "out") for size in ("height", "width")),
        *((name, _int32) for name in ("height", "width")),
        *((f"{name}_{axis}", _int32) for name in ("stride", "padding") for axis in "yx"),
    )


class BuildError(KernelUnavailableError):
    """There is no compiler, or it failed; the message says which and why."""


def instructions() -> tuple[str, ...]:
    """Compiler flags for the vector instructions that torch uses here: ATEN_CPU_CAPABILITY counts."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability == "AVX512":
        flags = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma")
        return (*flags, "-mavx512bf16") if torch.cpu._is_avx512_bf16_supported() else flags
    return ("-mavx2", "-mfma") if capability == "AVX2" else ()


def vector_bytes() -> int:
    """Of a register with these instructions, as in native/vector.h."""
    return {"-mavx512f": 64, "-mavx2": 32}.get(next(iter(instructions()), ""), 16)


def find_compiler() -> str | None:
    """The C++ compiler that torch.compile uses, too, or None."""
    known = filter(None, (os.environ.get("CXX"), "g++", "clang++"))
    return next(filter(None, map(shutil.which, known)), None)


def load() -> ctypes.CDLL:
    """Build where that was not done before, and load. Raises BuildError; later calls raise it at once."""
    found = _load_once()
    if isinstance(found, BuildError):
        raise found
    return found


def run(function: str, *arguments: Any) -> None:
    """Call a function of native/layer.cpp on torch's threads, their number last. Tensors go by where they
    begin in memory, structures by reference, a dtype by whether it is bfloat16; None is null."""
    getattr(load(), function)(*map(_native, arguments), torch.get_num_threads())


def _native(argument: Any) -> Any:
    if argument is None or isinstance(argument, int):  # first, as the quickest to know
        return argument
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    if isinstance(argument, ctypes.Structure):
        return ctypes.byref(argument)
    return argument == torch.bfloat16 if isinstance(argument, torch.dtype) else argument


@functools.cache
def _load_once() -> ctypes.CDLL | BuildError:
    try:
        return _load()
    except BuildError as error:
        return error


def _load() -> ctypes.CDLL:
    compiler = find_compiler()
    if compiler is None:
        raise BuildError("no C++ compiler (g++ or clang++)")
    try:
        flags = (*FLAGS, *instructions(), *shlex.split(os.environ.get("CXXFLAGS", "")))
        command = [compiler, *flags, str(SOURCES / "layer.cpp")]
        path = _cache_folder() / f"acdc-kernels-{_digest(command)}.so"
        if not path.exists():
            _build(command, path)
        library = ctypes.CDLL(str(path))
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:  # ValueError: of CXXFLAGS
        raise BuildError(f"{compiler}: {error}") from error
    _declare(library)
    return library


def _cache_folder() -> Path:
    """What is in it is loaded and run. Raises BuildError where another user has put it there before."""
    if given := os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        return Path(given)
    folder = Path(tempfile.gettempdir()) / f"acdc-kernels-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.lstat().st_uid != os.getuid():
        raise BuildError(
            f"{folder} belongs to another user: set TORCHINDUCTOR_CACHE_DIR to a folder of yours"
        )
    folder.chmod(0o700)
    return folder


def _digest(command: list[str]) -> str:
    version = subprocess.run(
        [command[0], "--version"], capture_output=True, timeout=TIMEOUT, check=False
    ).stdout
    return hashlib.sha256(repr(command).encode() + version + sources_digest().encode()).hexdigest()[:24]


def sources_digest() -> str:
    """Tells versions of the kernels apart."""
    digest = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:8]


def _build(command: list[str], path: Path) -> None:
    began = time.monotonic()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        command = [*command, "-o", str(built)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
        if result.returncode:
            raise BuildError(f"{command[0]} failed: {_first_error(result.stderr)}")
        os.replace(built, path)  # several processes may build at once
    log.info("sparse CPU kernels built in %.0f s", time.monotonic() - began)


def _first_error(text: str) -> str:
    lines = text.strip().splitlines() or ["no message"]
    return next((line for line in lines if "error" in line), lines[-1])


def _declare(library: ctypes.CDLL) -> None:
    """What returns nothing stays as ctypes takes it, with an int that nobody reads."""
    library.layer_new.restype = _pointer
    library.layer_new.argtypes = (_pointer, _pointer, _pointer, ctypes.c_int)
    library.layer_new_forward.restype = _pointer
    library.layer_new_forward.argtypes = (_pointer, _pointer, _pointer, ctypes.c_int, *[_int64] * 3)
    library.layer_free.argtypes = (_pointer,)
    library.layer_freeze.argtypes = (_pointer, _pointer, ctypes.c_int)
    products = (*(_pointer,) * 5, ctypes.c_int, ctypes.c_int)
    library.layer_forward.argtypes = library.layer_input_gradient.argtypes = products
    library.layer_infer.argtypes = products
    library.layers_infer.argtypes = (_pointer, _int32, _pointer, ctypes.c_int)
    library.layer_weight_gradient.argtypes = (*products[:5], ctypes.c_int)
    library.batch_norm.argtypes = (_pointer, ctypes.c_int, *(_pointer,) * 6, ctypes.c_int)
    library.batch_norm_gradient.argtypes = (_pointer, ctypes.c_int, *(_pointer,) * 10, ctypes.c_int)
    library.max_pool.argtypes = (_pointer, ctypes.c_int, *(_pointer,) * 3, ctypes.c_int)
    library.max_pool_gradient.argtypes = (_pointer, ctypes.c_int, *(_pointer,) * 3, ctypes.c_int)
    library.transpose_maps.argtypes = (_pointer, _pointer, *(_int64,) * 3, *(ctypes.c_int,) * 4)
