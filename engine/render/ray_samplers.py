"""Samplers of rays, with one interface, `RaySampler`:

OccupancySampler   marches through an occupancy grid and skips empty space; for the grid backbones
ImportanceSampler  even samples, then more of them where the density is; for the vanilla backbone
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dream_fast import kernels
from dream_fast.engine.config.sections import RenderConfig
from dream_fast.engine.geometry.voxels import largest_components
from dream_fast.engine.scene.field import Field

MIN_WEIGHT = 1e-5  # of an interval, so that the distribution of an empty ray is defined


class RaySampler(Protocol):
    """Chooses the samples of rays."""

    @property
    def bits(self) -> Tensor | None:
        """The occupancy grid [cascades, cells / 8] uint8; None: `samples_per_ray` samples on every ray."""

    samples_per_ray: int  # capacity of the sample buffers

    def update(self, generator: torch.Generator | None, *, active_levels: int | Tensor | None = None) -> None:
        """Bring the sampler up to date with the field."""

    def sample(
        self,
        origins: Tensor,
        directions: Tensor,
        generator: torch.Generator | None,
        *,
        active_levels: int | Tensor | None = None,
    ) -> kernels.Samples:
        """Packed samples of rays [R, 3], at random places with a generator."""

    def without_floaters(self) -> AbstractContextManager[None]:
        """Inside the `with` block rays pass through small parts apart from the object."""

    def adapt_capacity(self, rays: int) -> None:
        """Fit the sample buffers to the last steps of `rays` rays each."""

    def state_dict(self) -> dict[str, Tensor]:
        """The state that a checkpoint needs."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from `state_dict()`. Raises ValueError: when it does not fit."""


def make_sampler(field: Field, config: RenderConfig) -> RaySampler:
    """The sampler of the field's backbone."""
    if field.occupancy_grid:
        return OccupancySampler(field, config)
    return ImportanceSampler(field, config)


def march_options(config: RenderConfig) -> dict:
    """Arguments of the marching operators that place the samples of a ray."""
    return {
        "resolution": config.occupancy_resolution,
        "max_steps": config.max_steps,
        "dt_gamma": config.dt_gamma,
        "min_near": config.min_near,
    }


