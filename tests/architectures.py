"""Public architectures from small configurations, and networks of our own for what none of them has: one table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coupled import COUPLED


@dataclass(frozen=True)
class Architecture:
    """A network, made anew at every call, and inputs: a tensor, a tuple, or a dictionary of keyword arguments."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    fast: bool = False  # whether it is among the dozen that every run of the tests looks at


def images(size: int = 64, count: int = 2) -> dict[str, Tensor]:
    """Images as networks of transformers take them."""
    return {"pixel_values": torch.randn(count, 3, size, size)}


def named(model: str, config: str, **options: Any) -> nn.Module:
    """A network of transformers by the names of its class and its configuration."""
    import transformers

    transformers.logging.set_verbosity_error()
    return getattr(transformers, model)(getattr(transformers, config)(**options))


def of(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    """What builds such a network."""
    return partial(named, model, config, **options)


class Only(nn.Module):
    """A network that returns some of its outputs: the others would make their channels outputs too."""

    def __init__(self, network: nn.Module, *keys: str) -> None:
        super().__init__()
        self.network, self.keys = network, keys

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        found = self.network(pixel_values=pixel_values)
        return {key: found[key] for key in self.keys}


VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "patch_size": 8}


def resnet_backbone() -> Any:
    """The configuration of a small convolutional backbone, for detectors and segmenters."""
    from transformers import ResNetConfig

    stages = ["stage1", "stage2", "stage3", "stage4"]
    return ResNetConfig(embedding_size=8, hidden_sizes=[16, 24, 32, 40], depths=[1, 1, 1, 1], out_features=stages)


def detr() -> nn.Module:
    network = named(
        "DetrForObjectDetection",
        "DetrConfig",
        backbone_config=resnet_backbone(),
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        num_queries=5,
        num_labels=4,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
    )
    return Only(network, "logits", "pred_boxes")


def upernet() -> nn.Module:
    return named(
        "UperNetForSemanticSegmentation",
        "UperNetConfig",
        backbone_config=resnet_backbone(),
        hidden_size=16,
        pool_scales=[1, 2],
        auxiliary_in_channels=32,
        auxiliary_channels=16,
        num_labels=4,
    )


def dpt() -> nn.Module:
    return named(
        "DPTForDepthEstimation",
        "DPTConfig",
        **(VIT | {"num_hidden_layers": 4}),
        image_size=32,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 16, 24, 32],
        fusion_hidden_size=16,
        readout_type="project",
    )


VISION: dict[str, Architecture] = {
    "ResNet": Architecture(
        of(
            "ResNetForImageClassification",
            "ResNetConfig",
            embedding_size=16,
            hidden_sizes=[32, 48, 64, 80],
            depths=[2, 2, 1, 1],
        ),
        images,
        fast=True,
    ),
    "ViT": Architecture(of("ViTForImageClassification", "ViTConfig", image_size=32, **VIT), partial(images, 32), True),
    "DeiT": Architecture(
        of("DeiTForImageClassificationWithTeacher", "DeiTConfig", image_size=32, **VIT), partial(images, 32)
    ),
    "BEiT": Architecture(
        of("BeitForImageClassification", "BeitConfig", image_size=32, use_relative_position_bias=True, **VIT),
        partial(images, 32),
    ),
    "DINOv2": Architecture(
        of("Dinov2ForImageClassification", "Dinov2Config", image_size=32, mlp_ratio=2, **VIT), partial(images, 32)
    ),
    "ConvNeXT": Architecture(
        of("ConvNextForImageClassification", "ConvNextConfig", hidden_sizes=[16, 24, 32, 40], depths=[1, 1, 2, 1]),
        images,
        fast=True,
    ),
    "ConvNeXTv2": Architecture(
        of("ConvNextV2ForImageClassification", "ConvNextV2Config", hidden_sizes=[16, 24, 32, 40], depths=[1, 1, 2, 1]),
        images,
    ),
    "MobileNetV2": Architecture(
        of("MobileNetV2ForImageClassification", "MobileNetV2Config", depth_multiplier=0.35), images
    ),
    "EfficientNet": Architecture(
        of(
            "EfficientNetForImageClassification",
            "EfficientNetConfig",
            width_coefficient=0.25,
            depth_coefficient=0.5,
            hidden_dim=320,
        ),
        images,
    ),
    "RegNet": Architecture(
        of(
            "RegNetForImageClassification",
            "RegNetConfig",
            embedding_size=16,
            hidden_sizes=[16, 32, 48, 64],
            depths=[1, 1, 2, 1],
            groups_width=8,
            layer_type="y",
        ),
        images,
        fast=True,
    ),
    "Swin": Architecture(
        of(
            "SwinForImageClassification",
            "SwinConfig",
            image_size=64,
            embed_dim=24,
            depths=[2, 2],
            num_heads=[2, 4],
            window_size=4,
        ),
        images,
    ),
    "Swinv2": Architecture(
        of(
            "Swinv2ForImageClassification",
            "Swinv2Config",
            image_size=64,
            embed_dim=24,
            depths=[2, 2],
            num_heads=[2, 4],
            window_size=4,
        ),
        images,
    ),
    "SegFormer": Architecture(
        of(
            "SegformerForSemanticSegmentation",
            "SegformerConfig",
            hidden_sizes=[16, 32, 40, 64],
            depths=[1, 1, 1, 1],
            decoder_hidden_size=32,
        ),
        images,
    ),
    "MobileViT": Architecture(
        of(
            "MobileViTForImageClassification",
            "MobileViTConfig",
            image_size=64,
            hidden_sizes=[24, 32, 40],
            neck_hidden_sizes=[8, 16, 24, 32, 40, 48, 64],
            num_attention_heads=2,
            expand_ratio=2.0,
        ),
        images,
    ),
    "PoolFormer": Architecture(
        of(
            "PoolFormerForImageClassification",
            "PoolFormerConfig",
            hidden_sizes=[16, 24, 32, 40],
            depths=[1, 1, 1, 1],
        ),
        images,
    ),
    "LeViT": Architecture(
        of(
            "LevitForImageClassificationWithTeacher",
            "LevitConfig",
            image_size=64,
            hidden_sizes=[32, 48, 64],
            num_attention_heads=[2, 3, 4],
            depths=[1, 1, 1],
            key_dim=[8, 8, 8],
        ),
        images,
    ),
    "CvT": Architecture(
        of(
            "CvtForImageClassification",
            "CvtConfig",
            embed_dim=[16, 32, 48],
            num_heads=[1, 2, 3],
            depth=[1, 2, 3],
        ),
        images,
    ),
    "DETR": Architecture(detr, images),
    "UperNet": Architecture(upernet, images),
    "DPT": Architecture(dpt, partial(images, 32)),
}

