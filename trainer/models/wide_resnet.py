"""WideResNet (Zagoruyko and Komodakis 2016) in the variant that the paper trains on CIFAR-100.

Pre-activation blocks whose convolutions have biases, with dropout between them and the stride on the *second*
3 x 3, so that the first of a stage runs at full resolution; the shortcut's 1 x 1 convolution takes the raw
input. The last BatchNorm has momentum 0.9. Convolutions start as torch's defaults. Names: conv1,
layer1.0.bn1, layer1.0.conv1, layer1.0.shortcut.0, ..., bn1, linear.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from trainer.models.dropout import Dropout


class WideBlock(nn.Module):
    def __init__(self, in_planes: int, planes: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, planes, 3, padding=1)
        self.dropout = Dropout(dropout)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, padding=1)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Sequential(nn.Conv2d(in_planes, planes, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        y = self.dropout(self.conv1(functional.relu(self.bn1(x))))
        y = self.conv2(functional.relu(self.bn2(y)))
        return y + self.shortcut(x)


class WideResNet(nn.Module):
    """depth 6 n + 4, three stages of n blocks with 16, 32 and 64 times `width` channels.

    Input (N, in_channels, 32, 32); output (N, num_classes) logits. Raises ValueError for another depth.
    """

    def __init__(
        self,
        num_classes: int = 100,
        depth: int = 28,
        width: int = 10,
        dropout: float = 0.3,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth {depth}: WideResNets have 6 n + 4 layers, e.g. 10, 16, 22, 28, 40")
        if width < 1:
            raise ValueError(f"width {width}: the widening factor, 1 or more")
        blocks, planes = (depth - 4) // 6, [16 * width, 32 * width, 64 * width]
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1)
        self.layer1 = _stage(16, planes[0], blocks, 1, dropout)
        self.layer2 = _stage(planes[0], planes[1], blocks, 2, dropout)
        self.layer3 = _stage(planes[1], planes[2], blocks, 2, dropout)
        self.bn1 = nn.BatchNorm2d(planes[2], momentum=0.9)
        self.linear = nn.Linear(planes[2], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        x = functional.adaptive_avg_pool2d(functional.relu(self.bn1(x)), 1)
        return self.linear(x.flatten(1))


def _stage(in_planes: int, planes: int, num_blocks: int, stride: int, dropout: float) -> nn.Sequential:
    first = WideBlock(in_planes, planes, stride, dropout)
    return nn.Sequential(first, *(WideBlock(planes, planes, 1, dropout) for _ in range(num_blocks - 1)))
