"""Initialise the shape of a mesh refinement (`TetMesh`) from --init_with.

That names a checkpoint of a field, the folder of its run, or a mesh file; without it the shape is a sphere. The grid is
placed around the object, and its signed distances are taken from the density of the field or from the mesh. They are
clamped to [-1, 1], with the slope SDF_SLOPE at the surface.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dream_fast.engine.config.schema import Config, settings, settings_unused_by
from dream_fast.engine.config.sections import CameraConfig, FieldConfig
from dream_fast.engine.errors import UserError
from dream_fast.engine.export.isosurface import choose_isovalue, sample_density
from dream_fast.engine.geometry.mesh import TensorMesh
from dream_fast.engine.geometry.read_mesh import SUFFIXES, load_mesh
from dream_fast.engine.geometry.signed_distance import count_pairs, signed_distance
from dream_fast.engine.geometry.voxels import largest_components
from dream_fast.engine.runtime.paths import expand_user
from dream_fast.engine.scene.field import Field
from dream_fast.engine.scene.tet_mesh import SDF_SLOPE, TetMesh
from dream_fast.engine.workspace.checkpoint import list_checkpoints, newest_readable, read_architecture
from dream_fast.engine.workspace.folder import Workspace

MARGIN = 0.1  # between the object and the border of the grid, as a share of the bound
MESH_SCALE = 0.8  # size of a mesh file, as a share of the image's height or of the scene's cube
MAX_PAIRS = 300_000_000  # of a triangle and a point; a core of a CPU takes about 2 million a second
VOLUME_SIDE = 64  # points along an edge of the volume in which the object of a field is found


class InitSource(NamedTuple):
    """File that --init_with names."""

    path: Path
    checkpoint: bool  # else a mesh file


def find_init_source(name: str) -> InitSource:
    """Find the checkpoint (the latest of a folder) or mesh file `name`. Raises UserError: when it is neither."""
    path = expand_user(name)
    if path.is_dir():
        checkpoints = list_checkpoints(path / "checkpoints") or list_checkpoints(path)
        if not checkpoints:
            raise UserError(f"--init_with {name}: the folder holds no checkpoint of a run")
        return InitSource(newest_readable(checkpoints), True)
    if path.suffix.lower() in (".pth", ".pt", ".ckpt"):
        raise UserError(
            f"--init_with {name}: checkpoints of other programs cannot be read; name a run of dream-fast or a mesh file"
        )
    if not path.is_file():
        raise UserError(f"--init_with {name}: there is no such file")
    if path.suffix.lower() not in (".safetensors", *SUFFIXES):
        raise UserError(
            f"--init_with {name} is neither a checkpoint (.safetensors, or the folder of a run) nor a mesh file "
            f"({', '.join(SUFFIXES)})"
        )
    return InitSource(path, path.suffix.lower() == ".safetensors")


def inherited_settings(init_with: str, folder: str, *, fresh: bool) -> dict[str, Any]:
    """Return the settings of the field that a mesh refinement inherits from `init_with`, by name.

    A stored refinement in the workspace `folder` keeps its own, unless `fresh`. Raises UserError: when `init_with`
    cannot be used.
    """
    stored = None if fresh else Workspace(expand_user(folder)).stored_config()
    if stored is None or stored.dmtet.init_with != init_with:
        return field_settings(find_init_source(init_with))
    sections = stored.to_dict()
    unread = settings_unused_by(stored.field.backbone)
    return {name: value for name, value in (sections["field"] | sections["render"]).items() if name not in unread}


def field_settings(start: InitSource) -> dict[str, Any]:
    """Return settings, by name, with which a run can load the field of a checkpoint; none for a mesh file.

    Raises UserError: when the checkpoint is that of a mesh refinement.
    """
    if not start.checkpoint:
        return {}
    architecture = read_architecture(start.path)
    if "tet_grid_size" in architecture:
        raise UserError(f"--init_with {start.path} is already a mesh refinement: continue it with its --workspace")
    names = {field.name for section, field in settings() if section.type is FieldConfig} | {
        "bound",
        "occupancy_resolution",
    }
    return {name: value for name, value in architecture.items() if name in names}


@torch.no_grad()
def start_from_field(shape: TetMesh, field: Field, threshold: float) -> None:
    """Place the grid around the densest object of `field`, and take the distances from its density.

    The isovalue is `threshold`, or another where that leaves nothing or everything (`choose_isovalue`). Density rises
    exponentially, so its logarithm is interpolated well by straight lines between vertices; it is scaled to the slope
    SDF_SLOPE at the surface.

    Raises UserError: when the density is the same everywhere.
    """
    volume = sample_density(field, VOLUME_SIDE)
    isovalue = choose_isovalue(volume, threshold)
    objects = largest_components(volume > isovalue)
    bound, spacing = field.bound, 2 * field.bound / (VOLUME_SIDE - 1)
    occupied = objects.nonzero()
    low, high = (occupied.amin(0) - 1) * spacing - bound, (occupied.amax(0) + 1) * spacing - bound
    low, high = (low - MARGIN * bound).clamp(min=-bound), (high + MARGIN * bound).clamp(max=bound)
    shape.initialize((low + high) / 2, (high - low) / 2, torch.zeros_like(shape.sdf))
    positions = shape.positions()
    sdf = (field.density(positions).clamp(min=1e-6 * isovalue) / isovalue).log()
    cell = ((positions.cpu() + bound) / spacing).round().long().clamp(0, VOLUME_SIDE - 1)
    around = torch.nn.functional.max_pool3d(objects[None].float(), 5, stride=1, padding=2)[0] > 0
    sdf = torch.where(around[cell.unbind(1)].to(sdf.device), sdf, sdf.clamp(max=-1.0))  # floaters are left outside
    edges = shape.tets[:, :2]  # one of each tetrahedron; those that cross the surface have its slope
    first, second = sdf[edges[:, 0]], sdf[edges[:, 1]]
    crossing = (first > 0) != (second > 0)
    length = (positions[edges[crossing, 1]] - positions[edges[crossing, 0]]).norm(dim=1)
    slope = ((first - second)[crossing].abs() / length).median() if crossing.any() else torch.tensor(SDF_SLOPE)
    shape.initialize(shape.center.clone(), shape.half_extent.clone(), sdf * (SDF_SLOPE / slope.clamp(min=1e-3)))


def read_surface(path: Path) -> TensorMesh:
    """Read the triangles of a mesh file, on the host. Raises as `load_mesh`."""
    return load_mesh(path).to_tensors()


def normalized(mesh: TensorMesh, bound: float, camera: CameraConfig) -> TensorMesh:
    """Move a mesh to the origin and scale its largest side to MESH_SCALE of the output camera's view, or of the cube.

    Raises UserError: when the mesh is one point.
    """
    corners = mesh.vertices[mesh.faces].view(-1, 3)
    low, high = corners.amin(0), corners.amax(0)
    visible = camera.default_radius * float(torch.tensor(camera.default_fovy / 2).deg2rad().tan())
    half = float((high - low).amax()) / 2
    if not half > 0:
        raise UserError("the mesh of --init_with has no extent: all of its triangles are one point")
    return mesh._replace(vertices=(mesh.vertices - (low + high) / 2) * (MESH_SCALE * min(bound, visible) / half))


@torch.no_grad()
def start_from_mesh(shape: TetMesh, mesh: TensorMesh, progress: Callable[[float], None] = lambda part: None) -> None:
    """Place the grid around a mesh and take the distances to it. `progress` is called with the finished part.

    Raises UserError: when it encloses nothing, or its triangles are next to too many points of the grid.
    """
    device, bound = shape.sdf.device, shape.bound
    mesh = TensorMesh(*(tensor.to(device) for tensor in mesh))
    corners = mesh.vertices[mesh.faces].view(-1, 3)
    half = (corners.abs().amax(0) + MARGIN * bound).clamp(max=bound)
    n = shape.size // 2
    step, distances = 2 * half / n, []
    # The distance has to be good within a few layers of tetrahedra; farther away only its sign counts.
    reach = min(1 / SDF_SLOPE, 3 * float(step.amax()))
    lattices = ((n + 1, -half), (n, -half + step / 2))
    total = sum(count_pairs(mesh, first, step, (count,) * 3) for count, first in lattices)
    if total > MAX_PAIRS:
        raise UserError(
            f"the triangles of --init_with are next to {total:.1e} points of the grid, of at most {MAX_PAIRS:.0e}: "
            "they are too many and too large for the surface of an object; simplify the mesh, or reduce --tet_grid_size"
        )
    done = 0

    def advance(pairs: int) -> None:
        nonlocal done
        done += pairs
        progress(min(1.0, done / max(1, total)))  # an estimate at the edges of triangles

    for count, first in lattices:
        distance = signed_distance(mesh, first, step, (count,) * 3, reach, progress=advance).view(-1)
        distances.append(torch.where(distance.abs() >= reach, distance.sign(), SDF_SLOPE * distance))
    progress(1.0)
    sdf = torch.cat(distances)
    if not (sdf > 0).any():
        raise UserError(
            "the mesh of --init_with encloses no space that --tet_grid_size resolves: it is open, or too thin"
        )
    shape.initialize(torch.zeros(3, device=device), half, sdf)


def load_start(
    config: Config, shape: TetMesh, progress: Callable[[float], None] = lambda part: None
) -> InitSource | None:
    """Initialise the shape from a mesh file. Return the source of --init_with, or None for a sphere.

    `progress` as in `start_from_mesh`.
    """
    if config.dmtet.init_with is None:
        return None
    start = find_init_source(config.dmtet.init_with)
    field_settings(start)  # raises UserError: when the checkpoint is of another kind
    if not start.checkpoint:
        start_from_mesh(shape, normalized(read_surface(start.path), shape.bound, config.camera), progress)
    return start
