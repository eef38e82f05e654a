"""A mesh in a grid of tetrahedra: signed distance and deformation at its vertices."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dream_fast.engine.geometry.tet_grid import TriMesh, marching_tetrahedra, tet_grid

SLOPE = 10.0  # of the distance at the start, per world unit
SPHERE = 0.5  # radius of the sphere that a run starts from, of the bound
OUTSIDE = -1e-2  # distance of the border's vertices at most


class TetMesh(nn.Module):
    """Distance [V] and shift [V, 3], parameters unless `locked`; where the grid lies is part of the state."""

    def __init__(self, size: int, bound: float, *, locked: bool = False):
        super().__init__()
        grid = tet_grid(size)
        self.size, self.bound, self.locked = size, bound, locked
        self.register_buffer("vertices", grid.vertices)
        self.register_buffer("tets", grid.tets)
        self.register_buffer("border", grid.border)
        self.register_buffer("middle", torch.zeros(3))
        self.register_buffer("reach", torch.full((3,), float(bound)))
        self.distance = nn.Parameter((SPHERE * bound - bound * grid.vertices.norm(dim=1)).mul(SLOPE).clamp(-1, 1))
        self.shift = nn.Parameter(torch.zeros_like(grid.vertices))
        self.requires_grad_(not locked)

    def positions(self) -> Tensor:
        """Places [V, 3] of the grid's vertices in the scene."""
        return self.middle + self.reach * (self.vertices + self.shift.tanh() / self.size)

    def surface(self) -> TriMesh:
        """The surface as it is now, differentiable; closed. Waits for the device."""
        distance = torch.where(self.border, self.distance.clamp(max=OUTSIDE), self.distance)
        return marching_tetrahedra(self.positions(), distance, self.tets)

    @torch.no_grad()
    def start_from(self, middle: Tensor, reach: Tensor, distance: Tensor) -> None:
        """Lay the grid over middle +- reach, [3] each, with distances [V]; shifts are 0."""
        self.middle.copy_(middle)
        self.reach.copy_(reach)
        self.distance.copy_(distance.clamp(-1, 1))
        self.shift.zero_()

    def kept_state(self) -> dict[str, Tensor]:
        """What a checkpoint needs beside the parameters that are optimised."""
        learned = {"distance": self.distance, "shift": self.shift} if self.locked else {}
        return {"middle": self.middle, "reach": self.reach, **learned}

    @torch.no_grad()
    def load_kept_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `kept_state()`; raises ValueError when names or shapes differ."""
        own = self.kept_state()
        if state.keys() != own.keys():
            raise ValueError(f"the grid's state holds {sorted(state)}, expected {sorted(own)}")
        for name, tensor in own.items():
            if state[name].shape != tensor.shape:
                raise ValueError(f"{name} has shape {tuple(state[name].shape)}, expected {tuple(tensor.shape)}")
            tensor.copy_(state[name])
