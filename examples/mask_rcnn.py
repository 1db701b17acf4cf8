"""Mask R-CNN on a ResNet-50 with a feature pyramid, as torchvision builds it, with random weights.

He et al., "Mask R-CNN", 2017 (arXiv:1703.06870), figures 1 and 4. How much the box and mask heads have to do depends on
what the network finds in the image, so this model cannot be traced as a whole and its example is a real (seeded) image.
torchvision resizes it to 800 pixels.
"""

import torch
from torch import nn

try:
    from torchvision.models.detection import maskrcnn_resnet50_fpn
except ImportError as error:
    raise ImportError(
        "examples/mask_rcnn.py needs torchvision, which cannot be imported here; install it with "
        "`pip install torchvision` (or `pip install 'pwrewrite[zoo]'`)"
    ) from error


def build_model() -> nn.Module:
    return maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)


def example_inputs() -> tuple[list[torch.Tensor], ...]:
    generator = torch.Generator().manual_seed(0)
    return ([torch.rand(3, 320, 320, generator=generator)],)
