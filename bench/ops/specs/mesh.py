"""Operators on a mesh: rasterisation, interpolation and antialiasing."""

from __future__ import annotations

import torch
from torch import Tensor

from dream_fast import kernels
from dream_fast.bench.ops.inputs import TINY_PIXELS, ball, nbytes, normal, random, tiny_mesh
from dream_fast.bench.ops.spec import AotCase, Case, OpSpec, Problem

MESHES = ("mesh_50k_512", "mesh_50k_2048", "mesh_1M_512", "mesh_1M_2048")
# In single precision slivers at the rim of a finer mesh change places.
GATE = dict.fromkeys(MESHES, "mesh_4k_256")


def make_mesh(case: Case, device: torch.device) -> tuple[Tensor, Tensor, Tensor, int]:
    """A case's clip positions [1, V, 4], faces [T, 3], attributes [V, 3], and pixels a side."""
    if case.case == "tiny":
        return *tiny_mesh(device), TINY_PIXELS
    _, triangles, side = case.case.split("_")
    return *ball(triangles, device), int(side)


def make_fragments(case: Case, clip: Tensor, faces: Tensor, size: int) -> dict[str, Tensor]:
    """Fragments of the mesh, by name; tiny ones by the reference, so that one broken kernel is one finding."""
    rasterize = kernels.rasterize_reference if case.case == "tiny" else kernels.rasterize
    return rasterize(clip, faces, size, size)._asdict()


def select_fragments(tensors: dict[str, Tensor]) -> kernels.Fragments:
    return kernels.Fragments(*(tensors[name] for name in kernels.Fragments._fields))


def raster(case: Case, device: torch.device, count_bytes: bool) -> Problem:
    clip, faces, _, size = make_mesh(case, device)
    pixels, backward = size * size, case.mode == "forward_backward"

    def call(op, tensors, dtype):
        barycentrics = op(tensors["clip"], tensors["faces"], size, size).barycentrics
        return (barycentrics * barycentrics.detach().prod(-1, keepdim=True),)

    return Problem(
        call=call,
        tensors={"clip": clip, "faces": faces},
        leaves=("clip",),
        upstream=(normal(1, size, size, 3, device=device, seed=51),),
        # Written: triangle, barycentrics and depth. Backward: read triangle and a gradient, write clip's.
        least_bytes=nbytes(clip, faces) + 20 * pixels + backward * (nbytes(clip, clip, faces) + 16 * pixels),
    )


def interpolate(case: Case, device: torch.device, count_bytes: bool) -> Problem:
    clip, faces, points, size = make_mesh(case, device)
    pixels, backward = size * size, case.mode == "forward_backward"
    upstream = normal(1, size, size, 3, device=device, seed=52)
    tensors = {"clip": clip, "faces": faces, **make_fragments(case, clip, faces, size), "points": points}
    return Problem(
        call=lambda op, tensors, dtype: (op(tensors["points"], tensors["faces"], select_fragments(tensors)),),
        tensors=tensors,
        leaves=("points", "barycentrics"),
        upstream=(upstream,),
        least_bytes=nbytes(points, faces, upstream)
        + 16 * pixels
        + backward * (nbytes(points, points, faces, upstream) + 28 * pixels),
    )


def antialias(case: Case, device: torch.device, count_bytes: bool) -> Problem:
    clip, faces, _, size = make_mesh(case, device)
    pixels, backward = size * size, case.mode == "forward_backward"
    upstream = normal(1, size, size, 3, device=device, seed=52)
    tensors = {"clip": clip, "faces": faces, **make_fragments(case, clip, faces, size)}
    tensors |= {"image": random(1, size, size, 3, device=device, seed=53), "opposite": kernels.opposite_corners(faces)}

    def call(op, tensors, dtype):
        mesh = (tensors["clip"], tensors["faces"], select_fragments(tensors), tensors["opposite"])
        return (op(tensors["image"], *mesh),)

    return Problem(
        call=call,
        tensors=tensors,
        leaves=("image", "clip"),
        upstream=(upstream,),
        # Read image, triangle and depth, write the image; backward: read and write its gradient, write clip's.
        least_bytes=2 * nbytes(upstream) + 8 * pixels + backward * (3 * nbytes(upstream) + 8 * pixels + nbytes(clip)),
    )


SPECS = (
    OpSpec(
        name="raster",
        public="rasterize",
        inputs=raster,
        full=MESHES,
        small=("mesh_1k_16",),
        quick=MESHES[:1],
        peers=MESHES[:1],
        gate=GATE,
        aot={
            "raster/float32": AotCase("mesh_50k_512", "float32"),
            "raster/deterministic": AotCase("mesh_50k_512", "float32", deterministic=True),
        },
    ),
    OpSpec(
        name="interpolate",
        inputs=interpolate,
        full=(MESHES[0], MESHES[-1]),
        small=("mesh_1k_16",),
        quick=MESHES[:1],
        peers=MESHES[:1],
        gate=GATE,
        aot={"raster/interpolate": AotCase("mesh_50k_512", "float32")},
    ),
    OpSpec(
        name="antialias",
        inputs=antialias,
        full=(MESHES[0], MESHES[-1]),
        small=("mesh_1k_16",),
        quick=MESHES[:1],
        peers=MESHES[:1],
        gate=GATE,
        aot={"raster/antialias": AotCase("mesh_50k_512", "float32")},
    ),
)
