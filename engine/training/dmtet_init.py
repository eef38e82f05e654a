"""The shape of a mesh refinement: a signed distance and a shift at each vertex of a grid of tetrahedra.

    position = middle + reach * (vertex + tanh(shift) / N),    surface: distance = 0, positive inside

N is --tet_grid_size, so that a vertex moves by up to half a layer. Distances are clamped to [-1, 1] at the start, and
about ten times those of the scene. Source: Shen et al., Deep Marching Tetrahedra, 2021.

A run starts from what --init_with names: a checkpoint, or a folder of a run, of a field; or a mesh file; else a sphere.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch

from dream_fast.engine.config.schema import Config, settings, settings_unused_by
from dream_fast.engine.config.sections import CameraConfig, FieldConfig
from dream_fast.engine.errors import UserError
from dream_fast.engine.export.isosurface import choose_isovalue, sample_density
from dream_fast.engine.geometry.mesh import TensorMesh
from dream_fast.engine.geometry.read_mesh import SUFFIXES, load_mesh
from dream_fast.engine.geometry.signed_distance import signed_distance
from dream_fast.engine.geometry.voxels import largest_components
from dream_fast.engine.runtime.paths import expand_user
from dream_fast.engine.scene.field import Field
from dream_fast.engine.scene.tet_mesh import SDF_SLOPE, TetMesh
from dream_fast.engine.workspace.checkpoint import list_checkpoints, read_architecture
from dream_fast.engine.workspace.folder import Workspace

MARGIN = 0.1  # between the object and the border of the grid, of the bound
FILLS = 0.8  # part of the picture's height, or of the cube, that a mesh file is scaled to
VOLUME = 64  # points along an edge at which a field is looked at to find the object


# ---------------------------------------------------------------------------------------------------------------- start


class InitSource(NamedTuple):
    """What --init_with names, found on disk."""

    path: Path
    checkpoint: bool  # else a mesh file


def find_init_source(name: str) -> InitSource:
    """The checkpoint (of a folder the latest) or mesh file that `name` is. UserError: it is neither."""
    path = expand_user(name)
    if path.is_dir():
        inside = list_checkpoints(path / "checkpoints") or list_checkpoints(path)
        if not inside:
            raise UserError(f"--init_with {name}: the folder holds no checkpoint of a run")
        return InitSource(inside[-1], True)
    if path.suffix.lower() in (".pth", ".pt", ".ckpt"):
        raise UserError(
            f"--init_with {name}: checkpoints of other programs cannot be read; give a run's or a mesh file"
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
    """Return the settings of the field that a mesh refinement from `init_with` takes over, by name.

    A refinement that is under way in the workspace `folder` keeps its own, unless it starts afresh. Raises UserError:
    `init_with` cannot be used.
    """
    stored = None if fresh else Workspace(expand_user(folder)).stored_config()
    if stored is None or stored.dmtet.init_with != init_with:
        return field_settings(find_init_source(init_with))
    sections = stored.to_dict()
    unread = settings_unused_by(stored.field.backbone)
    return {name: value for name, value in (sections["field"] | sections["render"]).items() if name not in unread}


def field_settings(start: InitSource) -> dict[str, Any]:
    """The settings that a run needs to take over the field of a checkpoint, by flag name; of a mesh file none."""
    if not start.checkpoint:
        return {}
    architecture = read_architecture(start.path)
    if "tet_grid_size" in architecture:
        raise UserError(f"--init_with {start.path} is of a mesh refinement already: go on with its --workspace instead")
    names = {field.name for room, field in settings() if room.type is FieldConfig} | {"bound", "occupancy_resolution"}
    return {name: value for name, value in architecture.items() if name in names}


@torch.no_grad()
def start_from_field(shape: TetMesh, field: Field, threshold: float) -> None:
    """Lay the grid over what `field` has denser than the threshold, and take the distance from its density.

    One is found where the given one leaves nothing or all (`choose_isovalue`). Density rises exponentially, so its
    logarithm, scaled to the slope of a distance at the surface, is what straight lines between vertices fit.
    UserError: the density is the same everywhere.
    """
    volume = sample_density(field, VOLUME)
    level = choose_isovalue(volume, threshold)
    kept = largest_components(volume > level)
    bound, spacing = field.bound, 2 * field.bound / (VOLUME - 1)
    occupied = kept.nonzero()
    low, high = (occupied.amin(0) - 1) * spacing - bound, (occupied.amax(0) + 1) * spacing - bound
    low, high = (low - MARGIN * bound).clamp(min=-bound), (high + MARGIN * bound).clamp(max=bound)
    shape.initialize((low + high) / 2, (high - low) / 2, torch.zeros_like(shape.sdf))
    positions = shape.positions()
    value = (field.density(positions).clamp(min=1e-6 * level) / level).log()
    near = ((positions.cpu() + bound) / spacing).round().long().clamp(0, VOLUME - 1)
    around = torch.nn.functional.max_pool3d(kept[None].float(), 5, stride=1, padding=2)[0] > 0
    value = torch.where(around[near.unbind(1)].to(value.device), value, value.clamp(max=-1.0))  # specks stay behind
    ends = shape.tets[:, :2]  # edges of each tetrahedron that cross the surface say how steep it is
    at, to = value[ends[:, 0]], value[ends[:, 1]]
    crossing = (at > 0) != (to > 0)
    length = (positions[ends[crossing, 1]] - positions[ends[crossing, 0]]).norm(dim=1)
    steep = ((at - to)[crossing].abs() / length).median() if crossing.any() else torch.tensor(SDF_SLOPE)
    shape.initialize(shape.center.clone(), shape.half_extent.clone(), value * (SDF_SLOPE / steep.clamp(min=1e-3)))


def read_surface(path: Path) -> TensorMesh:
    """The triangles of a mesh file, on the host. UserError: what `load_mesh` refuses."""
    return load_mesh(path).to_tensors()


def normalized(mesh: TensorMesh, bound: float, camera: CameraConfig) -> TensorMesh:
    """The mesh moved to the middle, its largest side 0.8 of what the output camera, or the scene's cube, takes in."""
    corners = mesh.vertices[mesh.faces].view(-1, 3)
    low, high = corners.amin(0), corners.amax(0)
    seen = camera.default_radius * float(torch.tensor(camera.default_fovy / 2).deg2rad().tan())
    half = float((high - low).amax()) / 2
    if not half > 0:
        raise UserError("the mesh of --init_with has no extent: all of its triangles are one point")
    return mesh._replace(vertices=(mesh.vertices - (low + high) / 2) * (FILLS * min(bound, seen) / half))


