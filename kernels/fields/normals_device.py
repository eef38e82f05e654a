"""Device functions that both kinds of kernels of the field with normals share."""

from __future__ import annotations

from dream_fast.kernels._core.launch import constant, jit, tl
from dream_fast.kernels.grid.gradients import live_rows

_FLOOR = constant(1e-20)  # of the squared gradient


@jit
def limit_rows(count, n):
    """Rows that hold points, as int64."""
    return tl.maximum(tl.zeros((), tl.int64) + live_rows(count, n), 0)


@jit
def load_vector(pointer, row, live):
    """Three numbers of each row."""
    return (
        tl.load(pointer + row * 3, mask=live, other=0.0),
        tl.load(pointer + row * 3 + 1, mask=live, other=0.0),
        tl.load(pointer + row * 3 + 2, mask=live, other=0.0),
    )


@jit
def normal_of(gx, gy, gz):
    """The unit normal; 0 where the gradient is below the floor."""
    inverse = _inverse_length(gx, gy, gz)
    return -gx * inverse, -gy * inverse, -gz * inverse


@jit
def _inverse_length(gx, gy, gz):
    """1 / |g|, and 0 below the floor: what is flat has no normal, and gets no gradient through one."""
    squared = gx * gx + gy * gy + gz * gz
    return tl.where(squared < _FLOOR, 0.0, tl.rsqrt(tl.maximum(squared, _FLOOR)))  # what is not a number stays that


@jit
def normal_backward(gx, gy, gz, tx, ty, tz):
    """Gradient of sigma and gradient into the normal -> gradient into the former, 0 below the floor."""
    inverse = _inverse_length(gx, gy, gz)
    nx, ny, nz = -gx * inverse, -gy * inverse, -gz * inverse
    along = nx * tx + ny * ty + nz * tz
    return inverse * (along * nx - tx), inverse * (along * ny - ty), inverse * (along * nz - tz)
