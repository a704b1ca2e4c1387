"""Plain PyTorch twins of the networks and blocks, written the usual way: one module for every step."""

import functools

import torch
import torch.nn.functional as F
from torch import nn


def _bias(norm_layer):
    return getattr(norm_layer, "func", norm_layer) is nn.InstanceNorm2d


class ResnetBlock(nn.Module):
    def __init__(self, dim, padding_type, norm_layer, use_dropout, use_bias):
        super().__init__()
        pads = {"reflect": nn.ReflectionPad2d, "replicate": nn.ReplicationPad2d}
        layers = []
        for last in (False, True):
            if padding_type in pads:
                layers.append(pads[padding_type](1))
            layers.append(nn.Conv2d(dim, dim, 3, padding=int(padding_type == "zero"), bias=use_bias))
            layers.append(norm_layer(dim))
            if not last:
                layers.append(nn.ReLU(True))
                if use_dropout:
                    layers.append(nn.Dropout(0.5))
        self.conv_block = nn.Sequential(*layers)

    def forward(self, x):
        return x + self.conv_block(x)


class ResnetGenerator(nn.Module):
    def __init__(
        self, input_nc, output_nc, ngf=64, norm_layer=nn.BatchNorm2d, use_dropout=False, n_blocks=6,
        padding_type="reflect", decoder="transposed",
    ):  # fmt: skip
        super().__init__()
        bias = _bias(norm_layer)
        layers = [nn.ReflectionPad2d(3), nn.Conv2d(input_nc, ngf, 7, bias=bias), norm_layer(ngf), nn.ReLU(True)]
        for c in (ngf, ngf * 2):
            layers += [nn.Conv2d(c, c * 2, 3, 2, 1, bias=bias), norm_layer(c * 2), nn.ReLU(True)]
        layers += [ResnetBlock(ngf * 4, padding_type, norm_layer, use_dropout, bias) for _ in range(n_blocks)]
        for c in (ngf * 4, ngf * 2):
            if decoder == "transposed":
                layers.append(nn.ConvTranspose2d(c, c // 2, 3, 2, 1, 1, bias=bias))
            else:
                layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True))
                layers += [nn.ReflectionPad2d(1), nn.Conv2d(c, c // 2, 3)]
            layers += [norm_layer(c // 2), nn.ReLU(True)]
        self.model = nn.Sequential(*layers, nn.ReflectionPad2d(3), nn.Conv2d(ngf, output_nc, 7), nn.Tanh())

    def forward(self, x):
        return self.model(x)


class UnetBlock(nn.Module):
    def __init__(self, outer, inner, channels_in, inside, norm_layer, kind, dropout=False):
        super().__init__()
        self.kind = kind
        bias = _bias(norm_layer)
        down = nn.Conv2d(channels_in or outer, inner, 4, 2, 1, bias=bias)
        lrelu, relu = nn.LeakyReLU(0.2, True), nn.ReLU(True)
        if kind == "outermost":
            up = nn.ConvTranspose2d(inner * 2, outer, 4, 2, 1)
            self.model = nn.Sequential(down, inside, relu, up, nn.Tanh())
        elif kind == "innermost":
            up = nn.ConvTranspose2d(inner, outer, 4, 2, 1, bias=bias)
            self.model = nn.Sequential(lrelu, down, relu, up, norm_layer(outer))
        else:
            up = nn.ConvTranspose2d(inner * 2, outer, 4, 2, 1, bias=bias)
            layers = [lrelu, down, norm_layer(inner), inside, relu, up, norm_layer(outer)]
            self.model = nn.Sequential(*layers, *([nn.Dropout(0.5)] if dropout else []))

    def forward(self, x):
        y = self.model(x)
        return y if self.kind == "outermost" else torch.cat([x, y], 1)


class UnetGenerator(nn.Module):
    def __init__(self, input_nc, output_nc, num_downs, ngf=64, norm_layer=nn.BatchNorm2d, use_dropout=False):
        super().__init__()
        block = UnetBlock(ngf * 8, ngf * 8, None, None, norm_layer, "innermost")
        for _ in range(num_downs - 5):
            block = UnetBlock(ngf * 8, ngf * 8, None, block, norm_layer, "middle", use_dropout)
        for c in (ngf * 4, ngf * 2, ngf):
            block = UnetBlock(c, c * 2, None, block, norm_layer, "middle")
        self.model = UnetBlock(output_nc, ngf, input_nc, block, norm_layer, "outermost")

    def forward(self, x):
        return self.model(x)


class NLayerDiscriminator(nn.Module):
    def __init__(self, input_nc, ndf=64, n_layers=3, norm_layer=nn.BatchNorm2d, use_sigmoid=False):
        super().__init__()
        bias = _bias(norm_layer)
        layers = [nn.Conv2d(input_nc, ndf, 4, 2, 1), nn.LeakyReLU(0.2, True)]
        c = ndf
        for n in range(1, n_layers + 1):
            out = ndf * min(2**n, 8)
            layers += [nn.Conv2d(c, out, 4, 1 if n == n_layers else 2, 1, bias=bias), norm_layer(out)]
            layers.append(nn.LeakyReLU(0.2, True))
            c = out
        layers.append(nn.Conv2d(c, 1, 4, 1, 1))
        self.model = nn.Sequential(*layers, *([nn.Sigmoid()] if use_sigmoid else []))

    def forward(self, x):
        return self.model(x)


class BasicBlock(nn.Module):
    """One ReLU module, used twice, the second time on an in-place sum: as torchvision does it."""

    expansion = 1

    def __init__(self, inplanes, planes, stride=1, downsample=None, pointwise_first=False):
        super().__init__()
        kernel, strides = (1, (1, stride)) if pointwise_first else (3, (stride, 1))
        self.conv1 = nn.Conv2d(inplanes, planes, kernel, strides[0], kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, strides[1], 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        identity = x
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.downsample is not None:
            identity = self.downsample(x)
        y += identity
        return self.relu(y)


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inplanes, planes, stride=1, downsample=None):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, planes * 4, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * 4)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += identity
        return self.relu(y)


class ResNet(nn.Module):
    def __init__(
        self, block, layers, in_channels, num_classes, stem_width=64, small_stem=False, widths=(64, 128, 256, 512),
        strides=(1, 2, 2, 2),
    ):  # fmt: skip
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, stem_width, *((3, 1, 1) if small_stem else (7, 2, 3)), bias=False)
        self.bn1 = nn.BatchNorm2d(stem_width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small_stem else nn.MaxPool2d(3, 2, 1)
        channels, expansion, stages = stem_width, getattr(block, "func", block).expansion, {}
        for i, (width, count, stride) in enumerate(zip(widths, layers, strides, strict=True)):
            blocks = []
            for n in range(count):
                step, out = stride if n == 0 else 1, width * expansion
                down = None
                if step != 1 or channels != out:
                    down = nn.Sequential(nn.Conv2d(channels, out, 1, step, bias=False), nn.BatchNorm2d(out))
                blocks.append(block(channels, width, step, down))
                channels = out
            stages[f"layer{i + 1}"] = nn.Sequential(*blocks)
        self.stages = list(stages)
        for name, stage in stages.items():
            self.add_module(name, stage)
        self.fc = None if num_classes is None else nn.Linear(channels, num_classes)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for name in self.stages:
            x = getattr(self, name)(x)
        return x if self.fc is None else self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def resnet18(in_channels=1, num_classes=512, **options):
    return ResNet(BasicBlock, (2, 2, 2, 2), in_channels, num_classes, **options)


def resnet45(in_channels=3):
    return ResNet(
        functools.partial(BasicBlock, pointwise_first=True), (3, 4, 6, 6, 3), in_channels, None, 32, True,
        (32, 64, 128, 256, 512), (2, 1, 2, 1, 1),
    )  # fmt: skip


def resnet50(in_channels=3, num_classes=1000, **options):
    return ResNet(Bottleneck, (3, 4, 6, 3), in_channels, num_classes, **options)
