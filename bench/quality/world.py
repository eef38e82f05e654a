"""Render the procedural world for prompts, with the cameras and the light of rendered results.

`bench quality` compares results with these renders, by the same measures of the same views. `python -m dream_fast.bench
world` stores their measures, in about half an hour on a CPU. Repeat it when the world or the classifier changes.
"""

import argparse
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from dream_fast.bench.quality.attributes import Probe, find_variants, fit_probe, make_variant_scenes
from dream_fast.bench.quality.classifier import WEIGHTS, load_classifier
from dream_fast.bench.quality.measures import delta_e, edge_ratio, floaters, kid, roughness
from dream_fast.bench.quality.protocol import (
    ATTRIBUTED,
    AZIMUTHS,
    BACKGROUND,
    HELD_OUT,
    PROMPTS,
    SHAPE_SIZE,
    SIZE,
    sides,
)
from dream_fast.bench.results import RESULTS
from dream_fast.engine.config.configure import configure
from dream_fast.engine.dream_mini.scenes import RADIUS, Scene, make_scene
from dream_fast.engine.dream_mini.sphere_tracer import pack, trace
from dream_fast.engine.dream_mini.vocabulary import COLORS, find_object
from dream_fast.engine.scene.camera import Cameras, rays, turntable

SEED = 404  # neither dream-mini nor the classifier has learned from it
SCENES = 16  # a prompt, or a variant of one, of which images are rendered
SHAPES = {"cuda": 8, "cpu": 2}  # of them, whose shapes are measured
PAINTS = 32  # scenes of a prompt whose colours are measured
SAME = 10.0  # CIEDE2000 below which two colours of an object are one
FINER = {"cuda": 1.5, "cpu": 1.0}  # rays along an edge of an image, a pixel
WORLD = RESULTS / "world.safetensors"


class WorldMeasures(NamedTuple):
    """Features and shapes of the world's objects: P prompts, N scenes of each, V views, D features."""

    features: Tensor  # [P, N, V, D] of the classifier
    shapes: Tensor  # [P, 3] roughness_deg, edge_ratio, floaters


class Surfaces(NamedTuple):
    """Renders of one scene by V cameras."""

    normal: Tensor  # [V, size, size, 3]
    albedo: Tensor  # [V, size, size, 3]
    opacity: Tensor  # [V, size, size] 0 or 1


def make_scenes(prompt: str, count: int, seed: int = SEED) -> list[Scene]:
    """Objects of the world that a prompt describes, in their natural colour where it names none."""
    name = find_object(prompt)
    assert name is not None, f"{prompt!r} names no object of the world"
    color = next((color for color in COLORS if color in prompt.split()), None)
    rng = np.random.default_rng([seed, *prompt.encode()])
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = make_scene(rng, name, color, plain=True)
        if scene.color == color:
            scenes.append(scene)
    return scenes


def main_color(scene: Scene) -> np.ndarray:
    """The colour [3] of the part that a prompt colours."""
    return next(part.color for part in scene.primitives if part.main and not part.cut)


def main_colors(prompt: str) -> Tensor:
    """Those of PAINTS scenes, [PAINTS, 3]: without light a part has its colour, so nothing need be rendered."""
    return torch.tensor(np.array([main_color(scene) for scene in make_scenes(prompt, PAINTS)]))


def make_palette(prompt: str) -> Tensor:
    """Colours [K, 3] of a prompt's object: first that of the part that it colours, then those of other parts.

    Other parts of nearly the same colour are left out: nobody could tell them apart.
    """
    scenes = make_scenes(prompt, 8)
    main = torch.from_numpy(np.median([main_color(scene) for scene in scenes], axis=0))
    others = {tuple(part.color) for scene in scenes for part in scene.primitives if not (part.main or part.cut)}
    colors = torch.tensor([tuple(main.tolist()), *sorted(others)], dtype=torch.float64)
    apart = delta_e(colors, main) > SAME
    return torch.cat([main[None], colors[apart]])


@torch.no_grad()
def surfaces(scene: Scene, cameras: Cameras, size: int, device: str) -> Surfaces:
    """Normals and colours without light of a scene. Only rays that come near it are traced."""
    primitives, pattern = pack([scene], device)
    used = {kind: int((part.role > 0).sum()) for kind, part in primitives.items()}
    primitives = {
        kind: part._replace(
            **{name: getattr(part, name)[:, :, :n] for name in ("center", "rotation", "size", "role")}
        )._replace(color=part.color[:, :n])
        for kind, part in primitives.items()
        if (n := used[kind])
    }
    views = []
    for number in range(len(cameras.fovy)):
        camera = Cameras(*(part[number : number + 1].to(device) for part in cameras))
        origins, directions = rays(camera, size, size)
        along = (origins * directions).sum(-1)
        near = (origins.square().sum(-1) - along.square() < (1.06 * RADIUS) ** 2)[0]
        traced = trace(origins[:, near], directions[:, near], primitives, pattern)
        hit = torch.zeros(size * size, device=device).masked_scatter_(near, traced.hit[0].float())
        both = torch.zeros(size * size, 6, device=device)
        both[near] = torch.cat([traced.normal[0], traced.albedo[0]], -1)
        views.append((*(both * hit[:, None]).view(size, size, 6).split(3, -1), hit.view(size, size)))
    return Surfaces(*(torch.stack(part) for part in zip(*views, strict=True)))