@torch.no_grad()
def start_from_mesh(shape: TetMesh, mesh: TensorMesh) -> None:
    """Lay the grid over a mesh and take the distance to it. UserError: it encloses nothing."""
    device, bound = shape.sdf.device, shape.bound
    mesh = TensorMesh(*(part.to(device) for part in mesh))
    corners = mesh.vertices[mesh.faces].view(-1, 3)
    half = (corners.abs().amax(0) + MARGIN * bound).clamp(max=bound)
    n = shape.size // 2
    step, distances = 2 * half / n, []
    # A few layers of tetrahedra are as far as the distance has to be right; farther off only its sign counts.
    reach = min(1 / SDF_SLOPE, 3 * float(step.amax()))
    for count, first in ((n + 1, -half), (n, -half + step / 2)):
        found = signed_distance(mesh, first, step, (count,) * 3, reach).view(-1)
        distances.append(torch.where(found.abs() >= reach, found.sign(), SDF_SLOPE * found))
    distance = torch.cat(distances)
    if not (distance > 0).any():
        raise UserError(
            "the mesh of --init_with encloses no space that --tet_grid_size resolves: it is open, or too thin"
        )
    shape.initialize(torch.zeros(3, device=device), half, distance)


def load_start(config: Config, shape: TetMesh) -> InitSource | None:
    """Give the shape its start where that is a mesh file or the sphere; a checkpoint is returned, for its field."""
    if config.dmtet.init_with is None:
        return None
    start = find_init_source(config.dmtet.init_with)
    field_settings(start)  # complains about a checkpoint of another kind
    if not start.checkpoint:
        start_from_mesh(shape, normalized(read_surface(start.path), shape.bound, config.camera))
    return start
