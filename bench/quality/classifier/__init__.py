"""The judge: a small classifier that says what a picture shows, trained apart from dream-mini.

A residual network on 96 x 96 pictures, trained on renders of the procedural world with other seeds; it shares no
weights, no architecture and no latents with the model that it judges.
`python -m dream_fast.bench.quality.classifier.train` repeats it,
`python -m dream_fast.bench.quality.classifier.prior` shows it dream-mini's own pictures.

It tells views by sectors of azimuth, for objects whose front can be told from their back; the words front, side, back
and overhead are sums over sectors.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from dream_fast.engine.dream_mini.vocabulary import COLORS, THINGS, VIEWS

SIZE = 96
SECTORS = 24  # of 15 degrees, from azimuth -180 on; one class more is the view from above
WIDTHS = (32, 64, 120)
WEIGHTS = Path(__file__).parent / "judge.safetensors"
FACES = frozenset(name for name, thing in THINGS.items() if thing.face)
FRONTS = FACES | {"fish", "house", "castle", "windmill", "car", "truck", "airplane", "boat", "chair"}  # not round


class Verdicts(NamedTuple):
    """Most likely class of each picture, [N] int64 indices into THINGS, COLORS and VIEWS."""

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


class Judge(nn.Module):
    """Pictures [N, 3, H, W] in [0, 1], brought to 96 x 96, to logits: objects [N, 48], colours [N, 12],
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

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.features(pictures)
        return self.object(y), self.color(y), self.view(y)

    def features(self, pictures: Tensor) -> Tensor:
        """What the logits are linear in, [N, 120], of pictures [N, 3, H, W] in [0, 1] of any size."""
        y = self.stem(_resized(pictures) * 2 - 1)
        return self.blocks(F.relu(y)).mean((2, 3))


def load_judge(device: torch.device | str = "cpu", weights: Path = WEIGHTS) -> Judge:
    """The trained judge, in fp32, for inference."""
    judge = Judge()
    judge.load_state_dict({name: t.float() if t.is_floating_point() else t for name, t in load_file(weights).items()})
    return judge.requires_grad_(False).eval().to(device)


@torch.no_grad()
def verdicts(judge: Judge, pictures: Tensor) -> Verdicts:
    """The judge's verdicts on pictures [N, 3, H, W] in [0, 1] of any size."""
    objects, colors, views = judge(pictures)
    sectors = views.softmax(-1)
    words = sectors @ _words().to(sectors)
    return Verdicts(objects.argmax(-1), colors.argmax(-1), words.argmax(-1))


def _resized(pictures: Tensor) -> Tensor:
    """Pictures [N, 3, H, W] brought to SIZE x SIZE."""
    if pictures.shape[-2:] == (SIZE, SIZE):
        return pictures
    return F.interpolate(pictures, (SIZE, SIZE), mode="bilinear", antialias=True)


def sector_middles() -> Tensor:
    """Azimuth in the middle of each sector: [SECTORS] degrees, from -172.5 to 172.5."""
    return (torch.arange(SECTORS) + 0.5) * (360 / SECTORS) - 180


def _words() -> Tensor:
    """Which of VIEWS each sector and the view from above are: [SECTORS + 1, 4], a row a one-hot."""
    turned = sector_middles().abs()
    names = ["front" if angle < 45 else "back" if angle > 135 else "side" for angle in turned.tolist()] + ["overhead"]
    return F.one_hot(torch.tensor([VIEWS.index(name) for name in names]), len(VIEWS)).float()
