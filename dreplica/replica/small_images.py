"""Models for images of about 32 x 32 pixels."""

from torch import nn
from torchvision.models import resnet18


def resnet18_small_images(num_classes: int) -> nn.Module:
    """Build the ResNet-18 that is usually trained on CIFAR.

    Its first convolution is 3x3 with stride 1, and no pooling follows, so that images of 32x32 pixels are not reduced
    to 8x8 before the first block (https://arxiv.org/abs/1512.03385, section 4.2). All layers are initialized as in
    torchvision's resnet18. Use it with `model.factory: dreplica.replica.small_images:resnet18_small_images`.
    """
    model = resnet18(num_classes=num_classes)
    model.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model
