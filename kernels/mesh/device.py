"""Parts that the operators over triangles share: fragments, checks, corners seen from pixels, sums over corners.

A corner (x, y, z, w) in clip space becomes (X, Y, z, w) with X = x W / 2, Y = -y H / 2. Seen from the centre of a pixel
it lies at (X - cx w, Y - cy w) times 1 / w, where (cx, cy) is that centre in pixels from the middle of the image, to
the right and down. The products are small near the pixel, so that nothing cancels, and no corner is divided by its w,
so that a corner behind the camera needs no clipping.
Source: Olano and Greer, Triangle scan conversion using 2D homogeneous coordinates, 1997.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dream_fast.kernels._core.checks import check_tensor
from dream_fast.kernels._core.launch import jit, tl

INDICES = (torch.int32, torch.int64)


class Fragments(NamedTuple):
    """The triangles that the pixels of B images see. Row 0 is the top row."""

    triangle: Tensor  # int32 [B, H, W] the nearest triangle, -1 where there is none
    barycentrics: Tensor  # [B, H, W, 3] weights of its corners in space (not on the screen); 0 where there is none
    depth: Tensor  # [B, H, W] z / w, from -1 (near) to 1 (far); 1 where there is none; no gradient


def check_mesh(clip: Tensor, faces: Tensor) -> None:
    """Check that `clip` is [B, V, 4] in fp32 or fp64 and `faces` [T, 3] whole numbers on its device.

    Raises TypeError or ValueError: if not.
    """
    check_tensor("clip", clip, ("B", "V", 4), dtypes=(torch.float32, torch.float64))
    check_tensor("faces", faces, ("T", 3), dtypes=INDICES, like=("clip", clip))


def check_fragments(fragments: Fragments, like: tuple[str, Tensor]) -> None:
    """Check that the parts of `fragments` fit each other and are on the device of `like`.

    Raises TypeError or ValueError: if not.
    """
    check_tensor("fragments.triangle", fragments.triangle, ("B", "H", "W"), dtypes=(torch.int32,), like=like)
    shape = tuple(fragments.triangle.shape)
    check_tensor("fragments.barycentrics", fragments.barycentrics, (*shape, 3), like=like)
    check_tensor("fragments.depth", fragments.depth, shape, like=like)


def image_arguments(height: int, width: int) -> dict[str, Any]:
    """Arguments of every kernel over pixels that give the size of an image."""
    return {"width": width, "height": height, "half_width": width / 2, "half_height": height / 2}


def new_corner_sums(
    rows: int, entries: int, channels: int, device: torch.device, deterministic: bool
) -> dict[str, Any]:
    """Buffers in which a backward pass adds up the gradients of vertices: `grad` [rows, channels], by atomics.

    If `deterministic` also lists of `entries` `values` and their `corners` (row, -1: none), for `add_at_corners`.
    """
    sums: dict[str, Any] = {
        "grad": torch.zeros(rows, channels, dtype=torch.float32, device=device),
        "values": None,
        "corners": None,
    }
    if deterministic:
        sums["values"] = torch.zeros(entries, channels, dtype=torch.float32, device=device)
        sums["corners"] = torch.full((entries,), -1, dtype=torch.int64, device=device)
    return sums


def add_at_corners(grad: Tensor, values: Tensor | None, corners: Tensor | None) -> Tensor:
    """Return the gradient [rows, channels] from the buffers of `new_corner_sums` that a kernel has filled."""
    if values is None or corners is None or not len(grad):
        return grad
    values = torch.where(corners[:, None] >= 0, values, 0)
    # Under torch's deterministic algorithms this sorts; index_add_ would not repeat everywhere.
    return grad.index_put_((corners.clamp(min=0),), values, accumulate=True)


@jit
def pixel_centre(number, width, height, half_width, half_height):
    """Image of pixels (numbers int64), and their centres from its middle: to the right and down."""
    row = number // width
    cx = (number % width).to(tl.float32) + (0.5 - half_width)
    cy = (row % height).to(tl.float32) + (0.5 - half_height)
    return row // height, cx, cy


@jit
def corner_rows(faces, triangle, first, mask):
    """Rows int64 of the corners of triangles; the vertices of their image start at row `first`."""
    a = tl.load(faces + triangle * 3, mask=mask, other=0).to(tl.int64)
    b = tl.load(faces + triangle * 3 + 1, mask=mask, other=0).to(tl.int64)
    c = tl.load(faces + triangle * 3 + 2, mask=mask, other=0).to(tl.int64)
    return first + a, first + b, first + c


@jit
def load_corner(clip, row, mask):
    """Load (x, y, z, w) of a vertex; 0 where masked."""
    x = tl.load(clip + row * 4, mask=mask, other=0.0)
    y = tl.load(clip + row * 4 + 1, mask=mask, other=0.0)
    z = tl.load(clip + row * 4 + 2, mask=mask, other=0.0)
    w = tl.load(clip + row * 4 + 3, mask=mask, other=0.0)
    return x, y, z, w


@jit
def product_difference(a, b, c, d):
    """a b - c d, rounded about once, however much of it cancels.

    Source: Jeannerod, Louvet and Muller, Further analysis of Kahan's algorithm for the accurate computation of 2 x 2
    determinants, 2013.
    """
    product = c * d
    return tl.fma(a, b, -product) + tl.fma(-c, d, product)


@jit
def from_pixel(corner, cx, cy, half_width, half_height):
    """A corner as seen from a pixel, (X - cx w, Y - cy w); the same in every kernel."""
    x, y, _, w = corner
    return product_difference(x, half_width, cx, w), product_difference(-y, half_height, cy, w)


@jit
def cross(a, b):
    """Twice the signed area of the pixel and two points as `from_pixel` gives them, times both w."""
    return product_difference(a[0], b[1], b[0], a[1])


@jit
def project_corners(clip, faces, triangle, is_covered, number, vertices, width, height, half_width, half_height):
    """Rows of the corners of triangles, the corners as seen from their pixels, and the centres of these."""
    image, cx, cy = pixel_centre(number, width, height, half_width, half_height)
    i, j, k = corner_rows(faces, triangle.to(tl.int64), image * vertices, is_covered)
    p = from_pixel(load_corner(clip, i, is_covered), cx, cy, half_width, half_height)
    q = from_pixel(load_corner(clip, j, is_covered), cx, cy, half_width, half_height)
    r = from_pixel(load_corner(clip, k, is_covered), cx, cy, half_width, half_height)
    return i, j, k, p, q, r, cx, cy


@jit
def find_runs(triangle, covering, number, all_pixels, image_pixels, BLOCK: tl.constexpr):
    """Mark pixels that are the first, and the last, of a run in their block that sees one triangle."""
    lane = tl.arange(0, BLOCK)
    before = tl.load(triangle + number - 1, mask=(lane > 0) & (number < all_pixels), other=-1)
    after = tl.load(triangle + number + 1, mask=number + 1 < all_pixels, other=-1)
    first = (lane == 0) | (before != covering) | (number % image_pixels == 0)
    last = (lane == BLOCK - 1) | (after != covering) | ((number + 1) % image_pixels == 0)
    return first, last


@jit
def _add_up(first_a, a, first_b, b):
    return first_a | first_b, tl.where(first_b != 0, b, a + b)


@jit
def run_sum(value, first):
    """Sum over each run, along axis 0, at its last pixel.

    A run adds once to a vertex instead of once a pixel: large triangles would make whole blocks wait, and lose digits.
    """
    return tl.associative_scan((first.to(tl.int32), value), 0, _add_up)[1]


@jit
def add_corner(grad, values, corners, row, number, x, y, w, mask, DETERMINISTIC: tl.constexpr):
    """Add a gradient (x, y, w) to a vertex; or store it, and its row, as entry `number` of `values` and `corners`."""
    if DETERMINISTIC:
        tl.store(values + number * 4, x, mask=mask)
        tl.store(values + number * 4 + 1, y, mask=mask)
        tl.store(values + number * 4 + 2, tl.zeros_like(x), mask=mask)
        tl.store(values + number * 4 + 3, w, mask=mask)
        tl.store(corners + number, row, mask=mask)
    else:
        tl.atomic_add(grad + row * 4, x, mask=mask, sem="relaxed")
        tl.atomic_add(grad + row * 4 + 1, y, mask=mask, sem="relaxed")
        tl.atomic_add(grad + row * 4 + 3, w, mask=mask, sem="relaxed")
