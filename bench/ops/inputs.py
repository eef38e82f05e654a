"""Tensors that the operators' cases are made of: points, rays, parameters of a field, a mesh."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dream_fast import kernels
from dream_fast.kernels import FieldSpec, HashGridSpec

GRID = HashGridSpec()
FIELD = FieldSpec(grid=GRID)
# Density 100 everywhere in the sphere: the last bias gives its logarithm.
SOLID = FieldSpec(grid=GRID, blob_density=0.0)
SOLID_DENSITY = 100.0
MLP = (32, 64, 64, 4)
MLP_FLOPS = 2 * (32 * 64 + 64 * 64 + 64 * 4)
OCCUPANCY = 128
STEP = 2 * math.sqrt(3) / 1024
CAMERA_DISTANCE, FIELD_OF_VIEW, RADIUS = 3.2, 20.0, 0.5
ROW_MULTIPLE = 256
BLOCK = 1 << 18
GROUPS = 32

# The self test's: small enough for Triton's interpreter.
TINY_GRID = HashGridSpec(levels=2, features=2, log2_entries=8, base_resolution=4, max_resolution=16)
TINY_FIELD = FieldSpec(grid=TINY_GRID)
TINY_RAYS, TINY_CELLS, TINY_HIDDEN, TINY_PIXELS = 64, 16, 16, 16
CPU = torch.device("cpu")


def size_of(case: str, kind: str) -> int:
    """The number in a name: size_of("rays_64_analytic", "rays") is 64, size_of("uniform_2^20", "uniform") is 2^20."""
    prefix, number, *_ = case.split("_")
    if prefix != kind:
        raise ValueError(f"the case must be a {kind}_N, got {case}")
    return 2 ** int(number[2:]) if number.startswith("2^") else int(number)


def generator(device: torch.device, seed: int = 0) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def random(*shape: int, device: torch.device, seed: int) -> Tensor:
    """Uniform in [0, 1)."""
    return torch.rand(*shape, generator=generator(device, seed), device=device)


def normal(*shape: int, device: torch.device, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator(device, seed), device=device).to(dtype)


class Scene(NamedTuple):
    """Cells of an occupancy grid over [-bound, bound]^3, and a camera that looks at the origin.

    is_occupied: from centres of cells [n, 3] -> bool [n]. samples_a_ray: room for samples, beyond their mean.
    """

    is_occupied: Callable[[Tensor], Tensor]
    samples_a_ray: int
    bound: float = 1.0
    position: tuple[float, float, float] = (0.0, 0.0, CAMERA_DISTANCE)
    field_of_view: float = FIELD_OF_VIEW


def _is_inside(centres: Tensor) -> Tensor:
    return centres.norm(dim=1) < RADIUS


def _is_shell(centres: Tensor, radius: float = RADIUS) -> Tensor:
    distance = centres.norm(dim=1)
    return (distance > 0.96 * radius) & (distance < radius)


def _is_noise(centres: Tensor) -> Tensor:
    return random(centres.shape[0], device=centres.device, seed=12) < 0.1


# Those of the comparison with CUDA peers, beside the sphere of `rays_N`.
SCENES = {
    "shell": Scene(_is_shell, 24),
    "inside": Scene(_is_inside, 256, position=(0.0, 0.1, 0.9), field_of_view=60.0),
    "noise": Scene(_is_noise, 80),
    "bound2": Scene(partial(_is_shell, radius=1.0), 48, bound=2.0, position=(0.0, 0.0, 2 * CAMERA_DISTANCE)),
}


def scene_of(case: str) -> tuple[Scene, int] | None:
    """The scene that a case names, and pixels a side of its camera; None for other cases."""
    kind = case.split("_")[0]
    return (SCENES[kind], size_of(case, kind)) if kind in SCENES else None


def scene_rays(scene: Scene, side: int, device: torch.device) -> dict[str, Any]:
    """Tensors that march takes, by name."""
    origins, directions = camera(side, device, scene.position, scene.field_of_view)
    perturb = random(side * side, device=device, seed=1)
    return {
        "origins": origins,
        "directions": directions,
        "bits": occupancy_bits(device, scene.is_occupied, scene.bound),
        "perturb": perturb,
    }


def scene_samples(scene: Scene, side: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Samples of the scene's rays, as `sphere_samples`. Raises AssertionError: for more than `samples_a_ray` a ray."""
    samples = kernels.march(
        **scene_rays(scene, side, device),
        bound=scene.bound,
        resolution=OCCUPANCY,
        capacity=side * side * scene.samples_a_ray,
    )
    assert not samples.overflow, "samples_a_ray is too small"
    rows = int(samples.count) // ROW_MULTIPLE * ROW_MULTIPLE
    return samples.positions[:rows], samples.t[:rows].clone(), samples.offsets.clamp(max=rows)


