"""The paper's small ResNets for 32 x 32 images: ResNet20 and its family (He et al. 2016, section 4.2).

As in the paper's experiments the shortcut is a projection (1 x 1 convolution and BatchNorm), convolutions
start He-normal over fan-out, and every BatchNorm's gamma starts at 1. Names follow torchvision: conv1, bn1,
layer1.0.conv1, ..., layer2.0.downsample.0, fc.
"""

from __future__ import annotations

from torch import Tensor, nn

from trainer.models.resnet import BasicBlock, init_convolutions, stage


class ResNetCIFAR(nn.Module):
    """Three stages of (depth - 2) / 6 basic blocks with width, 2 * width and 4 * width channels.

    Input (N, in_channels, H, W) with H and W multiples of 4; output (N, num_classes) logits. stem_stride: of
    the first convolution; 2 makes every map a quarter as large. Its kernel is 3 x 3, and larger from stride 3
    on (2 * stride - 1), so that it sees every pixel. Raises ValueError for a depth that is not
    6 n + 2, and a width or stride below 1.
    """

    def __init__(
        self, depth: int, num_classes: int, width: int = 16, in_channels: int = 3, stem_stride: int = 1
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth {depth}: these ResNets have 6 n + 2 layers, e.g. 8, 20, 32, 44, 56")
        if min(width, stem_stride) < 1:
            raise ValueError(f"width {width}, stem_stride {stem_stride}: both are 1 or more")
        blocks = (depth - 2) // 6
        kernel = max(3, 2 * stem_stride - 1)
        self.conv1 = nn.Conv2d(in_channels, width, kernel, stem_stride, padding=kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = stage(BasicBlock, width, width, blocks, 1)
        self.layer2 = stage(BasicBlock, width, 2 * width, blocks, 2)
        self.layer3 = stage(BasicBlock, 2 * width, 4 * width, blocks, 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4 * width, num_classes)
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.avgpool(x).flatten(1))
