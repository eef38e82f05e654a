"""The classifier of `bench quality`: object, colour and view of an image, trained apart from dream-mini.

A residual network on 96 x 96 images, trained on renders of the procedural world with other seeds. It shares no weights,
no architecture and no latents with the model whose images it classifies.
`python -m dream_fast.bench.quality.classifier.train` trains it, and
`python -m dream_fast.bench.quality.classifier.prior` applies it to dream-mini's own images.

It classifies views by sectors of azimuth, for objects whose front differs from their back; the words front, side, back
and overhead are sums over sectors.
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from dream_fast.bench.quality.classifier.network import Network
from dream_fast.engine.dream_mini.vocabulary import COLORS, THINGS, VIEWS

SIZE = 96
SECTORS = 24  # of 15 degrees, from azimuth -180 on; one class more is the view from above
WIDTHS = (32, 64, 120)
WEIGHTS = Path(__file__).parent / "judge.safetensors"
FACES = frozenset(name for name, thing in THINGS.items() if thing.face)
FRONTS = FACES | {"fish", "house", "castle", "windmill", "car", "truck", "airplane", "boat", "chair"}  # not round


class Predictions(NamedTuple):
    """Most likely class of each image, [N] int64 indices into THINGS, COLORS and VIEWS."""

    object: Tensor
    color: Tensor
    view: Tensor


class _Block(nn.Module):
    def __init__(self, channels: int, out: int, stride: int):
        super().__init__()
        self.first = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(out)
        self.second = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(out)
        self.skip = nn.Conv2d(channels, out, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.second_norm(self.second(F.relu(self.first_norm(self.first(x)))))
        return F.relu(y + self.skip(x))


class Classifier(nn.Module):
    """Images [N, 3, H, W] in [0, 1], resized to 96 x 96, to logits: objects [N, 48], colours [N, 12],
    sectors and overhead [N, 25]."""

    def __init__(self):
        super().__init__()
        a, b, c = WIDTHS
        self.stem = nn.Conv2d(3, a, 5, 2, 2)
        self.blocks = nn.Sequential(
            _Block(a, a, 1), _Block(a, b, 2), _Block(b, b, 1), _Block(b, c, 2), _Block(c, c, 1), _Block(c, c, 2)
        )
        self.object = nn.Linear(c, len(THINGS))
        self.color = nn.Linear(c, len(COLORS))
        self.view = nn.Linear(c, SECTORS + 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.features(images)
        return self.object(y), self.color(y), self.view(y)

    def features(self, images: Tensor) -> Tensor:
        """Features [N, 120] before the linear heads, of images [N, 3, H, W] in [0, 1] of any size."""
        y = self.stem(_resize(images) * 2 - 1)
        return self.blocks(F.relu(y)).mean((2, 3))


def load_classifier(device: torch.device | str = "cpu", weights: Path = WEIGHTS) -> Classifier | Network:
    """The trained classifier, in fp32, for inference."""
    about = json.loads(weights.with_suffix(".json").read_text())
    # A file without classes holds weights for the 48 things of the first world.
    classifier = Network(about["classes"]) if "classes" in about else Classifier()
    classifier.load_state_dict(
        {name: t.float() if t.is_floating_point() else t for name, t in load_file(weights).items()}
    )
    return classifier.requires_grad_(False).eval().to(device)


@torch.no_grad()
def classify(classifier: Classifier | Network, images: Tensor) -> Predictions:
    """Classify images [N, 3, H, W] in [0, 1] of any size."""
    objects, colors, views, *_ = classifier(images)
    return Predictions(objects.argmax(-1), colors.argmax(-1), to_words(views))


def to_words(views: Tensor) -> Tensor:
    """The most likely of VIEWS, [N] int64, by logits [N, SECTORS + 1] of sectors and of the view from above."""
    sectors = views.softmax(-1)
    return (sectors @ _sector_words().to(sectors)).argmax(-1)


def _resize(images: Tensor) -> Tensor:
    """Images [N, 3, H, W] resized to SIZE x SIZE."""
    if images.shape[-2:] == (SIZE, SIZE):
        return images
    return F.interpolate(images, (SIZE, SIZE), mode="bilinear", antialias=True)


def sector_centers() -> Tensor:
    """Azimuths at the centres of the sectors: [SECTORS] degrees, from -172.5 to 172.5."""
    return (torch.arange(SECTORS) + 0.5) * (360 / SECTORS) - 180


def _sector_words() -> Tensor:
    """The one of VIEWS for each sector and for the view from above: [SECTORS + 1, 4], one-hot rows."""
    angles = sector_centers().abs()
    names = ["front" if angle < 45 else "back" if angle > 135 else "side" for angle in angles.tolist()] + ["overhead"]
    return F.one_hot(torch.tensor([VIEWS.index(name) for name in names]), len(VIEWS)).float()
