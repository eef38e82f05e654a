"""Score distillation as a loss: `Distillation`."""

from pathlib import Path

import pytest
import torch

import dream_fast
from dream_fast import Distillation
from dream_fast.bench.accuracy import check, error
from dream_fast.engine.config.sections import CameraConfig
from dream_fast.engine.errors import UserError
from dream_fast.engine.guidance.base import StepInputs
from dream_fast.engine.guidance.prompts import PromptEmbeddings
from dream_fast.engine.scene.camera import turntable

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def guide(tiny_model: Path) -> Distillation:
    return Distillation.from_pretrained(tiny_model, device="cpu", guidance_scale=5.0)


def gradient(guide: Distillation, *arguments: object, **options: object) -> torch.Tensor:
    """The gradient at IMAGES, with fixed draws."""
    images = IMAGES.clone().requires_grad_()
    guide(images, *arguments, generator=torch.Generator().manual_seed(1), **options).backward()
    return images.grad


def test_loss_is_that_of_score_distillation(guide: Distillation) -> None:
    """The gradient is that of the score with the same embeddings and draws."""
    prompts = PromptEmbeddings(guide.model, "a mug", keep_text_encoder=True)
    cameras = turntable(CameraConfig(), 2)
    images = IMAGES.clone().requires_grad_()
    embeddings = prompts.embeddings(cameras.azimuth, cameras.polar, guide.angles)
    guide.score(images, *embeddings, StepInputs(generator=torch.Generator().manual_seed(1))).loss.backward()
    assert torch.equal(gradient(guide, "a mug", cameras), images.grad) and images.grad.abs().max() > 0


def test_prompts_for_each_image(guide: Distillation, tiny_model: Path) -> None:
    """A list of prompts guides each image by its own; one prompt guides all."""
    whole = Distillation.from_pretrained(tiny_model, device="cpu", dtype=torch.float64, guidance_scale=5.0)
    both = gradient(guide, ["a mug", "a cat"])
    for row, prompt in enumerate(["a mug", "a cat"]):
        alone, exact = gradient(guide, prompt), gradient(whole, prompt)
        check(prompt, both[row], alone[row], exact[row].double())
    assert error(both[0], gradient(guide, "a cat")[0].double()) > 0.01
    assert gradient(guide, ["a mug", "a cat"], turntable(CameraConfig(), 2)).shape == IMAGES.shape


def test_works_under_autocast_and_compile(guide: Distillation) -> None:
    """Autocast and torch.compile around the call change no bit of the gradient."""
    plain = gradient(guide, "a mug")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gradient(guide, "a mug"), plain)
    images = IMAGES.clone().requires_grad_()
    step = torch.compile(lambda x: guide(x * 1, "a mug", generator=torch.Generator().manual_seed(1)), backend="eager")
    step(images).backward()
    assert torch.equal(images.grad, plain)


def test_progress_moves_schedules(tiny_model: Path) -> None:
    """A setting with a schedule follows the progress."""
    guide = Distillation.from_pretrained(tiny_model, device="cpu", t_anneal="linear")
    assert not torch.equal(gradient(guide, "a mug", progress=0.1), gradient(guide, "a mug", progress=0.9))


@pytest.mark.parametrize(
    ("arguments", "options", "sentence"),
    [
        ((IMAGES[:, :1], "a mug"), {}, r"images must be \[B, 3, H, W\], not \[2, 1, 32, 32\]"),
        ((IMAGES, ["a", "b", "c"]), {}, "there are 3 prompts and 2 images"),
        ((IMAGES, "a mug", turntable(CameraConfig(), 3)), {}, "there are 3 cameras and 2 images"),
        ((IMAGES, "a mug"), {"progress": 1.5}, "progress must lie in 0 to 1, not 1.5"),
    ],
)
def test_mistakes(guide: Distillation, arguments: tuple, options: dict, sentence: str) -> None:
    """A wrong argument is named."""
    with pytest.raises(ValueError, match=sentence):
        guide(*arguments, **options)


def test_unknown_settings_and_words(tiny_model: Path) -> None:
    """Settings that do not exist are refused by name, and so are words that dream-mini does not know."""
    with pytest.raises(TypeError, match="no setting of score distillation is called guidance_scael"):
        Distillation.from_pretrained(tiny_model, device="cpu", guidance_scael=5)
    with pytest.raises(AttributeError, match="has no attribute 'Distilation'"):
        _ = dream_fast.Distilation
    with pytest.raises(UserError, match="qwzxlp"):
        Distillation.from_pretrained(device="cpu")(IMAGES, "a qwzxlp")
