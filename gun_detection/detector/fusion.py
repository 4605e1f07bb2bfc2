"""Layers that do in one operation of a GPU what takes torchvision's several, with the same result.

Where convolutions take 16 bits, one more pass over their results, to add a bias or a shortcut or to
cut off what is negative, takes as long as the convolution itself.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import FeaturePyramidNetwork


def fuse(module: nn.Module) -> None:
    """Replace the layers below `module`, whose batch norms are folded, in place."""
    if isinstance(module, nn.Sequential | IntermediateLayerGetter):
        _fuse_activations(module)
    for name, child in module.named_children():
        if isinstance(child, BasicBlock | Bottleneck):
            child = _Residual(child)
        elif isinstance(child, FeaturePyramidNetwork):
            child = _Pyramid(child)
        elif isinstance(child, nn.Conv2d) and _is_pointwise(child):
            child = _Pointwise(child)
        setattr(module, name, child)
        if not isinstance(child, _ConvolutionReLU | _Pointwise):
            fuse(child)


def _fuse_activations(layers: nn.Module) -> None:
    """Of layers that follow each other, each ReLU into the convolution before it."""
    last = ""
    for name, layer in list(layers.named_children()):
        before = getattr(layers, last, None)
        # Convolutions of groups of channels are not combined with anything everywhere.
        if type(layer) is nn.ReLU and isinstance(before, nn.Conv2d) and before.groups == 1:
            setattr(layers, last, _ConvolutionReLU(before))
            setattr(layers, name, nn.Identity())
        elif not isinstance(layer, nn.Identity):
            last = name


class _ConvolutionReLU(nn.Module):
    """A convolution, what is to be added to its result, and a ReLU."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.convolution = convolution

    def forward(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        layer = self.convolution
        assert not isinstance(layer.padding, str)
        if not x.is_cuda:
            found: Tensor = layer(x)
            return (found if added is None else found + added).relu_()
        how = (layer.stride, layer.padding, layer.dilation)
        if added is None:
            return torch.cudnn_convolution_relu(x, layer.weight, layer.bias, *how, layer.groups)
        return torch.cudnn_convolution_add_relu(
            x, layer.weight, added, 1.0, layer.bias, *how, layer.groups
        )


class _Residual(nn.Module):
    """A block of a ResNet."""

    def __init__(self, block: BasicBlock | Bottleneck) -> None:
        super().__init__()
        self.downsample = block.downsample
        self.first = _ConvolutionReLU(block.conv1)
        self.second = _ConvolutionReLU(block.conv2)
        self.third = _ConvolutionReLU(block.conv3) if isinstance(block, Bottleneck) else None

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        found: Tensor = self.first(x)
        if self.third is None:
            found = self.second(found, shortcut)
        else:
            found = self.third(self.second(found), shortcut)
        return found


class _Pointwise(nn.Module):
    """A convolution of single pixels as a product of matrices, to which a bias is added at once."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.weight = nn.Parameter(convolution.weight.detach().flatten(1))
        self.bias = convolution.bias
        self.stride = convolution.stride

    def forward(self, x: Tensor) -> Tensor:
        if self.stride != (1, 1):
            x = x[:, :, :: self.stride[0], :: self.stride[1]]
        pixels = x.permute(0, 2, 3, 1).contiguous()
        return functional.linear(pixels, self.weight, self.bias).permute(0, 3, 1, 2)


def _is_pointwise(layer: nn.Conv2d) -> bool:
    plain = layer.kernel_size == (1, 1) and layer.padding == (0, 0) and layer.groups == 1
    return plain and layer.bias is not None


class _Pyramid(nn.Module):
    """An FPN that adds a coarser level to a finer one without enlarging it first."""

    def __init__(self, pyramid: FeaturePyramidNetwork) -> None:
        super().__init__()
        self.inner_blocks, self.layer_blocks = pyramid.inner_blocks, pyramid.layer_blocks
        self.extra_blocks = pyramid.extra_blocks

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        names, maps = list(x), list(x.values())
        results: list[Tensor] = []
        coarser: Tensor | None = None
        for level in reversed(range(len(maps))):
            inner: Tensor = self.inner_blocks[level](maps[level])
            if coarser is not None:
                _add_enlarged(inner, coarser)
            coarser = inner
            results.insert(0, self.layer_blocks[level](inner))
        if self.extra_blocks is not None:
            results, names = self.extra_blocks(results, maps, names)
        return OrderedDict(zip(names, results, strict=True))


def _add_enlarged(finer: Tensor, coarser: Tensor) -> None:
    """Add a map of half the size to `finer`, in place: each of its pixels to four."""
    number, channels, height, width = finer.shape
    if (height, width) == (2 * coarser.shape[2], 2 * coarser.shape[3]):
        fours = finer.view(number, channels, height // 2, 2, width // 2, 2)
        fours.add_(coarser[:, :, :, None, :, None])
    else:
        finer.add_(functional.interpolate(coarser, size=(height, width), mode="nearest"))
