"""Views of scenes of the image model's world."""

import pytest
import torch

from dream_fast.engine.dream_mini.scenes import Scene
from dream_fast.engine.dream_mini.sphere_tracer import pack, render
from dream_fast.engine.scene.camera import Cameras, make_cameras


@pytest.fixture
def cameras():
    """cameras(azimuth in degrees) -> cameras at these angles."""

    def cameras(azimuth: list[float]) -> Cameras:
        polar, radius, fovy = (torch.full((len(azimuth),), value) for value in (80.0, 3.2, 20.0))
        return make_cameras(polar, torch.tensor(azimuth), radius, fovy)

    return cameras


@pytest.fixture
def views(cameras):
    """views(scenes, azimuth, side) -> images [N, side, side, 3] without ambient light."""

    def views(
        scenes: list[Scene], azimuth: list[float], side: int, *, shading=0, light=(0.0, 0.0, 0.0), background=1.0
    ) -> torch.Tensor:
        """Images [N, side, side, 3] without ambient light."""
        n = len(scenes)
        return render(
            pack(scenes, "cpu"), cameras(azimuth), side, shading=torch.full((n,), shading), ambient=torch.zeros(n),
            light_noise=torch.tensor(light).expand(n, 3), background=torch.full((n, 3), background), supersample=1,
        )  # fmt: skip

    return views
