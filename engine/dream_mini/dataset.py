"""Batches of rendered, captioned scenes: what dream-mini and the judge of the benchmark learn from."""

from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from dream_fast.engine.dream_mini.captions import caption, view_of
from dream_fast.engine.dream_mini.catalogue import ATTRIBUTES, COLORS, PARTS, RELATIONS, THINGS, VIEWS
from dream_fast.engine.dream_mini.compose import any_scene
from dream_fast.engine.dream_mini.scenes import MAIN, Scene
from dream_fast.engine.dream_mini.sphere_tracer import pack_arrays, render, to_tensors
from dream_fast.engine.scene.camera import make_cameras

BATCH, CAPTIONS, GROUP = 64, 3, 4
NATURAL = len(COLORS)  # the colour label of a thing in its natural colours
ALBEDO, LAMBERTIAN, TEXTURELESS = 0, 1, 2
SHADINGS = (0.5, 0.45, 0.05)  # shares of the three
HIGH = 0.22  # share of views from 45 degrees above and more
# Things with a face come more often: their views are told apart by small parts.
_SHARES = np.array([1.5 if thing.face else 1.0 for thing in THINGS.values()])
_SHARES /= _SHARES.sum()


class Labels(NamedTuple):
    """Columns of the labels, indices into the catalogue's lists. NONE where there is none; NATURAL as a colour."""

    object: int
    color: int
    view: int
    attribute: int
    part: int
    part_color: int
    relation: int
    second: int


NONE = -1


class Views(NamedTuple):
    """Images of BATCH scenes, a view of each."""

    images: torch.Tensor  # [B, size, size, 3] uint8 on the device
    captions: list[list[str]]  # [B][CAPTIONS], the last without a view
    labels: np.ndarray  # [B, len(Labels)] int16
    cameras: np.ndarray  # [B, 4] float32: polar, azimuth in degrees, radius, field of view in degrees
    shading: np.ndarray  # [B] ALBEDO | LAMBERTIAN | TEXTURELESS
    paint: np.ndarray  # [B, 3] float32, the first thing's own colour, named or not


def label(scene: Scene, view: str) -> Labels:
    """Labels of an image of a scene."""
    colors = list(COLORS)
    first, *rest = scene.items
    kind, tint = first.part or (None, None)
    return Labels(
        object=list(THINGS).index(first.name),
        color=colors.index(first.color) if first.color else NATURAL,
        view=VIEWS.index(view),
        attribute=ATTRIBUTES.index(first.attribute) if first.attribute else NONE,
        part=PARTS.index(kind) if kind else NONE,
        part_color=colors.index(tint) if tint else NONE,
        relation=list(RELATIONS).index(scene.relation) if scene.relation else NONE,
        second=list(THINGS).index(rest[0].name) if rest else NONE,
    )


def _draw_cameras(rng: np.random.Generator) -> np.ndarray:
    """Polar angle, azimuth, radius and field of view of BATCH free views: [4, BATCH]."""
    high = rng.random(BATCH) < HIGH
    polar = np.where(high, rng.uniform(0, 45, BATCH), rng.uniform(45, 108, BATCH))
    return np.stack([polar, rng.uniform(-180, 180, BATCH), rng.uniform(3.0, 3.5, BATCH), rng.uniform(20, 26, BATCH)])


def _draw_light(rng: np.random.Generator) -> np.ndarray:
    """Ambient share, noise of the light's place and background of BATCH images: [BATCH, 7]."""
    return np.concatenate([rng.uniform(0.1, 1.0, (BATCH, 1)), rng.normal(size=(BATCH, 3)), rng.random((BATCH, 3))], 1)


def _draw(seed: int, free: int, grouped: bool):
    """Scenes, cameras, light and captions of one batch, made in a worker process.

    With `grouped` the first four views look from azimuths 90 degrees apart, 0 to 30 degrees above the horizon, with one
    lens, light and background.
    """
    torch.set_num_threads(1)
    rng = np.random.default_rng(seed)
    names = list(THINGS)
    scenes = [any_scene(rng, names, _SHARES) for _ in range(BATCH)]
    shots = []
    if grouped:
        camera, shading, light = _draw_cameras(rng), rng.choice(3, BATCH, p=SHADINGS), _draw_light(rng)
        camera[0] = rng.uniform(60, 90, BATCH)
        for k in range(GROUP):
            shots.append((camera + np.array([0, 90 * k, 0, 0])[:, None], shading, light))
    shots += [(_draw_cameras(rng), rng.choice(3, BATCH, p=SHADINGS), _draw_light(rng)) for _ in range(free)]
    rounds = []
    for camera, shading, light in shots:
        camera[1] = (camera[1] + 180) % 360 - 180
        texts, labels = [], []
        for scene, polar, azimuth, shade in zip(scenes, camera[0], camera[1], shading, strict=True):
            view, bare = view_of(polar, azimuth, rng=rng), shade == TEXTURELESS
            texts.append([caption(scene, view, rng, untextured=bare) for _ in range(CAPTIONS - 1)])
            texts[-1].append(caption(scene, None, rng, untextured=bare))
            labels.append(label(scene, view_of(polar, azimuth)))
        rounds.append((camera.astype(np.float32), shading, light.astype(np.float32), texts, np.array(labels, np.int16)))
    return pack_arrays(scenes), np.array([_paint(scene) for scene in scenes], np.float32), rounds


def _paint(scene: Scene) -> np.ndarray:
    """The first thing's own colour [3]."""
    return next(p.color for p in scene.items[0].primitives if p.role == MAIN)


def rendered(
    seed: int, batches: int, free: int, size: int, device: torch.device, pool: ProcessPoolExecutor, *, grouped=False
) -> Iterator[Views]:
    """Render `batches` batches of BATCH scenes, a `Views` for each view; a seed gives the same images every time.

    Each scene has `free` views after, with `grouped`, four that belong together (`_draw`).
    """
    jobs: list[Future | None] = [pool.submit(_draw, 1_000_003 * seed + k, free, grouped) for k in range(batches)]
    for number, job in enumerate(jobs):
        assert job is not None
        arrays, paint, rounds = job.result()
        jobs[number] = None  # its memory is not needed any more
        packed = to_tensors(arrays, device)
        for camera, drawn, light, texts, labels in rounds:
            polar, azimuth, radius, fovy = torch.from_numpy(camera).to(device)
            light = torch.from_numpy(light).to(device)
            with torch.no_grad():
                images = render(
                    packed, make_cameras(polar, azimuth, radius, fovy), size,
                    shading=torch.from_numpy(drawn).to(device), ambient=light[:, 0], light_noise=light[:, 1:4],
                    background=light[:, 4:],
                )  # fmt: skip
            images = (images * 255 + 0.5).clamp(0, 255).to(torch.uint8)
            yield Views(images, texts, labels, camera.T, drawn, paint)
