"""Weights that torchvision and timm publish, by their names: torchvision:IMAGENET1K_V2, timm:a1_in1k.

Files are where those libraries keep them (torch.hub's folder, the Hugging Face cache). One that is not there
is fetched, where there is a network. Which pixel statistics published weights want is known without the file.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse

import torch

from trainer.checkpoints import checkpoint
from trainer.checkpoints.saved_model import find_model
from trainer.config.schema import ModelConfig
from trainer.distributed import ranks
from trainer.errors import EnvironmentFailure, did_you_mean
from trainer.paths import user_path

ALIKE = ("resnet18", "resnet34", "resnet50", "resnet101")  # ours, named and built as in both libraries
TIMEOUT = 30.0  # seconds without an answer
HUB_FILES = ("model.safetensors", "pytorch_model.bin")

Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std, per channel, of pixels in 0 .. 1


class Published(NamedTuple):
    """library: torchvision or timm. architecture: of the library. tag: of the weights. source: what the
    library knows of them, a torchvision Weights or a timm PretrainedCfg."""

    library: str
    architecture: str
    tag: str
    source: Any

    @property
    def statistics(self) -> Statistics:
        # torchvision's transforms know them, timm's configuration says them
        known = self.source.transforms() if self.library == "torchvision" else self.source
        return tuple(known.mean), tuple(known.std)

    def __str__(self) -> str:
        return f"weights {self.library}:{self.tag} of {self.architecture}"


def find_published(model: str, weights: str) -> Published | None:
    """What `weights` names for a model of trainer.models, or None where it is no such name but a path.

    Raises ValueError, with the names that there are, for a tag or a model that the library does not have;
    ModuleNotFoundError without the library.
    """
    library, _, tag = weights.partition(":")
    if library not in ("torchvision", "timm") or not tag:
        return None
    where, _, inner = model.rpartition(":")
    if where != library and model not in ALIKE:
        raise ValueError(
            f"weights {weights} are of {library}'s models, and {model} is not one; "
            f"model.name={library}:NAME, or model.weights=FILE"
        )
    architecture = inner.partition(".")[0]
    known = (_of_torchvision if library == "torchvision" else _of_timm)(architecture)
    if tag not in known:
        raise ValueError(
            f"{library} has no weights {tag!r} of {architecture}{did_you_mean(tag, known)} "
            f"There are: {', '.join(f'{library}:{name}' for name in known) or 'none'}"
        )
    return Published(library, architecture, tag, known[tag])


def wanted_statistics(model: ModelConfig, began: Path | None) -> Statistics | None:
    """The pixel statistics that a run's first weights were trained with, where that is known.

    began: a checkpoint of ours that the run goes on from, or branches off. Else `model.weights` says it: a
    published name, a run of ours; with a file timm's models say it.
    """
    published = None
    if began is None and model.weights is not None:
        published = find_published(model.name, model.weights)
        path = user_path(model.weights)
        if published is None and path.is_dir():
            began = find_model(path)
        elif published is None and model.name.startswith("timm:"):
            architecture = model.name.partition(":")[2].partition(".")[0]
            published = next(
                (Published("timm", architecture, *known) for known in _of_timm(architecture).items()), None
            )
    if published is not None:
        return published.statistics
    if began is None:
        return None
    info = checkpoint.read_info(began).get("model", {})
    return (tuple(info["mean"]), tuple(info["std"])) if {"mean", "std"} <= info.keys() else None


def _of_torchvision(architecture: str) -> dict[str, Any]:
    from data.torchvision_import import import_torchvision

    return dict(import_torchvision().models.get_model_weights(architecture).__members__)


def _of_timm(architecture: str) -> dict[str, Any]:
    from data.torchvision_import import import_torchvision

    import_torchvision()  # timm imports it, which needs help on some machines
    try:
        import timm
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("weights timm:TAG need timm: pip install 'acdc-train[timm]'") from error
    names = timm.list_models(f"{architecture}.*", pretrained=True)
    return {name.partition(".")[2]: timm.models.get_pretrained_cfg(name) for name in names}


def fetch(published: Published) -> Path:
    """The file, fetched where it is not on this machine: by one process a machine. Collective: call it on
    every rank. Raises EnvironmentFailure that says how to bring it here."""
    load = _from_hub if published.library == "timm" and published.source.hf_hub_id else _from_url
    path: Path | None = None
    failure: EnvironmentFailure | None = None
    if ranks.local_rank() == 0:
        try:
            path = load(published)
        except EnvironmentFailure as error:
            failure = error
    for other in ranks.all_gather(failure):
        if other is not None:
            raise other
    return path or load(published)


def _from_url(published: Published) -> Path:
    url = str(published.source.url)
    path = Path(torch.hub.get_dir(), "checkpoints", Path(urlparse(url).path).name)
    if path.is_file():
        return path
    digest = re.search(r"-([a-f0-9]{8,})\.", path.name)
    with _explained(published, url, f"put it there as {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        # whole or not at all: it is written beside and moved
        torch.hub.download_url_to_file(url, str(path), digest and digest[1], progress=ranks.is_main())
    return path


def _from_hub(published: Published) -> Path:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError

    repository, _, revision = published.source.hf_hub_id.partition("@")
    given = published.source.hf_hub_filename
    files = (given,) if given else HUB_FILES
    for file in files:
        if isinstance(found := try_to_load_from_cache(repository, file, revision=revision or None), str):
            return Path(found)
    url = f"https://huggingface.co/{repository}/resolve/{revision or 'main'}/{files[0]}"
    with _explained(published, url, "copy the cache ($HF_HOME) of a machine that has it"):
        for file in files[:-1]:
            try:
                return Path(hf_hub_download(repository, file, revision=revision or None))
            except LocalEntryNotFoundError:  # no network: the next name would wait for it as well
                raise
            except EntryNotFoundError:
                continue
        return Path(hf_hub_download(repository, files[-1], revision=revision or None))


@contextmanager
def _explained(published: Published, url: str, place: str) -> Iterator[None]:
    """Turn whatever goes wrong while fetching into a message; wait for no answer longer than TIMEOUT."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        yield
    except Exception as error:  # of the network, in the many classes of two libraries
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise EnvironmentFailure(
            f"{published} are not on this machine, and cannot be fetched: {reason}\n"
            f"where there is a network: curl -LO {url}\n"
            f"then name the file, model.weights=FILE, or {place}; model.weights=null trains from scratch"
        ) from error
    finally:
        socket.setdefaulttimeout(before)
