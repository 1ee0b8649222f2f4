"""Models for images of 32 x 32 pixels or so."""

from torch import nn
from torchvision.models import resnet18


def resnet18_small_images(num_classes: int) -> nn.Module:
    """ResNet-18 as it is trained on CIFAR: a first convolution of 3x3 with stride 1, and no pooling after it, so that
    32x32 pixels are not down to 8x8 before the first block (https://arxiv.org/abs/1512.03385, section 4.2). All layers
    are drawn as torchvision's resnet18 draws them."""
    model = resnet18(num_classes=num_classes)
    model.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model