# --- of our own -------------------------------------------------------------------------------------------------------


class Branches(nn.Module):
    """Branches of different depth side by side, each with instance norm, and one that only pools."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.one = nn.Sequential(nn.Conv2d(12, 8, 1), nn.InstanceNorm2d(8, affine=True), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(12, 6, 1), nn.ReLU(), nn.Conv2d(6, 10, 3, padding=1), nn.BatchNorm2d(10))
        self.mix, self.head = nn.Conv2d(30, 12, 1), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = torch.cat([self.one(x), self.two(x), F.max_pool2d(x, 3, 1, 1)], 1)
        return self.head(F.relu(self.mix(y)).mean((2, 3)))


class Several(nn.Module):
    """Images and numbers in, a class and a map out."""

    def __init__(self) -> None:
        super().__init__()
        self.look, self.read = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(5, 16)
        self.norm, self.body = nn.GroupNorm(4, 16), nn.Conv2d(16, 12, 3, padding=1)
        self.kind, self.map = nn.Linear(12, 4), nn.ConvTranspose2d(12, 2, 2, 2)

    def forward(self, image: Tensor, numbers: Tensor, scale: Tensor | None = None) -> dict[str, Tensor]:
        x = self.look(image) + self.read(numbers)[:, :, None, None]
        x = F.relu(self.body(F.relu(self.norm(x))))
        return {"kind": self.kind(x.mean((2, 3))), "map": self.map(x if scale is None else x * scale)}


class ShiftedWindows(nn.Module):
    """Attention within windows that are shifted by half a window, with one qkv layer and a bias for every head."""

    def __init__(self, size: int = 24, heads: int = 3, window: int = 4) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.stem, self.norm = nn.Conv2d(3, size, 2, 2), nn.LayerNorm(size)
        self.qkv, self.proj = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.bias = nn.Parameter(torch.randn(heads, window**2, window**2))
        self.head = nn.Linear(size, 4)

    def attend(self, x: Tensor) -> Tensor:
        n, h, w, c = x.shape
        k = self.window
        x = x.view(n, h // k, k, w // k, k, c).transpose(2, 3).reshape(-1, k * k, c)
        q, key, v = self.qkv(x).view(len(x), k * k, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ key.transpose(-2, -1) * 0.3 + self.bias).softmax(-1)
        x = self.proj((weights @ v).transpose(1, 2).flatten(2))
        return x.view(n, h // k, w // k, k, k, -1).transpose(2, 3).reshape(n, h, w, -1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        x = x + self.attend(self.norm(x))
        shift = self.window // 2
        y = torch.roll(x, (-shift, -shift), (1, 2))
        x = x + torch.roll(self.attend(self.norm(y)), (shift, shift), (1, 2))
        return self.head(x.mean((1, 2)))


class HandNorms(nn.Module):
    """Norms written out: layer norm over channels that come first, RMS norm, and a response norm over space."""

    def __init__(self, size: int = 16) -> None:
        super().__init__()
        self.stem, self.wide, self.narrow = (
            nn.Conv2d(3, size, 2, 2),
            nn.Linear(size, 2 * size),
            nn.Linear(2 * size, size),
        )
        self.weight, self.bias = nn.Parameter(torch.rand(size) + 0.5), nn.Parameter(torch.randn(size))
        self.scale, self.gamma = nn.Parameter(torch.rand(size) + 0.5), nn.Parameter(torch.randn(2 * size))
        self.head = nn.Linear(size, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        mean = x.mean(1, keepdim=True)
        var = (x - mean).pow(2).mean(1, keepdim=True)
        y = (x - mean) / torch.sqrt(var + 1e-6)
        y = self.weight[:, None, None] * y + self.bias[:, None, None]
        y = F.gelu(self.wide(y.permute(0, 2, 3, 1)))
        norm = torch.linalg.vector_norm(y, dim=(1, 2), keepdim=True)
        y = y + self.gamma * (y * (norm / (norm.mean(-1, keepdim=True) + 1e-6)))
        x = x + self.narrow(y).permute(0, 3, 1, 2)
        z = x.mean((2, 3))
        return self.head(self.scale * (z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + 1e-6)))


class Positions(nn.Module):
    """Sines and cosines of the positions, computed on the way and added to the channels."""

    def __init__(self, size: int = 12) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, size, 2, 2), nn.LayerNorm(size)
        self.wide, self.narrow, self.head = nn.Linear(size, 16), nn.Linear(16, size), nn.Linear(size, 4)
        self.size = size

    def positions(self, x: Tensor) -> Tensor:
        at = torch.arange(x.shape[1], dtype=x.dtype)[:, None]
        angle = at / 100 ** (torch.arange(0, self.size, 2, dtype=x.dtype) / self.size)
        return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        where = self.positions(x)
        for _ in range(2):
            x = x + self.narrow(F.gelu(self.wide(self.norm(x + where))))
        return self.head(x.mean(1))


def toy(name: str) -> Architecture:
    """One of the small networks with one way each in which channels are coupled."""
    make, inputs, _, _ = COUPLED[name]
    return Architecture(make, inputs)


OWN: dict[str, Architecture] = {
    "channel shuffle": toy("shuffled"),
    "pixel shuffle": toy("pixel_shuffle"),
    "transposed convolution, group norm": toy("segmenter"),
    "grouped convolutions": toy("grouped"),
    "instance norm on signals": toy("signal"),
    "squeeze-excite": toy("squeeze_excite"),
    "dense concatenation": toy("dense"),
    "layer scale": toy("layer_scale"),
    "branches, instance norm": Architecture(Branches, lambda: torch.randn(2, 3, 8, 8), fast=True),
    "several inputs and outputs": Architecture(
        Several, lambda: {"image": torch.randn(2, 3, 8, 8), "numbers": torch.randn(2, 5)}, fast=True
    ),
    "positions computed on the way": Architecture(Positions, lambda: torch.randn(2, 3, 8, 8), fast=True),
    "shifted windows": Architecture(ShiftedWindows, lambda: torch.randn(2, 3, 16, 16)),
    "norms written out": Architecture(HandNorms, lambda: torch.randn(2, 3, 8, 8), fast=True),
}

ARCHITECTURES: dict[str, Architecture] = VISION | OWN

# At the size that is in use: only how long tracing takes, and what can be removed.
REAL: dict[str, Architecture] = {
    "ResNet-50, 224 px": Architecture(of("ResNetForImageClassification", "ResNetConfig"), partial(images, 224)),
    "ConvNeXT-tiny, 224 px": Architecture(of("ConvNextForImageClassification", "ConvNextConfig"), partial(images, 224)),
    "Swin-tiny, 224 px": Architecture(of("SwinForImageClassification", "SwinConfig"), partial(images, 224)),
    "ViT-base, 224 px": Architecture(of("ViTForImageClassification", "ViTConfig"), partial(images, 224)),
    "BERT-base, 128 words": Architecture(
        of("BertForSequenceClassification", "BertConfig"), lambda: {"input_ids": torch.randint(3, 999, (2, 128))}
    ),
    "GPT-2, 128 words": Architecture(
        of("GPT2LMHeadModel", "GPT2Config"), lambda: {"input_ids": torch.randint(3, 999, (2, 128))}
    ),
}
