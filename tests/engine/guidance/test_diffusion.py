"""Guidance by a prompt: arguments of score distillation, view weights, and sums."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dream_fast.engine.config.sections import GuidanceConfig
from dream_fast.engine.guidance import snapshots
from dream_fast.engine.guidance.base import Guidance, GuidanceResult, StepInputs
from dream_fast.engine.guidance.clip import ClipGuidance
from dream_fast.engine.guidance.diffusion import DiffusionGuidance
from dream_fast.engine.guidance.perp_neg import negative_weights
from dream_fast.engine.guidance.prompts import ViewAngles, view_weights
from dream_fast.engine.guidance.sum import GuidanceSum
from dream_fast.engine.scene.camera import Cameras, make_cameras

ANGLES = (30.0, 40.0, 50.0)


class Score:
    """Records its calls."""

    components = SimpleNamespace(capturable=True)

    def __init__(self, **settings: Any):
        self.config = GuidanceConfig(**settings)
        self.calls: list[tuple[tuple, dict]] = []

    def __call__(self, *words: Any) -> str:
        self.calls.append(words)
        return "a result"

    def prepare_step(self, *words: Any) -> tuple:
        return words


class Prompts:
    """Embeddings that record the angles of the call."""

    views = torch.arange(4.0).view(4, 1, 1).expand(4, 5, 32)

    def embeddings(self, *angles: Any) -> tuple:
        return ("cond", angles), "uncond"


def cameras(azimuth: list[float], polar: float = 90.0) -> Cameras:
    places = torch.tensor(azimuth)
    return make_cameras(*(torch.full_like(places, value) for value in (polar,)), places, places + 3, places + 20)


def test_diffusion_guidance_defaults() -> None:
    """No negatives, a blend of 90 degrees, no angle at which a view ends."""
    guide, views = DiffusionGuidance(Score(), Prompts()), cameras([0.0, 100.0])
    inputs = StepInputs(progress=0.25, generator="draws")
    assert guide("images", views, inputs) == "a result"
    ((images, (_, angles), uncond, given, negatives),) = guide.distillation.calls
    assert (images, uncond, negatives) == ("images", "uncond", None) and given is inputs
    assert angles[0] is views.azimuth and angles[1] is views.polar and angles[2] == (30.0, 90.0, None)
    assert (inputs.step, inputs.latents, inputs.timesteps, inputs.scalars) == (0, False, None, {})


def test_diffusion_guidance_passes_on() -> None:
    """Arguments of a call reach score distillation, and angles the prompts."""
    guide = DiffusionGuidance(Score(), Prompts(), ViewAngles(*ANGLES))
    inputs = StepInputs(7, 0.5, "draws", latents=True, timesteps="timesteps", scalars={"scale": 2.0})
    guide("latents", cameras([0.0]), inputs)
    ((_, (_, angles), _, given, negatives),) = guide.distillation.calls
    assert given is inputs and negatives is None and angles[2] == ANGLES
    assert guide.prepare_step(inputs, 2) == (inputs, 2)
    assert guide.accepts_latents and guide.capturable


def test_diffusion_guidance_negatives() -> None:
    """With Perp-Neg the first two views are passed on, weighted by the views of the cameras."""
    settings = dict(negative_w=-4.0, front_decay_factor=1.0, side_decay_factor=3.0)
    guide, views = (
        DiffusionGuidance(Score(perpneg=True, **settings), Prompts(), ViewAngles(*ANGLES[:2])),
        cameras([20.0, 60.0, 150.0]),
    )
    guide("images", views, StepInputs())
    negatives = guide.distillation.calls[0][-1]
    expected = negative_weights(view_weights(views.azimuth, views.polar, ViewAngles(30.0, 40.0)), -4.0, 1.0, 3.0)
    assert torch.equal(negatives.weights, expected)
    assert torch.equal(negatives.embeddings, Prompts.views[:2])


class Part(Guidance):
    """A guidance with a known loss that records its calls."""

    def __init__(self, loss: float, accepts_latents: bool = True):
        self.loss, self.accepts_latents, self.options = loss, accepts_latents, []

    def __call__(self, *options: Any) -> GuidanceResult:
        self.options.append(options)
        number = torch.tensor(self.loss)
        return GuidanceResult(number, number, number, number)


class Image(Part):
    """As `Part`, with a diffusion model."""

    components = "a model"


def test_sum_passes_inputs() -> None:
    """Arguments of a sum reach each guidance."""
    guide = GuidanceSum({"a": Part(1.0), "b": Part(2.0)})
    inputs = StepInputs(3, 0.5, "draws", latents=True)
    guide("images", "cameras", inputs)
    for part in guide.terms.values():
        assert part.options == [("images", "cameras", inputs)]


@pytest.mark.parametrize(
    ("latents", "losses", "shown"),
    [(False, {"clip": 1.0, "a": 2.0, "b": 4.0}, 2.0), (True, {"a": 2.0, "b": 4.0}, 2.0)],
)
def test_sum_primary_result(latents: bool, losses: dict[str, float], shown: float) -> None:
    """Losses are added and named; the rest is of the first diffusion model, among guidances that accept latents."""
    guide = GuidanceSum({"clip": Part(1.0, accepts_latents=False), "a": Image(2.0), "b": Image(4.0)})
    result = guide("images", "cameras", StepInputs(latents=latents))
    assert {name: loss.item() for name, loss in result.losses.items()} == losses
    assert result.loss.item() == sum(losses.values()) and result.gradient.item() == shown
    assert guide.components == "a model"


def test_sum_without_diffusion() -> None:
    """Without a diffusion model the rest is of the first guidance."""
    guide = GuidanceSum({"a": Part(1.0), "b": Part(2.0)})
    result = guide("images", "cameras", StepInputs())
    assert result.gradient.item() == 1.0 and result.loss.item() == 3.0
    assert guide.components is None and object.__new__(ClipGuidance).components is None


@pytest.mark.parametrize(("options", "first"), [({}, "shown at 32"), ({"latents": True}, "decoded shown at 8")])
def test_guidance_images_order(monkeypatch, options: dict, first: str) -> None:
    """The render, or decoded latents, comes first, then the other decoded latents, side by side."""
    components, names = SimpleNamespace(latent_size=8, image_size=32), {}

    def image(name: str) -> torch.Tensor:
        names[len(names)] = name
        return torch.full((2, 3, 4, 4), len(names) - 1.0)

    def decode(model: Any, latents: Any) -> torch.Tensor:
        assert model is components
        name = latents if isinstance(latents, str) else names[int(latents[0, 0, 0, 0])]
        return image(f"decoded {name}")

    monkeypatch.setattr(snapshots, "decode", decode)
    monkeypatch.setattr(snapshots, "resize", lambda shown, size: image(f"{shown} at {size}"))
    images = snapshots.guidance_images(components, "shown", "noisy", "clean", **options)
    assert images.shape == (2, 3, 3, 4, 4)
    for view in images:
        assert [names[int(one.unique())] for one in view] == [first, "decoded noisy", "decoded clean"]
