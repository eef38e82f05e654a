"""The workloads: which operator, on what, and what the hardware has to do for it at least.

`case` names a workload and its size; any size works, so that the same code serves a CPU.
- `uniform_2^20`: 2^20 points, uniform in the cube.
- `rays_64`: a camera at (0, 0, 3.2) looks at the origin, vertical field of view 20 degrees, 64 x 64 rays; a sample
  every 2 sqrt(3) / 1024 along the ray inside the sphere |x| < 0.5, one random offset a ray, samples in ray order. Their
  number is cut to a multiple of 256, as buffers of a run are. `_finite_difference` and `_analytic` name the normals.
- `frame_800`: the same camera and sphere with density 100 inside, 800 x 800 rays; `_normals` adds the normals.
- `12.2M`: as many parameters.
- `mesh_50k_512`: the camera before a bumpy ball of about as many triangles, 512 x 512 pixels (M: millions); of
  barycentrics each pixel counts as much as it lies inside its triangle, since rounding may turn those on an edge.
- `vae_512x512x128`, `unet_64x64x320`: height, width and channels before a GroupNorm of 32 groups in Stable Diffusion,
  one picture in the VAE's encoder, two in the UNet; weights are frozen. `_channels_last` is the memory format.
Grid: 16 levels, 2 features, 2^19 entries, 16 to 2048, smoothstep. MLP: 32 -> 64 -> 64 -> 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dream_fast import kernels
from dream_fast.kernels import AdanState, FieldSpec, HashGridSpec

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


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One operator with its inputs.

    call(operator, tensors, dtype) runs the public operator, or its reference, on `tensors` in a compute dtype and gives
    the outputs as a tuple. tensors: the inputs by name. leaves: those that get gradients. upstream: gradients of the
    outputs (None: the loss does not use it). weights(tensors): a weight for the error of each output, or None, from
    the inputs in fp64 (see `dream_fast.bench.accuracy`). mutates: whether it changes its inputs. least_bytes: what has
    to move, each input read once and each output written once. flops: of matrix products. gathers: corners read, a row
    of the table each; scatters: corners added to.
    """

    operator: Callable[..., Any]
    reference: Callable[..., Any]
    call: Callable[[Callable[..., Any], dict[str, Tensor], torch.dtype], tuple[Tensor, ...]]
    tensors: dict[str, Tensor]
    leaves: tuple[str, ...] = ()
    upstream: tuple[Tensor | None, ...] = ()
    weights: Callable[[dict[str, Tensor]], tuple[Tensor | None, ...]] | None = None
    mutates: bool = False
    least_bytes: int = 0
    flops: int = 0
    gathers: int = 0
    scatters: int = 0


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the benchmark, without the implementation."""

    op: str
    case: str
    mode: str
    dtype: str

    @property
    def compute_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def build(self, device: torch.device | str = "cpu", *, count_bytes: bool = True) -> Problem:
        """The inputs on `device`. `count_bytes=False` saves the search for the rows of the table that are touched."""
        return _BUILDERS[self.op](self, torch.device(device), count_bytes)


def run(problem: Problem, operator: Callable[..., Any], mode: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Outputs (forward), or outputs and gradients of the leaves (forward_backward)."""
    if mode == "forward":
        with torch.no_grad():
            return problem.call(operator, problem.tensors, dtype)
    leaves = {name: problem.tensors[name].detach().requires_grad_() for name in problem.leaves}
    outputs = problem.call(operator, problem.tensors | leaves, dtype)
    used = [(out, grad) for out, grad in zip(outputs, problem.upstream, strict=True) if grad is not None]
    grads = torch.autograd.grad([out for out, _ in used], list(leaves.values()), [grad for _, grad in used])
    return (*(out.detach() for out in outputs), *grads)


# --- inputs


def size_of(case: str, kind: str) -> int:
    """The number in a name: size_of("rays_64_analytic", "rays") is 64, size_of("uniform_2^20", "uniform") is 2^20."""
    found, number, *_ = case.split("_")
    if found != kind:
        raise ValueError(f"the case must be a {kind}_N, got {case}")
    return 2 ** int(number[2:]) if number.startswith("2^") else int(number)


