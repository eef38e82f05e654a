"""The judge: a small classifier that says what a picture shows, trained apart from dream-mini.

A residual network on 64 x 64 pictures, trained on renders of the procedural world with other seeds; it shares no
weights, no architecture and no latents with the model that it judges. `python -m dream_fast.bench.judge.train` repeats
it.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from dream_fast.engine.prior.data import NATURAL
from dream_fast.engine.prior.vocabulary import COLORS, THINGS, VIEWS

SIZE = 64
WEIGHTS = Path(__file__).parent / "judge.safetensors"


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
    """Pictures [N, 3, 64, 64] in [0, 1] to logits: objects [N, 48], colours [N, 13], views [N, 4]."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 5, 2, 2)
        self.blocks = nn.Sequential(_Block(24, 48, 2), _Block(48, 96, 2), _Block(96, 96, 1), _Block(96, 160, 2))
        self.object = nn.Linear(160, len(THINGS))
        self.color = nn.Linear(160, NATURAL + 1)
        self.view = nn.Linear(160, len(VIEWS))

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.blocks(F.relu(self.stem(pictures * 2 - 1))).mean((2, 3))
        return self.object(y), self.color(y), self.view(y)


def load_judge(device: torch.device | str = "cpu", weights: Path = WEIGHTS) -> Judge:
    """The trained judge, in fp32, for inference."""
    judge = Judge()
    judge.load_state_dict({name: t.float() if t.is_floating_point() else t for name, t in load_file(weights).items()})
    return judge.requires_grad_(False).eval().to(device)


@torch.no_grad()
def verdicts(judge: Judge, pictures: Tensor) -> Verdicts:
    """The judge's verdicts on pictures [N, 3, H, W] in [0, 1] of any size; they are averaged down to 64 x 64.

    The colour is one of COLORS. Where "in its natural colours" is most likely, it is the likeliest natural colour of
    the object found: brown bears are brown, whether a caption says so or not.
    """
    small = F.interpolate(pictures, (SIZE, SIZE), mode="bilinear", antialias=True)
    objects, colors, views = judge(small)
    found = objects.argmax(-1)
    natural = colors[:, :NATURAL].masked_fill(~_natural(found), -torch.inf).argmax(-1)
    color = torch.where(colors.argmax(-1) == NATURAL, natural, colors[:, :NATURAL].argmax(-1))
    return Verdicts(found, color, views.argmax(-1))


def _natural(found: Tensor) -> Tensor:
    """Which of COLORS each object [N] has by nature, [N, 12] bool; all where none of its natural shades has a name."""
    rows = [[color in (thing.natural or ()) for color in COLORS] for thing in THINGS.values()]
    named = torch.tensor([row if any(row) else [True] * len(COLORS) for row in rows], device=found.device)
    return named[found]