def render_images(scene: Scene, cameras: Cameras, size: int, background: float, device: str) -> Tensor:
    """Colours without light over gray from V cameras, antialiased: [V, 3, size, size] in [0, 1]."""
    seen = surfaces(scene, cameras, round(FINER[device] * size), device)
    shown = torch.where(seen.opacity[..., None] > 0, seen.albedo, background).permute(0, 3, 1, 2)
    return F.interpolate(shown, (size, size), mode="bilinear", antialias=True)


def measure_world(
    prompts: Sequence[str], around: Cameras, sides: Cameras, sizes: tuple[int, int], background: float, device: str
) -> WorldMeasures:
    """Measures of the world for the prompts: images from `around`, shapes from `sides`, of these sizes in pixels."""
    classifier = load_classifier(device)
    features, shapes = [], []
    for prompt in prompts:
        scenes = make_scenes(prompt, SCENES)
        shown = [render_images(scene, around, sizes[0], background, device) for scene in scenes]
        features.append(torch.stack([classifier.features(views).cpu() for views in shown]))
        of_prompt = []
        for scene in scenes[: SHAPES[device]]:
            seen = surfaces(scene, sides, sizes[1], device)
            of_prompt.append((roughness(seen.normal, seen.opacity), edge_ratio(seen.opacity), floaters(seen.opacity)))
        shapes.append(torch.tensor(of_prompt).mean(0))
    return WorldMeasures(torch.stack(features), torch.stack(shapes))


def measure_attributes(
    prompts: Sequence[str], around: Cameras, size: int, background: float, device: str
) -> dict[str, Probe]:
    """Fit a probe for each prompt, that names a part or pattern, to renders of its variants from `around`."""
    classifier, probes = load_classifier(device), {}
    for prompt in prompts:
        features = []  # [N, V, D] of each variant
        for variant in find_variants(prompt):
            scenes = make_variant_scenes(prompt, variant, SCENES, SEED)
            shown = [render_images(scene, around, size, background, device) for scene in scenes]
            features.append(torch.stack([classifier.features(views).cpu() for views in shown]))
        probes[prompt] = fit_probe(torch.stack(features))
    return probes


def write_world(path: Path, prompts: Sequence[str], world: WorldMeasures, probes: Mapping[str, Probe]) -> None:
    """Write the measures for the prompts and the probes, with the digest of the classifier whose features they
    are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {name: part.half() if name == "features" else part for name, part in world._asdict().items()}
    for prompt, probe in probes.items():
        columns |= {f"{prompt}/{name}": torch.as_tensor(part) for name, part in probe._asdict().items()}
    names = {"prompts": json.dumps(list(prompts)), "attributed": json.dumps(list(probes))}
    save_file(columns, path, metadata=names | {"judge": classifier_digest()})


def read_world(prompts: Sequence[str], path: Path = WORLD) -> WorldMeasures | None:
    """Read the measures of these prompts, in their order. None: one is missing, or they are of another classifier."""
    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        about = file.metadata()
        stored = {name: file.get_tensor(name).float() for name in WorldMeasures._fields}
    there = json.loads(about["prompts"])
    if about["judge"] != classifier_digest() or not set(prompts) <= set(there):
        return None
    rows = [there.index(prompt) for prompt in prompts]
    return WorldMeasures(*(stored[name][rows] for name in WorldMeasures._fields))


def read_probes(path: Path = WORLD) -> dict[str, Probe]:
    """Read the probes by prompt; empty where there are none of the present classifier."""
    if not path.exists():
        return {}
    with safe_open(path, "pt") as file:
        about = file.metadata()
        if about["judge"] != classifier_digest():
            return {}
        return {
            prompt: Probe(
                file.get_tensor(f"{prompt}/weight"),
                file.get_tensor(f"{prompt}/bias"),
                file.get_tensor(f"{prompt}/accuracy").item(),
            )
            for prompt in json.loads(about.get("attributed", "[]"))
        }


def classifier_digest() -> str:
    """Names the judge's weights."""
    return hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()[:16]


def color_error(colors: Tensor, world: Tensor) -> float:
    """Mean CIEDE2000 of median colours [N, 3] to the median of the world's [M, 3]."""
    return delta_e(colors, world.median(0).values).mean().item()


def color_spread(prompts: Sequence[str]) -> float:
    """The colour error of the world's own objects, mean over the prompts."""
    paints = [main_colors(prompt) for prompt in prompts]
    return sum(color_error(colors, colors) for colors in paints) / len(paints)


def world_summary(world: WorldMeasures) -> dict[str, float]:
    """The measures of the world's own objects: means over the prompts, and the distance of one half to the other."""
    halves = world.features.chunk(2, dim=1)
    roughness_deg, edge, floating = world.shapes.mean(0).tolist()
    distance = kid(*(half.flatten(0, 2) for half in halves))
    return {"roughness_deg": roughness_deg, "edge_ratio": edge, "floaters": floating, "kid": distance}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dream_fast.bench world", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=WORLD)
    parser.add_argument("--prompts", nargs="*", help="these instead of the fixed 32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    around = turntable(configure({}, args.device).camera, AZIMUTHS)
    prompts = tuple(args.prompts or (*PROMPTS, *HELD_OUT))
    world = measure_world(prompts, around, sides("cpu"), (SIZE, SHAPE_SIZE), BACKGROUND, args.device)
    attributed = () if args.prompts else ATTRIBUTED
    probes = measure_attributes(attributed, around, SIZE, BACKGROUND, args.device)
    write_world(args.out, prompts, world, probes)
    accuracies = {prompt: round(probe.accuracy, 4) for prompt, probe in probes.items()}
    print(json.dumps(world_summary(world) | {"attribute": accuracies}))
    return 0
