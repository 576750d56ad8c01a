import json

import pytest

from trainer.config.schema import LRConfig
from trainer.optim import learning_rate


@pytest.mark.parametrize(
    ("recipe", "config"),
    [
        ("iht_imagenet_resnet50_insta_cosinelr_s90_ep100.yaml", LRConfig(kind="cosine", warmup_epochs=5)),
        ("iht_imagenet_resnet50_insta_cosinelr_s90_ep150.yaml", LRConfig(kind="cosine", warmup_epochs=5)),
        (
            "iht_cifar100_wideresnet_steplr_freq20_s90.yaml",
            LRConfig(kind="step", milestones=[76, 116, 156], gamma=0.1),
        ),
    ],
)
def test_learning_rates_equal_the_papers_in_every_epoch(recipe, config, golden):
    recorded = json.loads((golden / "recipes.json").read_text())["recipes"][recipe]
    num_epochs = recorded["total_epochs"]
    base_lr = recorded["optimizer"]["lr"]
    ours = [learning_rate(config, base_lr, epoch, num_epochs) for epoch in range(num_epochs)]
    assert ours == pytest.approx(recorded["lr_per_epoch"][:num_epochs], rel=1e-9)


def test_constant():
    assert learning_rate(LRConfig(kind="constant", warmup_epochs=2), 0.4, 0, 10) == 0.2
    assert learning_rate(LRConfig(kind="constant", warmup_epochs=2), 0.4, 9, 10) == 0.4