def generator(device: torch.device, seed: int = 0) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def random(*shape: int, device: torch.device, seed: int) -> Tensor:
    """Uniform in [0, 1)."""
    return torch.rand(*shape, generator=generator(device, seed), device=device)


def normal(*shape: int, device: torch.device, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator(device, seed), device=device).to(dtype)


def camera(side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rays through the centres of side x side pixels, row by row: origins [R, 3], directions [R, 3] (unit)."""
    half = math.tan(math.radians(FIELD_OF_VIEW / 2))
    axis = ((torch.arange(side, device=device, dtype=torch.float64) + 0.5) * (2 / side) - 1) * half
    y, x = torch.meshgrid(-axis, axis, indexing="ij")
    directions = torch.stack([x, y, torch.full_like(x, -1)], -1).view(-1, 3)
    directions = directions / directions.norm(dim=1, keepdim=True)
    origins = torch.zeros_like(directions)
    origins[:, 2] = CAMERA_DISTANCE
    return origins.float(), directions.float()


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
    """World positions in [-1, 1]^3 of a rays_ or uniform_ case: [N, 3]."""
    if case.startswith("uniform"):
        return 2 * random(size_of(case, "uniform"), 3, device=device, seed=2) - 1
    return sphere_samples(size_of(case, "rays"), device)[0]


def occupancy_bits(device: torch.device) -> Tensor:
    """Cells of [-1, 1]^3 whose centre lies inside the sphere: uint8 [1, G^3 / 8]."""
    inside = kernels.occupancy_points(OCCUPANCY, 1, 1.0, device=device).norm(dim=1) < RADIUS
    powers = 2 ** torch.arange(8, device=device)
    return (inside.view(1, -1, 8) * powers).sum(-1).to(torch.uint8)


def parameters(device: torch.device) -> dict[str, Tensor]:
    """Table, weights and biases of the field, fp32, by name.

    Entries shrink with the size of a level's cells, as in a fitted scene: each level adds as much to the slope.
    """
    table = 0.5 * normal(GRID.rows, GRID.features, device=device, seed=3)
    for level, resolution in enumerate(GRID.resolutions):
        table[GRID.offsets[level] : GRID.offsets[level + 1]] *= GRID.resolutions[0] / resolution
    found = {"table": table}
    for layer, (inputs, outputs) in enumerate(zip(MLP[:-1], MLP[1:], strict=True)):
        found[f"weight_{layer}"] = normal(outputs, inputs, device=device, seed=4 + layer) * (2 / inputs) ** 0.5
        found[f"bias_{layer}"] = 0.1 * normal(outputs, device=device, seed=7 + layer)
    return found


def mlp(tensors: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and biases out of named tensors."""
    layers = range(len(MLP) - 1)
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
    seen = torch.zeros(GRID.rows, dtype=torch.bool, device=x.device)
    for block in x.split(BLOCK):
        with torch.enable_grad():
            (grad,) = torch.autograd.grad(kernels.hash_grid_reference(block, table, GRID).sum(), table)
        seen |= (grad != 0).any(1)
    return int(seen.sum()) * GRID.features * 4


def nbytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# --- problems


def _hash_grid(case: Case, device: torch.device, count_bytes: bool) -> Problem:
    x = (points(case.case, device) + 1) / 2
    table = normal(GRID.rows, GRID.features, device=device, seed=3)
    upstream = normal(x.shape[0], GRID.channels, device=device, seed=11, dtype=case.compute_dtype)
    backward = case.mode == "forward_backward"
    table_bytes = touched_bytes(case.case, device) if count_bytes else 0
    gathers = x.shape[0] * 8 * GRID.levels
    return Problem(
        operator=kernels.hash_grid,
        reference=kernels.hash_grid_reference,
        call=lambda op, tensors, dtype: (op(tensors["x"], tensors["table"], GRID, dtype=dtype),),
        tensors={"x": x, "table": table},
        leaves=("table",),
        upstream=(upstream,),
        # Read x and the table, write features; backward: read their gradient, write the table's.
        least_bytes=nbytes(x, upstream) + table_bytes + backward * nbytes(upstream, table),
        gathers=gathers,
        scatters=gathers * backward,
    )


def _field(case: Case, device: torch.device, count_bytes: bool) -> Problem:
    x = points(case.case, device)
    rows = x.shape[0]
    backward = case.mode == "forward_backward"
    weights = parameters(device)
    normals = case.op == "field_normals"
    mode = next((mode for mode in ("finite_difference", "analytic") if case.case.endswith(mode)), None)
    if normals and mode is None:
        raise ValueError(f"a case of field_normals ends in _finite_difference or _analytic, got {case.case}")
    # Finite differences take seven fields a point; analytic normals differentiate the field into the position.
    fields = {None: 1, "finite_difference": 7, "analytic": 2}[mode]
    corners = rows * 8 * GRID.levels * (7 if mode == "finite_difference" else 1)
    table_bytes = touched_bytes("_".join(case.case.split("_")[:2]), device) if count_bytes else 0
    # The loss sees the logarithm of the density, more or less; else the middle of the blob would be all there is.
    blob = torch.exp(-FIELD.blob_density * torch.exp(x.square().sum(1) / (-2 * FIELD.blob_radius**2)))
    upstream = [blob * normal(rows, device=device, seed=12), normal(rows, 3, device=device, seed=13)]
    if normals:
        upstream.append(normal(rows, 3, device=device, seed=14))

    def call(op, tensors, dtype):
        layers = mlp(tensors)
        options = {"mode": mode} if normals else {}
        return op(tensors["x"], tensors["table"], *layers, FIELD, dtype=dtype, **options)

    return Problem(
        operator=kernels.field_normals if normals else kernels.field,
        reference=kernels.field_normals_reference if normals else kernels.field_reference,
        call=call,
        tensors={"x": x, **weights},
        leaves=tuple(weights),
        upstream=tuple(upstream),
        weights=(lambda t: (None, None, relative_slope(t["x"], t["table"], *mlp(t), FIELD))) if normals else None,
        least_bytes=nbytes(x, *upstream) + table_bytes + backward * nbytes(*upstream, weights["table"]),
        flops=rows * fields * MLP_FLOPS * (3 if backward else 1),
        gathers=corners,
        scatters=corners * backward,
    )


def _march(case: Case, device: torch.device, count_bytes: bool) -> Problem:
    side = size_of(case.case, "rays")
    origins, directions = camera(side, device)
    samples = sphere_samples(side, device)[1].shape[0]
    # As many samples as in the sphere, give or take the cells on its surface.
    capacity = math.ceil(1.05 * samples / 4096) * 4096
    tensors = {
        "origins": origins,
        "directions": directions,
        "bits": occupancy_bits(device),
        "perturb": random(side * side, device=device, seed=1),
    }

    def call(op, tensors, dtype):
        rays = (tensors["origins"], tensors["directions"], tensors["bits"])
        return tuple(op(*rays, bound=1.0, resolution=OCCUPANCY, capacity=capacity, perturb=tensors["perturb"]))

    return Problem(
        operator=kernels.march,
        reference=kernels.march_reference,
        call=call,
        tensors=tensors,
        # A row: position, ray (int64), t and dt; a ray: its offset.
        least_bytes=nbytes(*tensors.values()) + capacity * (12 + 8 + 4 + 4) + (side * side + 1) * 8,
    )


def _composite(case: Case, device: torch.device, count_bytes: bool) -> Problem:
    side = size_of(case.case, "rays")
    _, t, offsets = sphere_samples(side, device)
    rows = t.shape[0]
    tensors = {
        # Thin enough that no ray ends early: every sample has to be read.
        "sigma": 4 * random(rows, device=device, seed=21),
        "values": random(rows, 3, device=device, seed=22),
        "t": t,
        "dt": torch.full_like(t, STEP),
        "offsets": offsets,
    }
    image = normal(side * side, 3, device=device, seed=23)
    backward = case.mode == "forward_backward"
    # Written: weights; values, opacity and depth of rays. Backward: the image's gradient in, two gradients out.
    forward_bytes = nbytes(*tensors.values()) + nbytes(t) + side * side * 5 * 4
    backward_bytes = nbytes(tensors["sigma"], tensors["values"]) + nbytes(image)
    return Problem(
        operator=kernels.composite,
        reference=kernels.composite_reference,
        call=lambda op, tensors, dtype: tuple(op(*(tensors[k] for k in ("sigma", "values", "t", "dt", "offsets")))),
        tensors=tensors,
        leaves=("sigma", "values"),
        upstream=(image, None, None, None),
        least_bytes=forward_bytes + backward * backward_bytes,
    )


def _render(case: Case, device: torch.device, count_bytes: bool) -> Problem:
    side = size_of(case.case, "frame")
    origins, directions = camera(side, device)
    weights = parameters(device)
    last = len(MLP) - 2
    weights[f"weight_{last}"][0] = 0
    weights[f"bias_{last}"][0] = math.log(SOLID_DENSITY)
    normals = case.case.endswith("_normals")
    tensors = {
        "origins": origins,
        "directions": directions,
        "bits": occupancy_bits(device),
        "background": torch.ones(3, device=device),
        **weights,
    }
    closest = origins - (origins * directions).sum(1, keepdim=True) * directions
    hits = int((closest.norm(dim=1) < RADIUS).sum())
    # A ray ends when its transmittance is below 1e-3.
    samples = hits * math.ceil(math.log(1e3) / (SOLID_DENSITY * STEP))

    def call(op, tensors, dtype):
        rays = (tensors["origins"], tensors["directions"], tensors["bits"])
        options = {"resolution": OCCUPANCY, "background": tensors["background"], "normals": normals, "dtype": dtype}
        return tuple(op(*rays, tensors["table"], *mlp(tensors), SOLID, **options))

    return Problem(
        operator=kernels.render,
        reference=kernels.render_reference,
        call=call,
        tensors=tensors,
        least_bytes=nbytes(*tensors.values()) + side * side * (3 + 3 + 1 + 1) * 4,
        flops=(samples + 7 * hits * normals) * MLP_FLOPS,
        gathers=(samples + 7 * hits * normals) * 8 * GRID.levels,
    )


def _adan(case: Case, device: torch.device, count_bytes: bool) -> Problem:
    size = round(float(case.case.removesuffix("M")) * 1e6)
    names = ("params", "grads", "exp_avg", "exp_avg_diff", "exp_avg_sq", "previous_grad", "ema")
    tensors = {name: 0.01 * normal(size, device=device, seed=31 + i) for i, name in enumerate(names)}
    # Far enough from zero that the step does not divide by rounding errors.
    tensors["exp_avg_sq"].square_().add_(1e-4)
    tensors["step"] = torch.full((), 10.0, device=device)
    # The table learns ten times as fast as the MLP, which comes last.
    ends = (max(size - 6500, size // 2), size)

    def call(op, tensors, dtype):
        state = AdanState(**{name: tensors[name] for name in (*names[2:], "step")})
        # max_grad_norm as in a run: with 12.2 M random gradients the clip is at work.
        found = op(tensors["params"], tensors["grads"], state, group_ends=ends, lrs=(5e-2, 5e-3))
        return (*(tensors[name] for name in names if name != "grads"), found)

    return Problem(
        operator=kernels.adan_step,
        reference=kernels.adan_step_reference,
        call=call,
        tensors=tensors,
        mutates=True,
        # The norm needs the gradient of every parameter before the first update: it is read twice.
        least_bytes=size * 4 * (1 + 7 + 6),
    )


def _group_norm_silu(case: Case, device: torch.device, count_bytes: bool) -> Problem:
    part, size, *memory = case.case.split("_", 2)
    if part not in ("vae", "unet") or memory not in ([], ["channels_last"]):
        raise ValueError(f"the case must be vae_HxWxC or unet_HxWxC, with or without _channels_last, got {case.case}")
    height, width, channels = map(int, size.split("x"))
    order = torch.channels_last if memory else torch.contiguous_format
    shape, dtype = (1 if part == "vae" else 2, channels, height, width), case.compute_dtype
    tensors = {
        "x": (0.5 + normal(*shape, device=device, seed=41)).to(dtype, memory_format=order),
        "weight": (1 + 0.2 * normal(channels, device=device, seed=42)).to(dtype),
        "bias": 0.2 * normal(channels, device=device, seed=43, dtype=dtype),
    }
    upstream = normal(*shape, device=device, seed=44).to(dtype, memory_format=order)
    return Problem(
        operator=kernels.group_norm_silu,
        reference=kernels.group_norm_silu_reference,
        call=lambda op, tensors, dtype: (op(tensors["x"], GROUPS, tensors["weight"], tensors["bias"]),),
        tensors=tensors,
        leaves=("x",),
        upstream=(upstream,),
        # Read x, write y; backward: read x and the gradient of y, write that of x.
        least_bytes=nbytes(*tensors.values()) + nbytes(upstream) * (4 if case.mode == "forward_backward" else 1),
    )


def _bias_residual(case: Case, device: torch.device, count_bytes: bool) -> Problem:
    norm = _group_norm_silu(case, device, count_bytes)
    x, bias = norm.tensors["x"], norm.tensors["bias"]
    residual = torch.empty_like(x).copy_(normal(*x.shape, device=device, seed=45))
    return Problem(
        operator=kernels.bias_residual,
        reference=kernels.bias_residual_reference,
        call=lambda op, tensors, dtype: (op(tensors["x"], tensors["bias"], tensors["residual"]),),
        tensors={"x": x, "bias": bias, "residual": residual},
        leaves=("x", "residual"),
        upstream=norm.upstream,
        # The gradients of x and residual are the one that comes.
        least_bytes=nbytes(x, bias, residual) + nbytes(x),
    )


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


def _mesh(case: Case, device: torch.device, count_bytes: bool) -> Problem:
    _, triangles, side = case.case.split("_")
    clip, faces, points = ball(triangles, device)
    size = int(side)
    backward = case.mode == "forward_backward"
    tensors = {"clip": clip, "faces": faces}
    pixels = size * size
    if case.op == "raster":

        def call(op, tensors, dtype):
            seen = op(tensors["clip"], tensors["faces"], size, size).barycentrics
            return (seen * seen.detach().prod(-1, keepdim=True),)

        return Problem(
            operator=kernels.rasterize,
            reference=kernels.rasterize_reference,
            call=call,
            tensors=tensors,
            leaves=("clip",),
            upstream=(normal(1, size, size, 3, device=device, seed=51),),
            # Written: triangle, barycentrics and depth. Backward: read triangle and a gradient, write clip's.
            least_bytes=nbytes(clip, faces) + 20 * pixels + backward * (nbytes(clip, clip, faces) + 16 * pixels),
        )
    fragments = kernels.rasterize(clip, faces, size, size)
    tensors |= fragments._asdict()

    def seen(tensors):
        return kernels.Fragments(*(tensors[name] for name in kernels.Fragments._fields))

    upstream = normal(1, size, size, 3, device=device, seed=52)
    if case.op == "interpolate":
        return Problem(
            operator=kernels.interpolate,
            reference=kernels.interpolate_reference,
            call=lambda op, tensors, dtype: (op(tensors["points"], tensors["faces"], seen(tensors)),),
            tensors=tensors | {"points": points},
            leaves=("points", "barycentrics"),
            upstream=(upstream,),
            least_bytes=nbytes(points, faces, upstream)
            + 16 * pixels
            + backward * (nbytes(points, points, faces, upstream) + 28 * pixels),
        )
    tensors |= {"image": random(1, size, size, 3, device=device, seed=53), "opposite": kernels.opposite_corners(faces)}

    def smooth(op, tensors, dtype):
        return (op(tensors["image"], tensors["clip"], tensors["faces"], seen(tensors), tensors["opposite"]),)

    return Problem(
        operator=kernels.antialias,
        reference=kernels.antialias_reference,
        call=smooth,
        tensors=tensors,
        leaves=("image", "clip"),
        upstream=(upstream,),
        # Read image, triangle and depth, write the image; backward: read and write its gradient, write clip's.
        least_bytes=2 * nbytes(upstream) + 8 * pixels + backward * (3 * nbytes(upstream) + 8 * pixels + nbytes(clip)),
    )


_BUILDERS = {
    "hash_grid": _hash_grid,
    "field": _field,
    "field_normals": _field,
    "march": _march,
    "composite": _composite,
    "render": _render,
    "adan": _adan,
    "group_norm_silu": _group_norm_silu,
    "bias_residual": _bias_residual,
    "raster": _mesh,
    "interpolate": _mesh,
    "antialias": _mesh,
}

# --- registry

BOTH = ("forward", "forward_backward")
POINTS = ("rays_64", "rays_128", "rays_256", "uniform_2^18", "uniform_2^20", "uniform_2^22")
NORMALS = ("rays_64_finite_difference", "rays_64_analytic")
RAYS = ("rays_64", "rays_128", "rays_256", "rays_512")
MESHES = ("mesh_50k_512", "mesh_50k_2048", "mesh_1M_512", "mesh_1M_2048")
NORMS = tuple(
    f"{size}{memory}"
    for size in ("vae_512x512x128", "vae_256x256x256", "vae_128x128x512", "vae_64x64x512")
    + ("unet_64x64x320", "unet_64x64x960", "unet_32x32x640", "unet_16x16x1280", "unet_8x8x2560")
    for memory in ("", "_channels_last")
)


def _rows(op: str, names: tuple[str, ...], modes: tuple[str, ...], dtype: str) -> list[Case]:
    return [Case(op=op, case=case, mode=mode, dtype=dtype) for case in names for mode in modes]


FULL = (
    *_rows("hash_grid", POINTS, BOTH, "float16"),
    *_rows("field", POINTS, BOTH, "float16"),
    *_rows("field_normals", NORMALS, BOTH, "float16"),
    *_rows("march", RAYS, BOTH[:1], "float32"),
    *_rows("composite", RAYS, BOTH, "float32"),
    *_rows("render", ("frame_800", "frame_800_normals"), BOTH[:1], "float16"),
    *_rows("adan", ("12.2M",), BOTH[:1], "float32"),
    *_rows("group_norm_silu", NORMS, BOTH, "float16"),
    *_rows("bias_residual", (*NORMS[:2], *NORMS[8:10]), BOTH[:1], "float16"),
    *_rows("raster", MESHES, BOTH, "float32"),
    *_rows("interpolate", (MESHES[0], MESHES[-1]), BOTH, "float32"),
    *_rows("antialias", (MESHES[0], MESHES[-1]), BOTH, "float32"),
)
SMALL = (
    *_rows("hash_grid", ("rays_8", "uniform_2^10"), BOTH, "float32"),
    *_rows("field", ("rays_8", "uniform_2^10"), BOTH, "float32"),
    *_rows("field_normals", ("rays_8_finite_difference", "rays_8_analytic"), BOTH, "float32"),
    *_rows("march", ("rays_8",), BOTH[:1], "float32"),
    *_rows("composite", ("rays_8",), BOTH, "float32"),
    *_rows("render", ("frame_16",), BOTH[:1], "float32"),
    *_rows("adan", ("0.1M",), BOTH[:1], "float32"),
    *_rows("group_norm_silu", ("vae_16x16x64", "unet_8x8x64_channels_last"), BOTH, "float32"),
    *_rows("bias_residual", ("vae_16x16x64",), BOTH[:1], "float32"),
    *_rows("raster", ("mesh_1k_16",), BOTH, "float32"),
    *_rows("interpolate", ("mesh_1k_16",), BOTH, "float32"),
    *_rows("antialias", ("mesh_1k_16",), BOTH, "float32"),
)
