"""A mesh in a grid of tetrahedra: a signed distance and a deformation at each vertex.

    position = center + half_extent * (vertex + tanh(deformation) / N)      surface: sdf = 0, positive inside

N is `size`, the number of layers of the grid, so that a vertex moves by up to half a layer. Source: Shen et al., Deep
Marching Tetrahedra, 2021.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dream_fast.engine.geometry.mesh import TensorMesh
from dream_fast.engine.geometry.tet_grid import marching_tetrahedra, tet_grid

SDF_SLOPE = 10.0  # of the initial signed distance, per world unit
SPHERE_RADIUS = 0.5  # of the sphere that a run starts from, of the bound
MAX_BORDER_SDF = -1e-2  # at the border of the grid, so that the surface is closed
OLD_NAMES = {"middle": "center", "reach": "half_extent", "distance": "sdf", "shift": "deformation"}  # of version 0.2.0


class TetMesh(nn.Module):
    """The signed distance `sdf` [V] and the `deformation` [V, 3] of a grid of V vertices, which covers center +-
    half_extent ([3] each, world units).

    `sdf` and `deformation` are parameters that are optimised unless `locked`; the grid's place is state.
    """

    vertices: Tensor
    tets: Tensor
    border: Tensor
    center: Tensor
    half_extent: Tensor

    def __init__(self, size: int, bound: float, *, locked: bool = False):
        super().__init__()
        grid = tet_grid(size)
        self.size, self.bound, self.locked = size, bound, locked
        self.register_buffer("vertices", grid.vertices)
        self.register_buffer("tets", grid.tets)
        self.register_buffer("border", grid.border)
        self.register_buffer("center", torch.zeros(3))
        self.register_buffer("half_extent", torch.full((3,), float(bound)))
        sphere = SPHERE_RADIUS * bound - bound * grid.vertices.norm(dim=1)
        self.sdf = nn.Parameter(sphere.mul(SDF_SLOPE).clamp(-1, 1))
        self.deformation = nn.Parameter(torch.zeros_like(grid.vertices))
        self.requires_grad_(not locked)

    def positions(self) -> Tensor:
        """World positions [V, 3] of the grid's vertices."""
        return self.center + self.half_extent * (self.vertices + self.deformation.tanh() / self.size)

    def surface(self) -> TensorMesh:
        """The present surface, closed and differentiable. Waits for the device."""
        sdf = torch.where(self.border, self.sdf.clamp(max=MAX_BORDER_SDF), self.sdf)
        return marching_tetrahedra(self.positions(), sdf, self.tets)

    @torch.no_grad()
    def initialize(self, center: Tensor, half_extent: Tensor, sdf: Tensor) -> None:
        """Lay the grid over center +- half_extent, [3] each, with signed distances [V] and without deformation."""
        self.center.copy_(center)
        self.half_extent.copy_(half_extent)
        self.sdf.copy_(sdf.clamp(-1, 1))
        self.deformation.zero_()

    def checkpoint_state(self) -> dict[str, Tensor]:
        """State of a checkpoint other than the optimised parameters."""
        fixed = {"sdf": self.sdf, "deformation": self.deformation} if self.locked else {}
        return {"center": self.center, "half_extent": self.half_extent, **fixed}

    @torch.no_grad()
    def load_checkpoint_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `checkpoint_state()`, also that of earlier versions.

        Raises ValueError: when names or shapes differ.
        """
        state = {OLD_NAMES.get(name, name): tensor for name, tensor in state.items()}
        present = self.checkpoint_state()
        if state.keys() != present.keys():
            raise ValueError(f"the grid's state holds {sorted(state)}, expected {sorted(present)}")
        for name, tensor in present.items():
            if state[name].shape != tensor.shape:
                raise ValueError(f"{name} has shape {tuple(state[name].shape)}, expected {tuple(tensor.shape)}")
            tensor.copy_(state[name])