class OccupancySampler:
    """Marches through an occupancy grid. Grid and capacity of the sample buffers are part of a checkpoint.

    The grid starts full: before the first `update` rays are marched through the whole cube.
    """

    def __init__(self, field: Field, config: RenderConfig):
        self.field, self.config = field, config
        device = field.device
        cells = config.occupancy_resolution**3
        self.cascades = kernels.cascades(config.bound)
        self.density = torch.zeros(self.cascades, cells, device=device)
        self.bits = torch.full((self.cascades, cells // 8), 255, dtype=torch.uint8, device=device)
        self.samples_per_ray = min(config.max_steps, 256)
        # Since the capacity was last adapted, on the device: the samples of the fullest step, and an overflow.
        self.most_samples = torch.zeros((), dtype=torch.int64, device=device)
        self.overflowed = torch.zeros((), dtype=torch.bool, device=device)

    @torch.no_grad()
    def update(self, generator: torch.Generator | None, *, active_levels: int | Tensor | None = None) -> None:
        """Evaluate the density once in every cell: at a random point with a generator, else at the centre."""
        resolution = self.config.occupancy_resolution
        noise = None
        if generator is not None:
            noise = torch.rand(self.density.numel(), 3, generator=generator, device=generator.device)
            noise = noise.to(self.density.device)
        points = kernels.occupancy_points(
            resolution, self.cascades, self.config.bound, noise, device=self.density.device
        )
        density = self.field.density(points, active_levels=active_levels).view_as(self.density)
        bits, _ = kernels.occupancy_update(self.density, density, threshold=self.config.density_thresh)
        self.bits.copy_(bits)

    def sample(
        self,
        origins: Tensor,
        directions: Tensor,
        generator: torch.Generator | None,
        *,
        active_levels: int | Tensor | None = None,
    ) -> kernels.Samples:
        """Samples of rays [R, 3]; a generator moves the first one of each ray by a random part of a step."""
        count = origins.shape[0]
        perturb = None
        if generator is not None:
            perturb = torch.rand(count, generator=generator, device=generator.device).to(origins.device)
        march_arguments = {**march_options(self.config), "bound": self.config.bound, "perturb": perturb}
        samples = kernels.march(
            origins, directions, self.bits, capacity=count * self.samples_per_ray, **march_arguments
        )
        torch.maximum(self.most_samples, samples.count, out=self.most_samples)
        self.overflowed |= samples.overflow
        if origins.is_cuda:
            return samples
        # Reading the count is free on a CPU, so nothing is dropped there and the buffers have no padding.
        if samples.overflow:
            samples = kernels.march(
                origins, directions, self.bits, capacity=count * self.config.max_steps, **march_arguments
            )
        size = int(samples.count)
        return samples._replace(
            positions=samples.positions[:size],
            ray_ids=samples.ray_ids[:size],
            t=samples.t[:size],
            dt=samples.dt[:size],
        )

    @contextmanager
    def without_floaters(self) -> Iterator[None]:
        """Inside the `with` block small groups of occupied cells apart from the object are empty.

        Works with one cascade; with several nothing changes.
        """
        before = self.bits.clone()
        if self.cascades == 1:
            side = self.config.occupancy_resolution
            powers = 2 ** torch.arange(8, device=self.bits.device)
            cells = (self.bits[0][:, None] & powers).bool().view(side, side, side)
            self.bits.copy_((largest_components(cells).view(-1, 8) * powers).sum(1))
        try:
            yield
        finally:
            self.bits.copy_(before)

    def adapt_capacity(self, rays: int) -> None:
        """Fit the sample buffers to the fullest step of `rays` rays since the last call, with a margin of a half.

        Reads the device. A capacity that is neither nearly full nor twice too large stays, since CUDA graphs are
        captured again after each change.
        """
        used, overflowed = int(self.most_samples) / max(1, rays), bool(self.overflowed)
        target = int(1.5 * used) + 1
        if overflowed:
            target = max(target, 2 * self.samples_per_ray)
        if overflowed or used > 0.9 * self.samples_per_ray or target < self.samples_per_ray / 2:
            self.samples_per_ray = max(8, min(self.config.max_steps, target))
        self.most_samples.zero_()
        self.overflowed.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        """The occupancy grid, the capacity, and the use since it was last adapted."""
        return {
            "density": self.density,
            "bits": self.bits,
            "samples_per_ray": torch.tensor(self.samples_per_ray),
            "most_samples": self.most_samples,
            "overflowed": self.overflowed,
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from `state_dict()`. Raises ValueError: when shapes differ or the capacity is out of range."""
        for name, tensor in (("density", self.density), ("bits", self.bits)):
            if state[name].shape != tensor.shape:
                raise ValueError(
                    f"{name} has shape {tuple(state[name].shape)}, the renderer's is {tuple(tensor.shape)}"
                )
            tensor.copy_(state[name])
        samples = int(state["samples_per_ray"])
        if not 0 < samples <= max(8, self.config.max_steps):
            raise ValueError(f"samples_per_ray is {samples}, and --max_steps {self.config.max_steps}")
        self.samples_per_ray = samples
        for name, tensor in (("most_samples", self.most_samples), ("overflowed", self.overflowed)):
            tensor.copy_(state.get(name, torch.zeros(())))  # absent in checkpoints of earlier versions


class ImportanceSampler:
    """Divides the part of a ray inside the cube into `num_steps` even intervals, and these at `upsample_steps` further
    distances, drawn from the weights of the even ones; a sample lies in the middle of each interval.

    Every ray has the same number of samples, also one that misses the cube (their intervals have no length). Distances
    have no gradient, and there is no state. Source: Mildenhall et al., NeRF, 2020, section 5.2; one field is used for
    both passes, as in stable-dreamfusion. Both place the samples themselves in this way and not the ends of intervals;
    with samples in the middle the error falls with the square of their number.
    """

    def __init__(self, field: Field, config: RenderConfig):
        self.field, self.config = field, config
        self.samples_per_ray = config.num_steps + config.upsample_steps
        self.bits = None

    def update(self, generator: torch.Generator | None, *, active_levels: int | Tensor | None = None) -> None:
        """Do nothing: there is no state."""

    def sample(
        self,
        origins: Tensor,
        directions: Tensor,
        generator: torch.Generator | None,
        *,
        active_levels: int | Tensor | None = None,
    ) -> kernels.Samples:
        """Samples of rays [R, 3], `samples_per_ray` of each; a generator moves them at random in their strata."""
        rays, per_ray = origins.shape[0], self.samples_per_ray
        with torch.no_grad():
            near, far = kernels.near_far(origins, directions, self.config.bound, self.config.min_near)
            edges = stratified_edges(near, torch.maximum(near, far), self.config.num_steps, generator)
            if self.config.upsample_steps:
                positions = points_on_rays(origins, directions, midpoints(edges))
                sigma = self.field.density(positions, active_levels=active_levels).view(rays, -1)
                weights = ray_weights(sigma, edges.diff(dim=1))
                more = sample_pdf(edges, weights, self.config.upsample_steps, generator)
                edges = torch.cat([edges, more], dim=1).sort(dim=1).values
            t = midpoints(edges)
        offsets = torch.arange(rays + 1, device=origins.device) * per_ray
        return kernels.Samples(
            positions=points_on_rays(origins, directions, t),
            ray_ids=torch.arange(rays, device=origins.device).repeat_interleave(per_ray, output_size=rays * per_ray),
            t=t.view(-1),
            dt=edges.diff(dim=1).view(-1),
            offsets=offsets,
            count=offsets[-1],
            overflow=torch.zeros((), dtype=torch.bool, device=origins.device),
        )

    @contextmanager
    def without_floaters(self) -> Iterator[None]:
        """Change nothing: without an occupancy grid floaters cannot be found."""
        yield

    def adapt_capacity(self, rays: int) -> None:
        """Do nothing: the buffers always fit."""

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if state:
            raise ValueError(f"the renderer keeps no state, but there is {', '.join(sorted(state))}")


def points_on_rays(origins: Tensor, directions: Tensor, t: Tensor) -> Tensor:
    """Points [R K, 3] at distances t [R, K] along rays [R, 3]."""
    return (origins[:, None] + t[..., None] * directions[:, None]).view(-1, 3)


def _stratified_samples(rays: int, parts: int, generator: torch.Generator | None, like: Tensor) -> Tensor:
    """Numbers [rays, parts], each in one of `parts` equal parts of [0, 1): random with a generator, else the middle."""
    offset: float | Tensor = 0.5
    if generator is not None:
        offset = torch.rand(rays, parts, generator=generator, device=generator.device).to(like)
    return ((torch.arange(parts, device=like.device) + offset) / parts).to(like.dtype).expand(rays, parts)


def midpoints(edges: Tensor) -> Tensor:
    """Midpoints [R, K] of the intervals between edges [R, K + 1]."""
    return (edges[:, 1:] + edges[:, :-1]) / 2


def stratified_edges(near: Tensor, far: Tensor, intervals: int, generator: torch.Generator | None) -> Tensor:
    """Edges [R, K + 1] of K even intervals from near to far ([R] each).

    A generator moves each inner edge by up to half an interval.
    """
    fractions = (
        torch.arange(intervals + 1, device=near.device).to(near.dtype).expand(near.shape[0], intervals + 1) / intervals
    )
    if generator is not None:
        inner = _stratified_samples(near.shape[0], intervals, generator, near)[:, 1:] - 0.5 / intervals
        fractions = torch.cat([fractions[:, :1], inner, fractions[:, -1:]], dim=1)
    return near[:, None] + (far - near)[:, None] * fractions


def ray_weights(sigma: Tensor, dt: Tensor | float) -> Tensor:
    """Weights [R, K] of samples: w = exp(-optical depth before) (1 - exp(-sigma dt)). Source: NeRF, equation 3."""
    tau = sigma * dt
    before = F.pad(tau[:, :-1].cumsum(dim=1), (1, 0))  # the sum minus tau would lose all digits in a wall
    return torch.exp(-before) * -torch.expm1(-tau)


def sample_pdf(edges: Tensor, weights: Tensor, samples: int, generator: torch.Generator | None) -> Tensor:
    """Distances [R, samples], ascending, distributed like the weights [R, K] of the intervals of edges [R, K + 1].

    They are values of the piecewise linear inverse cumulative distribution, at one number in each equal part of [0, 1).
    """
    weights = weights + MIN_WEIGHT
    cumulative = F.pad((weights / weights.sum(dim=1, keepdim=True)).cumsum(dim=1), (1, 0))  # [R, K + 1]
    u = _stratified_samples(edges.shape[0], samples, generator, edges).contiguous()
    # By rounding the last cumulative weight may be below a number close to 1.
    interval = (torch.searchsorted(cumulative, u, right=True) - 1).clamp(0, weights.shape[1] - 1)
    below, above = cumulative.gather(1, interval), cumulative.gather(1, interval + 1)
    start, end = edges.gather(1, interval), edges.gather(1, interval + 1)
    return start + (end - start) * ((u - below) / (above - below)).clamp(0, 1)
