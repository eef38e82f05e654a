"""Device functions of normals that both modes share. As in `fields.density_gradient`, on tiles [BLOCK] in fp32."""

from __future__ import annotations

from dream_fast.kernels._core.launch import constant, jit, tl
from dream_fast.kernels.grid.device import load_count

# The smallest square of a gradient of sigma that still has a direction.
FLOOR = 1e-20
_FLOOR = constant(FLOOR)


@jit
def live_points(count, n):
    """Number of leading rows that hold points, in 64 bits."""
    return tl.maximum(tl.zeros((), tl.int64) + load_count(count, n), 0)


@jit
def normal_of(gx, gy, gz):
    """Gradient of sigma -> unit normal; 0 where the gradient is below the floor."""
    inverse = _inverse_length(gx, gy, gz)
    return -gx * inverse, -gy * inverse, -gz * inverse


@jit
def _inverse_length(gx, gy, gz):
    """1 / |g|, and 0 below the floor: a flat density has no normal, and gets no gradient through one."""
    squared = gx * gx + gy * gy + gz * gz
    return tl.where(squared < _FLOOR, 0.0, tl.rsqrt(tl.maximum(squared, _FLOOR)))  # a NaN stays a NaN


@jit
def normal_bwd(gx, gy, gz, grad_nx, grad_ny, grad_nz):
    """Gradient g of sigma, gradient of the normal -> gradient of g, 0 below the floor."""
    inverse = _inverse_length(gx, gy, gz)
    nx, ny, nz = -gx * inverse, -gy * inverse, -gz * inverse
    along = nx * grad_nx + ny * grad_ny + nz * grad_nz
    return inverse * (along * nx - grad_nx), inverse * (along * ny - grad_ny), inverse * (along * nz - grad_nz)
