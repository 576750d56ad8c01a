"""MobileNetV1 (Howard et al. 2017) as the paper trains it, with its width multiplier.

Names: model.0 is the stem (0 convolution, 1 BatchNorm), model.1 to model.13 are the separable blocks (0
depthwise, 1 BatchNorm, 3 pointwise, 4 BatchNorm), then fc. Convolutions start as torch's defaults.
"""

from __future__ import annotations

from torch import Tensor, nn

# output channels and stride of the 13 separable blocks, at width 1
BLOCKS = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]


class MobileNetV1(nn.Module):
    """Input (N, in_channels, H, W), at ImageNet 224 x 224; output (N, num_classes) logits.

    width: multiplies every number of channels but input and output; 0.25, 0.5, 0.75 and 1 are usual. Raises
    ValueError where a number of channels would not be a whole number.
    """

    def __init__(self, num_classes: int = 1000, width: float = 1.0, in_channels: int = 3) -> None:
        super().__init__()
        planes = [_scaled(channels, width) for channels in (32, *(channels for channels, _ in BLOCKS))]
        layers = [
            nn.Sequential(
                nn.Conv2d(in_channels, planes[0], 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(planes[0]),
                nn.ReLU(inplace=True),
            )
        ]
        for inputs, outputs, (_, stride) in zip(planes, planes[1:], BLOCKS, strict=False):
            layers.append(_separable(inputs, outputs, stride))
        self.model = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(planes[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.avgpool(self.model(x)).flatten(1))


def _separable(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, inputs, 3, stride, padding=1, groups=inputs, bias=False),
        nn.BatchNorm2d(inputs),
        nn.ReLU(inplace=True),
        nn.Conv2d(inputs, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


def _scaled(channels: int, width: float) -> int:
    scaled = round(channels * width)
    if scaled < 1 or scaled != channels * width:
        raise ValueError(
            f"width {width}: {channels} channels times it is not a whole number; e.g. 0.25, 0.5, 0.75, 1"
        )
    return scaled
