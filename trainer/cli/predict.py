"""What `acdc predict` does: a saved model's answers about single images."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.errors import UserError, as_user_error
from trainer.paths import user_path

if TYPE_CHECKING:
    import torch

SHOWN = 5  # classes of an image, at the most
BATCH = 32


def predict(options: argparse.Namespace) -> int:
    """Class names and probabilities of images, by a run's sparse model or a checkpoint."""
    import torch

    from trainer.checkpoints.saved_model import find_model, load_model
    from trainer.config.load import parse
    from trainer.config.schema import EvalConfig
    from trainer.engine import autocast, check_precision, set_up_gpu

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with as_user_error("predict"):
        folder = find_model(user_path(options.path))
        model, info = load_model(folder)
    content = {key: info["config"][key] for key in ("data", "engine") if key in info["config"]}
    config = parse(EvalConfig, content, str(folder))
    check_precision(config.engine, device)
    set_up_gpu(config.engine, device)
    described, images = info["model"], {}
    bad: list[str] = []
    for name in dict.fromkeys(options.images):
        try:
            resize = getattr(config.data, "eval_resize", described["input_shape"][1])
            images[name] = _read(user_path(name), described["input_shape"], resize)
        except (OSError, ValueError, SyntaxError) as error:
            bad.append(f"{name}: {error}")
    mean, std = (255 * torch.tensor(described[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
    names = described.get("classes") or [f"class {i}" for i in range(described["num_classes"])]
    model.eval().to(device)
    width = max(map(len, images), default=0)
    for start in range(0, len(images), BATCH):
        files = list(images)[start : start + BATCH]
        pixels = ((torch.stack([images[file] for file in files]) - mean) / std).to(device)
        with torch.no_grad(), autocast(config, device):
            shares = model(pixels).float().softmax(1).cpu()
        for file, share in zip(files, shares, strict=True):
            best = share.topk(min(SHOWN, len(names)))
            pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
            answer = ", ".join(f"{names[i]} {100 * value:.2f} %" for value, i in pairs)
            print(f"{file:{width}}  {answer}")
    if bad:
        raise UserError("\n  ".join([f"{len(bad)} of the images cannot be read:", *bad]))
    return 0


def _read(path: Path, shape: list[int], resize: int) -> torch.Tensor:
    """(channels, height, width), uint8, as evaluation sees an image: its shorter side resized, its centre cut
    out. Raises OSError, ValueError or SyntaxError for what is no image."""
    from data.torch_files import central_crop, decode

    image = decode(path, grey=shape[0] == 1)
    if tuple(image.shape[1:]) == tuple(shape[1:]) == (resize, resize):
        return image
    return central_crop(image, (resize, shape[1]))
