"""The classifier for the larger world: a residual network with a head for each property that a caption can name.

Its classes are those of the catalogue that it was trained with. The JSON file beside its weights lists them.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SECTORS = 24  # of 15 degrees, from azimuth -180 on; one class more is the view from above
SIZE = 128
WIDTHS = (32, 64, 128, 256)
NO = "none"  # the first class of heads for what an image may lack


class Logits(NamedTuple):
    """The logits of each head for N images."""

    object: Tensor  # [N, things]; two things in a relation share the probability
    color: Tensor  # [N, colours] of the first thing
    view: Tensor  # [N, SECTORS + 1]
    attribute: Tensor  # [N, 1 + shapes and patterns]
    part: Tensor  # [N, 1 + parts]
    part_color: Tensor  # [N, colours]
    relation: Tensor  # [N, 1 + relations]


class _Block(nn.Module):
    def __init__(self, channels: int, out: int, stride: int):
        super().__init__()
        self.first = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(out)
        self.second = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(out)
        self.skip = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(channels, out, 1)) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.second_norm(self.second(F.silu(self.first_norm(self.first(x)))))
        return F.silu(y + self.skip(x))


class Network(nn.Module):
    """Images [N, 3, SIZE, SIZE] in [0, 1] to `Logits`. classes: names by head, without `view`."""

    def __init__(self, classes: Mapping[str, Sequence[str]]):
        super().__init__()
        self.classes = {head: tuple(names) for head, names in classes.items()}
        a, b, c, d = WIDTHS
        self.stem = nn.Conv2d(3, a, 5, 2, 2)
        self.blocks = nn.Sequential(
            _Block(a, b, 2), _Block(b, b, 1), _Block(b, c, 2), _Block(c, c, 1), _Block(c, d, 2), _Block(d, d, 1)
        )
        sizes = {head: len(names) for head, names in self.classes.items()} | {"view": SECTORS + 1}
        self.heads = nn.ModuleDict({head: nn.Linear(2 * d, sizes[head]) for head in Logits._fields})

    def features(self, images: Tensor) -> Tensor:
        """Features [N, 512] before the linear heads, of images [N, 3, H, W] in [0, 1] of any size."""
        if images.shape[-2:] != (SIZE, SIZE):
            images = F.interpolate(images, (SIZE, SIZE), mode="bilinear", antialias=True)
        y = self.blocks(F.silu(self.stem(images * 2 - 1)))
        return torch.cat([y.mean((2, 3)), y.amax((2, 3))], 1)

    def forward(self, images: Tensor) -> Logits:
        y = self.features(images)
        return Logits(*(self.heads[head](y) for head in Logits._fields))


def catalogue_classes() -> dict[str, tuple[str, ...]]:
    """Classes by head of a network for the world as it is."""
    from dream_fast.engine.dream_mini.catalogue import ATTRIBUTES, COLORS, PARTS, RELATIONS, THINGS

    return {
        "object": tuple(THINGS),
        "color": tuple(COLORS),
        "attribute": (NO, *ATTRIBUTES),
        "part": (NO, *PARTS),
        "part_color": tuple(COLORS),
        "relation": (NO, *RELATIONS),
    }
