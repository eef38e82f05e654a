"""The page about Python: its code runs as it is printed, with the stated results."""

import re
from pathlib import Path

import av
import pytest
import torch
import trimesh
from PIL import Image

import dream_fast

PAGE = Path(dream_fast.__file__).parent / "docs" / "python.md"
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="an installed package carries no docs")


def sections() -> dict[str, str]:
    """The code of each section, by its title."""
    parts = re.split(r"^## (.+)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return {title: code for title, text in zip(parts[::2], parts[1::2], strict=True) for code in blocks(text)}


def blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def names(monkeypatch, tmp_path):
    """Run the code of a section in an empty folder and return its variables."""
    monkeypatch.chdir(tmp_path)

    def run(title: str) -> dict:
        torch.manual_seed(0)
        names = {"__name__": "page"}
        exec(compile(sections()[title], f"{PAGE.name}: {title}", "exec"), names)
        return names

    return run


def test_page_blocks() -> None:
    """Every block of code has a test here, and is short."""
    losses = ["Score distillation as a loss", "The loss for Gaussian splats", "The loss for the colours of a mesh"]
    assert list(sections()) == ["The operators", "The field", *losses, "A custom guidance", "A whole run"]
    assert len(blocks(PAGE.read_text(encoding="utf-8"))) == len(sections())
    for code in sections().values():
        assert sum(bool(line.strip()) and "import" not in line for line in code.splitlines()) <= 32
        assert max(map(len, code.splitlines())) <= 120


def test_operators_section(names) -> None:
    """The operators learn a disc."""
    page = names("The operators")
    opacity, colour, inside = page["image"].opacity, page["image"].values, page["inside"] > 0
    assert opacity[inside].min() > 0.5 > opacity[~inside].max()
    assert (colour[inside].mean(0) - torch.tensor([1.0, 0.2, 0.1])).abs().max() < 0.15
    assert not page["rays"].overflow and page["table"].grad.abs().sum() > 0


def test_field_section(names, tmp_path) -> None:
    """The field is a blob, in its images and as a mesh."""
    page = names("The field")
    assert page["sigma"][0] > page["sigma"][1] > 0
    # Outwards, but for the network's own slope, which is small beside the blob's at its start.
    assert (page["normal"] * torch.tensor([[0.0, 1, 0], [1, 0, 0]])).sum(1).min() > 0.99
    opacity = page["view"].opacity
    assert opacity.shape == (6, 48, 48) and opacity[:, 24, 24].min() > 0.95 and opacity[:, 0, 0].max() < 0.05
    assert Image.open(tmp_path / "front.png").size == (48, 48)
    mesh = trimesh.load(tmp_path / "blob.glb", force="mesh")
    mesh.merge_vertices(merge_tex=True, merge_norm=True)  # those that seams of the texture double
    assert mesh.is_watertight and 0.1 < mesh.extents.min() and len(mesh.faces) == len(page["mesh"].faces)


@pytest.mark.parametrize(
    "title",
    ["Score distillation as a loss", "The loss for Gaussian splats", "The loss for the colours of a mesh"],
)
def test_loss_sections(names, title: str) -> None:
    """Each renderer's images turn red where the prompt asks for something red."""
    page = names(title)
    images = page["images"].detach()
    images = images if images.shape[1] == 3 else images.permute(0, 3, 1, 2)
    red, green, blue = images.unbind(1)
    assert torch.isfinite(images).all() and page["loss"].ndim == 0
    assert (red - torch.maximum(green, blue) > 0.2).float().mean() > 0.05


def test_guidance_section(names) -> None:
    """The guidance makes a red ball."""
    page = names("A custom guidance")
    losses, view = page["losses"], page["view"]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    middle, corner = view.rgb[:, 24, 24], view.opacity[:, 2, 2]
    assert (middle[:, 0] > middle[:, 1] + 0.2).all() and corner.max() < 0.1


def test_run_section(names, tmp_path) -> None:
    """The run writes its workspace."""
    names("A whole run")
    assert Image.open(tmp_path / "trial" / "results" / "front.png").size == (32, 32)
    with av.open(str(tmp_path / "trial" / "results" / "turntable.mp4")) as video:
        assert len(list(video.decode(video=0))) == 4