def camera(
    side: int,
    device: torch.device,
    position: tuple[float, float, float] = (0.0, 0.0, CAMERA_DISTANCE),
    field_of_view: float = FIELD_OF_VIEW,
) -> tuple[Tensor, Tensor]:
    """Rays through the centres of side x side pixels, row by row: origins [R, 3], directions [R, 3] (unit).

    The camera looks at the origin from a position with x = 0.
    """
    half = math.tan(math.radians(field_of_view / 2))
    axis = ((torch.arange(side, device=device, dtype=torch.float64) + 0.5) * (2 / side) - 1) * half
    y, x = torch.meshgrid(-axis, axis, indexing="ij")
    _, height, depth = (number / math.hypot(*position) for number in position)
    directions = torch.stack([x, depth * y - height, -height * y - depth], -1).view(-1, 3)
    directions = directions / directions.norm(dim=1, keepdim=True)
    origins = torch.tensor(position, device=device).expand_as(directions).contiguous()
    return origins, directions.float()


def sphere_samples(side: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Samples of the camera's rays inside the sphere: positions [N, 3], t [N], offsets int64 [R + 1]."""
    origins, directions = camera(side, device)
    middle = -(origins.double() * directions.double()).sum(1)
    half = (RADIUS**2 - (origins.double().square().sum(1) - middle**2)).clamp(min=0).sqrt()
    shift = random(side * side, device=device, seed=1).double()
    samples = (2 * half / STEP - shift).ceil().clamp(min=0).long()
    offsets = torch.cat([samples.new_zeros(1), samples.cumsum(0)])
    rows = int(offsets[-1]) // ROW_MULTIPLE * ROW_MULTIPLE
    ray = torch.repeat_interleave(torch.arange(side * side, device=device), samples)[:rows]
    number = torch.arange(rows, device=device) - offsets[ray]
    t = ((middle - half)[ray] + (number + shift[ray]) * STEP).float()
    return origins[ray] + t[:, None] * directions[ray], t, offsets.clamp(max=rows)


def points(case: str, device: torch.device) -> Tensor:
    """Positions in [-1, 1]^3 of a rays_ or uniform_ case, or of a scene as shares of its bound: [N, 3]."""
    if named := scene_of(case):
        return scene_samples(*named, device)[0] / named[0].bound
    if case.startswith("uniform"):
        return 2 * random(size_of(case, "uniform"), 3, device=device, seed=2) - 1
    return sphere_samples(size_of(case, "rays"), device)[0]


def occupancy_bits(
    device: torch.device, is_occupied: Callable[[Tensor], Tensor] = _is_inside, bound: float = 1.0
) -> Tensor:
    """Cells of [-bound, bound]^3 whose centre is occupied, inside the sphere by default: uint8 [C, G^3 / 8]."""
    levels = kernels.cascades(bound)
    occupied = is_occupied(kernels.occupancy_points(OCCUPANCY, levels, bound, device=device))
    powers = 2 ** torch.arange(8, device=device)
    return (occupied.view(levels, -1, 8) * powers).sum(-1).to(torch.uint8)


def parameters(device: torch.device) -> dict[str, Tensor]:
    """Table, weights and biases of the field, fp32, by name.

    Entries shrink with the size of a level's cells, as in a fitted scene: each level adds as much to the slope.
    """
    table = 0.5 * normal(GRID.rows, GRID.features, device=device, seed=3)
    for level, resolution in enumerate(GRID.resolutions):
        table[GRID.offsets[level] : GRID.offsets[level + 1]] *= GRID.resolutions[0] / resolution
    tensors = {"table": table}
    for layer, (inputs, outputs) in enumerate(zip(MLP[:-1], MLP[1:], strict=True)):
        tensors[f"weight_{layer}"] = normal(outputs, inputs, device=device, seed=4 + layer) * (2 / inputs) ** 0.5
        tensors[f"bias_{layer}"] = 0.1 * normal(outputs, device=device, seed=7 + layer)
    return tensors


def mlp(tensors: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and biases out of named tensors."""
    layers = range(sum(name.startswith("weight_") for name in tensors))
    return [tensors[f"weight_{layer}"] for layer in layers], [tensors[f"bias_{layer}"] for layer in layers]


def relative_slope(x: Tensor, table: Tensor, weights: list[Tensor], biases: list[Tensor], spec: FieldSpec) -> Tensor:
    """|grad sigma| / sigma of the field at x: [N, 1], in the dtype of x.

    The weight of a normal's error: the rounding of sigma moves a normal the further, the less sigma changes.
    """
    with torch.enable_grad():
        at = x.detach().requires_grad_()
        sigma, _ = kernels.field_reference(at, table, weights, biases, spec, dtype=x.dtype)
        (gradient,) = torch.autograd.grad(sigma.sum(), at)
    return gradient.norm(dim=1, keepdim=True) / sigma.detach()[:, None].clamp(min=torch.finfo(x.dtype).tiny)


@lru_cache
def touched_bytes(case: str, device: torch.device) -> int:
    """Bytes of the fp32 table that the points of a case read: rows that get a gradient."""
    x = (points(case, device) + 1) / 2
    table = torch.zeros(GRID.rows, GRID.features, device=x.device, requires_grad=True)
    touched = torch.zeros(GRID.rows, dtype=torch.bool, device=x.device)
    for block in x.split(BLOCK):
        with torch.enable_grad():
            (grad,) = torch.autograd.grad(kernels.hash_grid_reference(block, table, GRID).sum(), table)
        touched |= (grad != 0).any(1)
    return int(touched.sum()) * GRID.features * 4


def nbytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def ball(triangles: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """A bumpy ball of about "50k" or "1M" triangles before the camera: clip [1, V, 4], faces [T, 3], points [V, 3]."""
    count = float(triangles[:-1]) * {"k": 1e3, "M": 1e6}[triangles[-1]]
    side = round((count / 4) ** 0.5)
    u, v = torch.meshgrid(torch.arange(2 * side), torch.arange(side + 1), indexing="ij")
    azimuth, polar = u.double() * (math.pi / side), v.double() * (math.pi / side)
    unit = torch.stack([polar.sin() * azimuth.cos(), polar.cos(), polar.sin() * azimuth.sin()], -1).view(-1, 3)
    # Waves of a few degrees fold the rim, as hair or leaves do.
    radius = RADIUS * (0.95 + 0.03 * torch.sin(40 * azimuth) * torch.sin(40 * polar)).view(-1, 1)
    # Turned, so that no triangle is seen exactly from its side: rounding would decide what is a silhouette.
    turn = torch.linalg.matrix_exp(torch.tensor([[0, 0.3, 0.5], [-0.3, 0, 0.4], [-0.5, -0.4, 0]], dtype=torch.float64))
    points = (radius * unit @ turn).to(device, torch.float32)
    i, j = u[:, :-1].reshape(-1), v[:, :-1].reshape(-1)
    below, beside = i * (side + 1) + j, (i + 1) % (2 * side) * (side + 1) + j
    faces = torch.cat([torch.stack([below, beside, below + 1], 1), torch.stack([beside, beside + 1, below + 1], 1)]).to(
        device, torch.int32
    )
    near, far, half = 0.1, 10.0, math.tan(math.radians(FIELD_OF_VIEW / 2))
    x, y, depth = points[:, 0], points[:, 1], CAMERA_DISTANCE - points[:, 2]
    z = ((far + near) * depth - 2 * far * near) / (far - near)
    return torch.stack([x / half, y / half, z, depth], 1)[None], faces, points


def tiny_normal(*shape: int, device: torch.device, seed: int) -> Tensor:
    """`normal` with the same numbers on every device."""
    return normal(*shape, device=CPU, seed=seed).to(device)


def tiny_random(*shape: int, device: torch.device, seed: int) -> Tensor:
    """`random` with the same numbers on every device."""
    return random(*shape, device=CPU, seed=seed).to(device)


def tiny_parameters(device: torch.device) -> dict[str, Tensor]:
    """Table, weights and biases of TINY_FIELD, fp32, by name."""
    return {
        "table": tiny_normal(TINY_GRID.rows, TINY_GRID.features, device=device, seed=1),
        "weight_0": 0.5 * tiny_normal(TINY_HIDDEN, TINY_GRID.channels, device=device, seed=2),
        "weight_1": 0.3 * tiny_normal(4, TINY_HIDDEN, device=device, seed=3),
        "bias_0": 0.1 * tiny_normal(TINY_HIDDEN, device=device, seed=4),
        "bias_1": 0.1 * tiny_normal(4, device=device, seed=5),
    }


def tiny_points(device: torch.device) -> Tensor:
    """Points of the unit cube [N, 3]: 128, or 4096 on a GPU, where normals by differences in 16 bits need them.

    They are the steepest quarter of uniform ones, since normals of 16 bits need a slope that differences do not lose.
    """
    count = 4096 if device.type == "cuda" else 128
    points = tiny_random(4 * count, 3, device=device, seed=7)
    tensors = tiny_parameters(device)
    slope = relative_slope(2 * points - 1, tensors["table"], *mlp(tensors), TINY_FIELD)
    return points[slope[:, 0].topk(count).indices]


def tiny_rays(device: torch.device) -> dict[str, Tensor]:
    """TINY_RAYS rays from one point towards the middle of a grid whose cells are all occupied."""
    aims = 0.3 * tiny_normal(TINY_RAYS, 3, device=device, seed=6)
    origins = torch.tensor([0.1, 0.2, 2.0], device=device).expand(TINY_RAYS, 3).contiguous()
    return {
        "origins": origins,
        "directions": torch.nn.functional.normalize(aims - origins, dim=1),
        "bits": torch.full((1, TINY_CELLS**3 // 8), 255, dtype=torch.uint8, device=device),
    }


def tiny_samples(device: torch.device) -> dict[str, Tensor]:
    """128 samples on rays: one ray without samples, some with many, most with two."""
    offsets = torch.tensor([0, 0, 7, 20, 21, *range(24, 129, 2)], device=device)
    return {
        "sigma": 4 * tiny_random(128, device=device, seed=30),
        "values": tiny_random(128, 3, device=device, seed=31),
        "t": 1 + tiny_random(128, device=device, seed=32).sort().values,
        "dt": torch.full((128,), 0.05, device=device),
        "offsets": offsets,
    }


def tiny_mesh(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """A bumpy sheet of 50 triangles that fills most of an image: clip [1, 36, 4], faces [50, 3], attributes [36, 3]."""
    place = torch.linspace(-0.9, 0.9, 6, device=device)
    corners = torch.stack(torch.meshgrid(place, place, indexing="ij"), -1).view(-1, 2)
    corners = corners + 0.08 * tiny_normal(36, 2, device=device, seed=34)
    depth_and_w = torch.tensor([0.1, 0.9], device=device) + 0.3 * tiny_random(36, 2, device=device, seed=35)
    first = torch.arange(36, device=device).view(6, 6)[:-1, :-1].reshape(-1, 1)
    halves = [first + torch.tensor(half, device=device) for half in ([0, 6, 7], [0, 7, 1])]
    return (
        torch.cat([corners, depth_and_w], 1)[None],
        torch.cat(halves).int(),
        tiny_normal(36, 3, device=device, seed=80),
    )
