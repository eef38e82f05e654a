"""Batches of rendered and captioned objects, to train dream-mini and the classifier of the benchmarks."""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch

from dream_fast.engine.dream_mini.captions import caption, view_of
from dream_fast.engine.dream_mini.scenes import make_scene
from dream_fast.engine.dream_mini.sphere_tracer import MAIN, Primitives, pack, render
from dream_fast.engine.dream_mini.vocabulary import COLORS, THINGS, VIEWS
from dream_fast.engine.scene.camera import make_cameras

BATCH, CAPTIONS = 64, 3
NATURAL = len(COLORS)  # the colour label of an object in its natural colours
# Objects with a face are twice as frequent, because only small parts distinguish their views.
_SHARES = np.array([2.0 if thing.face else 1.0 for thing in THINGS.values()])
_SHARES /= _SHARES.sum()


class Views(NamedTuple):
    """A view of each of BATCH scenes. Labels [B, 3] int16: object, colour (NATURAL: none named), view."""

    images: torch.Tensor  # [B, size, size, 3] uint8 on the device
    captions: list[list[str]]  # [B][CAPTIONS]
    labels: np.ndarray
    angles: np.ndarray  # [B, 2] float32 degrees: polar, azimuth
    shading: np.ndarray  # [B] 0 albedo, 1 lambertian, 2 textureless
    paint: np.ndarray  # [B, 3] float32, the object's own colour, named or not


def _draw(seed: int, views: int):
    """Scenes, cameras, light and captions of one batch, made in a worker process."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(seed)
    names, colors = list(THINGS), list(COLORS)
    scenes = [make_scene(rng, names[k]) for k in rng.choice(len(names), BATCH, p=_SHARES)]
    rounds = []
    for _ in range(views):
        high = rng.random(BATCH) < 0.15
        polar = np.where(high, rng.uniform(5, 45, BATCH), rng.uniform(45, 105, BATCH))
        azimuth = rng.uniform(-180, 180, BATCH)
        camera = np.stack([polar, azimuth, rng.uniform(3.0, 3.5, BATCH), rng.uniform(20, 26, BATCH)]).astype(np.float32)
        shading = rng.choice(3, BATCH, p=(0.5, 0.44, 0.06))
        light = np.concatenate(
            [rng.uniform(0.1, 1.0, (BATCH, 1)), rng.normal(size=(BATCH, 3)), rng.random((BATCH, 3))], 1
        )
        texts, labels = [], []
        for scene, p, a in zip(scenes, polar, azimuth, strict=True):
            view = view_of(p, a, rng=rng)
            texts.append([caption(scene, view, rng) for _ in range(CAPTIONS - 1)] + [caption(scene, None, rng)])
            color = colors.index(scene.color) if scene.color else NATURAL
            labels.append((names.index(scene.name), color, VIEWS.index(view_of(p, a))))
        rounds.append((camera, shading, light.astype(np.float32), texts, np.array(labels, np.int16)))
    primitives, pattern = pack(scenes, "cpu")
    return {kind: tuple(t.numpy() for t in p) for kind, p in primitives.items()}, pattern.numpy(), rounds


def _paint(arrays: dict[str, tuple[Any, ...]]) -> np.ndarray:
    """The colour [B, 3] of each packed scene's main primitives, which share one."""
    color = np.concatenate([Primitives(*part).color for part in arrays.values()], axis=1)  # [B, K, 3]
    role = np.concatenate([Primitives(*part).role for part in arrays.values()], axis=2)[:, 0]  # [B, K]
    return color[np.arange(len(color)), (role == MAIN).argmax(1)]


def rendered(
    seed: int, batches: int, views: int, size: int, device: torch.device, pool: ProcessPoolExecutor
) -> Iterator[Views]:
    """`batches` * `views` batches of BATCH images; a seed names the same images every time."""
    jobs = [pool.submit(_draw, 1_000_003 * seed + k, views) for k in range(batches)]
    for job in jobs:
        arrays, pattern, rounds = job.result()
        primitives = {k: Primitives(*(torch.from_numpy(a).to(device) for a in p)) for k, p in arrays.items()}
        packed, paint = (primitives, torch.from_numpy(pattern).to(device)), _paint(arrays)
        for camera, drawn, light, texts, labels in rounds:
            polar, azimuth, radius, fovy = torch.from_numpy(camera).to(device)
            light = torch.from_numpy(light).to(device)
            with torch.no_grad():
                images = render(
                    packed, make_cameras(polar, azimuth, radius, fovy), size,
                    shading=torch.from_numpy(drawn).to(device), ambient=light[:, 0], light_noise=light[:, 1:4],
                    background=light[:, 4:], compiled=device.type == "cuda",
                )  # fmt: skip
            images = (images * 255 + 0.5).clamp(0, 255).to(torch.uint8)
            yield Views(images, texts, labels, camera[:2].T, drawn, paint)
