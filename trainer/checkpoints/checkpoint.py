"""Folders of files that are either whole or not there, and that tell when a bit in them has changed.

A checkpoint is a folder with torch files and `manifest.json`, which holds the SHA-256 of each and of itself.
It is written under another name, synced to the disk and renamed, so a run killed at any moment leaves the
previous checkpoint. Files are read with weights_only=True: nothing in them is ever executed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch

from data.atomic import sync_folder, whole, write_text

log = logging.getLogger(__name__)

FORMAT = 2  # 1 had no digest of the manifest itself
MANIFEST = "manifest.json"
OWN_DIGEST = "manifest_sha256"
STATE, MODEL = "state.pt", "model.pt"


class CheckpointError(ValueError):
    """Not a checkpoint, or a damaged one; the message names the folder and says which."""


def save(folder: Path, contents: Mapping[str, Any], info: Mapping[str, Any]) -> None:
    """Write `contents` (file name -> what torch.save takes) and the manifest with `info` as `folder`, at
    once.

    Raises OSError when the disk refuses; what was at `folder` before is then still there. The folder that it
    is in is made, but not those above: a run whose folder was removed must not go on in a new one.
    """
    folder.parent.mkdir(exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        digests = {}
        for name, content in contents.items():
            with whole(partial / name) as file:
                _write(content, file, folder / name)
            digests[name] = sha256(partial / name)
        manifest = {"format": FORMAT, "sha256": digests, "info": info}
        manifest[OWN_DIGEST] = digest_of(manifest)
        write_text(partial / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        sync_folder(partial)
        replaced = folder.with_name(f".{folder.name}.replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        if folder.exists():
            folder.rename(replaced)
        partial.rename(folder)
        sync_folder(folder.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(content: Any, file: IO[bytes], name: Path) -> None:
    try:
        torch.save(content, file)
    except RuntimeError as error:  # torch's writer ends in one of its own over what the disk said
        said = error.__context__ if isinstance(error.__context__, OSError) else error
        raise OSError(f"{name} cannot be written: {said}") from error


def read_info(folder: Path) -> dict[str, Any]:
    """The info of a checkpoint, every file checked against its SHA-256. Raises CheckpointError."""
    return _checked(folder)["info"]


def _checked(folder: Path) -> dict[str, Any]:
    manifest = _manifest(folder)
    for name, expected in manifest["sha256"].items():
        try:
            actual = sha256(folder / name)
        except OSError as error:
            raise CheckpointError(f"{folder} is a damaged or incomplete checkpoint: {error}") from error
        if actual != expected:
            raise CheckpointError(f"{folder / name} is damaged: its SHA-256 is not the one in {MANIFEST}")
    return manifest


def read(folder: Path, name: str) -> Any:
    """One file's content on the CPU, after read_info's check. Raises CheckpointError."""
    if name not in _checked(folder)["sha256"]:
        raise CheckpointError(f"{folder} holds no {name} that its {MANIFEST} vouches for")
    try:
        return torch.load(folder / name, map_location="cpu", weights_only=True)
    except Exception as error:  # a file made to harm has torch.load raise anything
        raise CheckpointError(f"{folder / name} cannot be read: {error}") from error


def training_checkpoints(folder: Path) -> list[Path]:
    """The folders of training states below `folder`, oldest step first, damaged ones too."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def newest_whole(folder: Path) -> Path | None:
    """The newest training state that passes its check; damaged ones are skipped with a warning."""
    for path in reversed(training_checkpoints(folder)):
        try:
            read_info(path)
        except CheckpointError as error:
            log.warning("skipped: %s", error)
        else:
            return path
    return None


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"step-{step:09d}"


def set_aside(folder: Path, step: int) -> None:
    """Rename the training states after `step`, which a run resumed from there is about to replace."""
    for path in training_checkpoints(folder):
        if path > step_folder(folder, step):
            set_folder_aside(path)


def set_folder_aside(path: Path) -> None:
    """Rename a folder, if it is there, to superseded-<its name>, in place of an earlier one of that name."""
    if path.exists():
        aside = path.with_name(f"superseded-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)


def remove_old(folder: Path, keep: int) -> None:
    """Remove all training states but the newest `keep`, and what a killed run left half done."""
    for path in training_checkpoints(folder)[:-keep]:
        path.rename(path.with_name(f".{path.name}.removed"))  # from here on it is not a checkpoint
    for path in folder.glob(".*"):
        shutil.rmtree(path, ignore_errors=True)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def digest_of(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of all that a manifest says, whatever its layout as a text."""
    said = {key: manifest[key] for key in ("format", "sha256", "info")}
    text = json.dumps(json.loads(json.dumps(said)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version, digests, info = manifest["format"], manifest["sha256"], manifest["info"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{folder} is not a checkpoint: no readable {MANIFEST} in it ({error})"
        ) from error
    if version not in (1, FORMAT):
        raise CheckpointError(
            f"{folder} has checkpoint format {version}; this version reads formats 1 and {FORMAT}"
        )
    if not isinstance(digests, dict) or not isinstance(info, dict):
        raise CheckpointError(f"{folder} is not a checkpoint: its {MANIFEST} has no table of files")
    if manifest.get(OWN_DIGEST) != (None if version == 1 else digest_of(manifest)):
        raise CheckpointError(f"{folder / MANIFEST} is damaged: its own SHA-256 is another")
    return manifest
