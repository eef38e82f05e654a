"""Sphere tracing of unions of signed-distance primitives: where rays meet a scene, its normal, and which primitive.

A scene is one or two items; an item is the smooth union of its MAIN primitives (distance -k log sum exp(-d/k) with the
item's blend k), less its CUT ones, and the union of its OTHER ones. A ray steps by STEP times the distance until that
is below HIT or the ray leaves the sphere around the scene (Hart 1996). A normal is the normalised gradient of the
distance, by differences on a tetrahedron; the primitive is the nearest that is not cut away.

Legend: B scenes, R rays of each, P primitives of all. Units: world units. Numerics: fp32, no gradients.
A row of `table` [P, 20]: centre (3), rotation (9, rows are the local axes), size (6), kind, role (1 MAIN, 2 OTHER,
3 CUT). `starts` [B, 3]: the first row of each of the scene's two items, and one past its last. Kinds, in local
coordinates (x, y, z): 0 ball (rx, ry, rz); 1 box (hx, hy, hz, edge, top_x, top_z), tapered; 2 cone (r0, r1, h, edge),
a frustum of half height h; 3 ring (R, r) around y; 4 limb (r0, r1, h), a rounded cone from 0 to (0, h, 0); 5 arc
(R, r, sin a, cos a), a ring around z within the angle a of +y.
Source: formulas by Quilez, Distance functions; the ball's and the tapered box's distances are bounds.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dream_fast.kernels._core.checks import check_tensor
from dream_fast.kernels._core.launch import constant, jit, launch, tl, use_triton

ROW = 20
FAR, HIT, STEP, STEPS, NEAR = 10.0, 5e-4, 0.9, 96, 5e-4
_FAR, _HIT, _STEP, _NEAR = constant(FAR), constant(HIT), constant(STEP), constant(NEAR)
_MAIN, _OTHER, _CUT = constant(1), constant(2), constant(3)
_TETRAHEDRON = ((1, -1, -1), (-1, -1, 1), (-1, 1, -1), (1, 1, 1))


class Hits(NamedTuple):
    """Points at which rays meet their scenes."""

    depth: Tensor  # [B, R] along the ray in lengths of its direction, inf where nothing is met
    normal: Tensor  # [B, R, 3] unit, 0 where nothing is met
    primitive: Tensor  # [B, R] int32 row of the table, -1 where nothing is met


def trace_reference(
    origins: Tensor, directions: Tensor, table: Tensor, starts: Tensor, blend: Tensor, radius: Tensor
) -> Hits:
    """The definition of `trace` in plain PyTorch, scene by scene."""
    batch, rays = origins.shape[:2]
    depth = origins.new_full((batch, rays), math.inf)
    normal = torch.zeros_like(origins)
    primitive = torch.full((batch, rays), -1, dtype=torch.int32, device=origins.device)
    for b, (first, second, end) in enumerate(starts.tolist()):
        items = [(table[first:second], blend[b, 0]), (table[second:end], blend[b, 1])]
        _trace_scene(origins[b], directions[b], items, first, radius[b], depth[b], normal[b], primitive[b])
    return Hits(depth, normal, primitive)


def _trace_scene(origins, directions, items, first, radius, depth, normal, primitive) -> None:
    """Fill depth [R], normal [R, 3] and primitive [R] of one scene."""
    square = (directions * directions).sum(-1)
    b = (origins * directions).sum(-1) / square
    inside = b * b - ((origins * origins).sum(-1) - radius * radius) / square
    alive = (inside > 0).nonzero()[:, 0]
    half = inside.clamp(min=0).sqrt()
    t, leave, per_length = (-b - half).clamp(min=0), half - b, square.rsqrt()
    met = torch.zeros_like(inside, dtype=torch.bool)
    for _ in range(STEPS):
        if not len(alive):
            break
        d = scene_distance(origins[alive] + t[alive, None] * directions[alive], items)
        met[alive[d < HIT]] = True
        t[alive] += torch.where(d < HIT, 0, STEP * d * per_length[alive])
        alive = alive[(d >= HIT) & (t[alive] < leave[alive])]
    hits = met.nonzero()[:, 0]
    if not len(hits):
        return
    points = origins[hits] + t[hits, None] * directions[hits]
    gradient = torch.zeros_like(points)
    for corner in points.new_tensor(_TETRAHEDRON):
        gradient += corner * scene_distance(points + NEAR * corner, items)[:, None]
    depth[hits] = t[hits]
    normal[hits] = torch.nn.functional.normalize(gradient, dim=-1)
    rows = torch.cat([rows for rows, _ in items])
    apart = torch.where(rows[:, 19] == 3, FAR, _distances(points, rows))
    primitive[hits] = first + apart.argmin(-1).to(torch.int32)


def scene_distance(points: Tensor, items: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Signed distance [R] of points [R, 3] to a scene of items (rows of the table, blend)."""
    nearest = torch.full_like(points[:, 0], FAR)
    for rows, blend in items:
        if not len(rows):
            continue
        apart, role, k = _distances(points, rows), rows[:, 19], blend.clamp(min=1e-4)
        main = (
            -k * torch.logsumexp(-apart[:, role == 1] / k, -1) if (role == 1).any() else torch.full_like(nearest, FAR)
        )
        if (role == 3).any():
            main = torch.maximum(main, -apart[:, role == 3].amin(-1))
        nearest = torch.minimum(nearest, main)
        if (role == 2).any():
            nearest = torch.minimum(nearest, apart[:, role == 2].amin(-1))
    return nearest


def _distances(points: Tensor, rows: Tensor) -> Tensor:
    """Distance of points [R, 3] to each of K primitives: [R, K]."""
    out = points.new_empty(len(points), len(rows))
    for kind, function in enumerate(_DISTANCES):
        which = (rows[:, 18] == kind).nonzero()[:, 0]
        if len(which):
            chosen = rows[which]
            d = points[:, None] - chosen[:, :3]
            x, y, z = torch.einsum("rkj,kij->irk", d, chosen[:, 3:12].view(-1, 3, 3))
            out[:, which] = function(x, y, z, *chosen[:, 12:18].T)
    return out


def _ball(x, y, z, rx, ry, rz, *_):
    x, y, z = x / rx, y / ry, z / rz
    k0 = torch.sqrt(x * x + y * y + z * z)
    k1 = torch.sqrt((x / rx) ** 2 + (y / ry) ** 2 + (z / rz) ** 2).clamp(min=1e-6)
    return torch.where(k0 < 1e-3, -torch.minimum(torch.minimum(rx, ry), rz), k0 * (k0 - 1) / k1)


def _box(x, y, z, hx, hy, hz, edge, top_x, top_z):
    up = ((y + hy) / (2 * hy)).clamp(0, 1)
    slope = torch.maximum(hx * (1 - top_x).abs(), hz * (1 - top_z).abs()) / (2 * hy)
    qx = x.abs() - hx * (1 + (top_x - 1) * up) + edge
    qy, qz = y.abs() - hy + edge, z.abs() - hz * (1 + (top_z - 1) * up) + edge
    outside = torch.sqrt(qx.clamp(min=0) ** 2 + qy.clamp(min=0) ** 2 + qz.clamp(min=0) ** 2)
    return (outside + torch.maximum(torch.maximum(qx, qy), qz).clamp(max=0) - edge) * torch.rsqrt(1 + slope * slope)


def _cone(x, y, z, r0, r1, h, edge, *_):
    r0, r1, h = r0 - edge, r1 - edge, h - edge
    q = torch.sqrt(x * x + z * z)
    cap_x, cap_y = q - torch.minimum(q, torch.where(y < 0, r0, r1)), y.abs() - h
    side_x, side_y = r1 - r0, 2 * h
    along = (((r1 - q) * side_x + (h - y) * side_y) / (side_x * side_x + side_y * side_y)).clamp(0, 1)
    wall_x, wall_y = q - r1 + side_x * along, y - h + side_y * along
    distance = torch.sqrt(torch.minimum(cap_x**2 + cap_y**2, wall_x**2 + wall_y**2))
    return torch.where((wall_x < 0) & (cap_y < 0), -distance, distance) - edge


def _ring(x, y, z, big, small, *_):
    return torch.sqrt((torch.sqrt(x * x + z * z) - big) ** 2 + y * y) - small


def _limb(x, y, z, r0, r1, h, *_):
    q = torch.sqrt(x * x + z * z)
    b = (r0 - r1) / h
    a = torch.sqrt((1 - b * b).clamp(min=0))
    k = a * y - b * q
    low, high = torch.sqrt(q * q + y * y) - r0, torch.sqrt(q * q + (y - h) ** 2) - r1
    return torch.where(k < 0, low, torch.where(k > a * h, high, a * q + b * y - r0))


def _arc(x, y, z, big, small, sine, cosine, *_):
    x = x.abs()
    k = torch.where(cosine * x > sine * y, x * sine + y * cosine, torch.sqrt(x * x + y * y))
    return torch.sqrt((x * x + y * y + z * z + big * big - 2 * big * k).clamp(min=0)) - small


_DISTANCES = (_ball, _box, _cone, _ring, _limb, _arc)


@jit
def _primitive_distance(px, py, pz, row):  # row: pointer to [20] fp32
    dx, dy, dz = px - tl.load(row), py - tl.load(row + 1), pz - tl.load(row + 2)
    x = tl.load(row + 3) * dx + tl.load(row + 4) * dy + tl.load(row + 5) * dz
    y = tl.load(row + 6) * dx + tl.load(row + 7) * dy + tl.load(row + 8) * dz
    z = tl.load(row + 9) * dx + tl.load(row + 10) * dy + tl.load(row + 11) * dz
    s0, s1, s2 = tl.load(row + 12), tl.load(row + 13), tl.load(row + 14)
    s3, s4, s5 = tl.load(row + 15), tl.load(row + 16), tl.load(row + 17)
    kind = tl.load(row + 18).to(tl.int32)
    d = x
    if kind == 0:  # ball
        i0, i1, i2 = 1 / s0, 1 / s1, 1 / s2
        ux, uy, uz = x * i0, y * i1, z * i2
        k0 = tl.sqrt(ux * ux + uy * uy + uz * uz)
        k1 = tl.sqrt(ux * i0 * ux * i0 + uy * i1 * uy * i1 + uz * i2 * uz * i2)
        d = tl.where(k0 < 1e-3, -tl.minimum(tl.minimum(s0, s1), s2), k0 * (k0 - 1) / tl.maximum(k1, 1e-6))
    elif kind == 1:  # box
        up = tl.minimum(tl.maximum((y + s1) / (2 * s1), 0.0), 1.0)
        slope = tl.maximum(s0 * tl.abs(1 - s4), s2 * tl.abs(1 - s5)) / (2 * s1)
        qx = tl.abs(x) - s0 * (1 + (s4 - 1) * up) + s3
        qy, qz = tl.abs(y) - s1 + s3, tl.abs(z) - s2 * (1 + (s5 - 1) * up) + s3
        ox, oy, oz = tl.maximum(qx, 0.0), tl.maximum(qy, 0.0), tl.maximum(qz, 0.0)
        within = tl.minimum(tl.maximum(tl.maximum(qx, qy), qz), 0.0)
        d = (tl.sqrt(ox * ox + oy * oy + oz * oz) + within - s3) / tl.sqrt(1 + slope * slope)
    elif kind == 2:  # cone
        r0, r1, h = s0 - s3, s1 - s3, s2 - s3
        q = tl.sqrt(x * x + z * z)
        cap_x, cap_y = q - tl.minimum(q, tl.where(y < 0, r0, r1)), tl.abs(y) - h
        side_x, side_y = r1 - r0, 2 * h
        along = ((r1 - q) * side_x + (h - y) * side_y) / (side_x * side_x + side_y * side_y)
        along = tl.minimum(tl.maximum(along, 0.0), 1.0)
        wall_x, wall_y = q - r1 + side_x * along, y - h + side_y * along
        apart = tl.sqrt(tl.minimum(cap_x * cap_x + cap_y * cap_y, wall_x * wall_x + wall_y * wall_y))
        d = tl.where((wall_x < 0) & (cap_y < 0), -apart, apart) - s3
    elif kind == 3:  # ring
        q = tl.sqrt(x * x + z * z) - s0
        d = tl.sqrt(q * q + y * y) - s1
    elif kind == 4:  # limb
        q = tl.sqrt(x * x + z * z)
        b = (s0 - s1) / s2
        a = tl.sqrt(tl.maximum(1 - b * b, 0.0))
        k = a * y - b * q
        low, high = tl.sqrt(q * q + y * y) - s0, tl.sqrt(q * q + (y - s2) * (y - s2)) - s1
        d = tl.where(k < 0, low, tl.where(k > a * s2, high, a * q + b * y - s0))
    else:  # arc
        ax = tl.abs(x)
        flat = ax * ax + y * y
        k = tl.where(s3 * ax > s2 * y, ax * s2 + y * s3, tl.sqrt(flat))
        d = tl.sqrt(tl.maximum(flat + z * z + s0 * s0 - 2 * s0 * k, 0.0)) - s1
    return d


@jit
def _scene_distance(px, py, pz, table, starts, blend):
    """Distance of points [BLOCK] to one scene; starts [3], blend [2] are its own."""
    nearest = px * 0.0 + _FAR
    for item in range(2):
        k = tl.maximum(tl.load(blend + item), 1e-4)
        low = px * 0.0 + _FAR  # smallest distance to a main primitive
        total = px * 0.0  # sum of exp((low - distance) / k)
        hole = px * 0.0 + _FAR
        p, end = tl.load(starts + item), tl.load(starts + item + 1)
        while p < end:
            row = table + p * 20
            d = _primitive_distance(px, py, pz, row)
            role = tl.load(row + 19).to(tl.int32)
            if role == _MAIN:
                least = tl.minimum(low, d)
                total = total * tl.exp((least - low) / k) + tl.exp((least - d) / k)
                low = least
            elif role == _OTHER:
                nearest = tl.minimum(nearest, d)
            else:
                hole = tl.minimum(hole, d)
            p += 1
        main = tl.where(total > 0, low - k * tl.log(tl.maximum(total, 1.0)), _FAR)
        nearest = tl.minimum(nearest, tl.maximum(main, -hole))
    return nearest


@jit
def trace_fwd_kernel(
    origins,  # [B, R, 3] fp32
    directions,  # [B, R, 3] fp32
    table,  # [P, 20] fp32
    starts,  # [B, 3] int32
    blend,  # [B, 2] fp32
    radius,  # [B] fp32
    depth,  # [B, R] fp32
    normal,  # [B, R, 3] fp32
    primitive,  # [B, R] int32
    rays,
    steps,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(rays, BLOCK)
    program = tl.program_id(0).to(tl.int64)
    scene = program // blocks
    ray = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    here = ray < rays
    at = scene * rays + ray
    starts += scene * 3
    blend += scene * 2
    ox = tl.load(origins + at * 3, mask=here, other=0.0)
    oy = tl.load(origins + at * 3 + 1, mask=here, other=0.0)
    oz = tl.load(origins + at * 3 + 2, mask=here, other=0.0)
    dx = tl.load(directions + at * 3, mask=here, other=0.0)
    dy = tl.load(directions + at * 3 + 1, mask=here, other=0.0)
    dz = tl.load(directions + at * 3 + 2, mask=here, other=1.0)
    r = tl.load(radius + scene)
    square = dx * dx + dy * dy + dz * dz
    b = (ox * dx + oy * dy + oz * dz) / square
    inside = b * b - (ox * ox + oy * oy + oz * oz - r * r) / square
    half = tl.sqrt(tl.maximum(inside, 0.0))
    t, leave, per_length = tl.maximum(-b - half, 0.0), half - b, 1 / tl.sqrt(square)
    alive = here & (inside > 0)
    met = alive & (inside < 0)  # nothing yet
    step = 0
    while (step < steps) & (tl.max(alive.to(tl.int32), 0) > 0):
        d = _scene_distance(ox + t * dx, oy + t * dy, oz + t * dz, table, starts, blend)
        met = met | (alive & (d < _HIT))
        alive = alive & (d >= _HIT)
        t = tl.where(alive, t + _STEP * d * per_length, t)
        alive = alive & (t < leave)
        step += 1
    x, y, z = ox + t * dx, oy + t * dy, oz + t * dz
    if tl.max(met.to(tl.int32), 0) > 0:
        a = _scene_distance(x + _NEAR, y - _NEAR, z - _NEAR, table, starts, blend)
        b = _scene_distance(x - _NEAR, y - _NEAR, z + _NEAR, table, starts, blend)
        c = _scene_distance(x - _NEAR, y + _NEAR, z - _NEAR, table, starts, blend)
        e = _scene_distance(x + _NEAR, y + _NEAR, z + _NEAR, table, starts, blend)
        nx, ny, nz = a - b - c + e, c + e - a - b, b + e - a - c
        length = tl.maximum(tl.sqrt(nx * nx + ny * ny + nz * nz), 1e-12)
        tl.store(normal + at * 3, nx / length, mask=met)
        tl.store(normal + at * 3 + 1, ny / length, mask=met)
        tl.store(normal + at * 3 + 2, nz / length, mask=met)
        tl.store(depth + at, t, mask=met)
        least = x * 0.0 + _FAR
        nearest = tl.zeros_like(ray).to(tl.int32)
        p, end = tl.load(starts), tl.load(starts + 2)
        while p < end:
            row = table + p * 20
            if tl.load(row + 19).to(tl.int32) != _CUT:
                d = _primitive_distance(x, y, z, row)
                nearest = tl.where(d < least, p, nearest)
                least = tl.minimum(least, d)
            p += 1
        tl.store(primitive + at, nearest, mask=met)


@torch.no_grad()
def trace(origins: Tensor, directions: Tensor, table: Tensor, starts: Tensor, blend: Tensor, radius: Tensor) -> Hits:
    """Trace rays [B, R, 3] (directions of any length) through B scenes, each inside the sphere of its radius [B].

    The ray must begin outside of what it meets. For the other arguments see the module.
    Raises TypeError or ValueError: when a tensor has another shape, dtype or device.
    """
    batch, rays = origins.shape[:2]
    fp32, like = (torch.float32,), ("origins", origins)
    check_tensor("origins", origins, (batch, rays, 3), dtypes=fp32)
    check_tensor("directions", directions, (batch, rays, 3), dtypes=fp32, like=like)
    check_tensor("table", table, ("P", ROW), dtypes=fp32, like=like)
    check_tensor("starts", starts, (batch, 3), dtypes=(torch.int32,), like=like)
    check_tensor("blend", blend, (batch, 2), dtypes=fp32, like=like)
    check_tensor("radius", radius, (batch,), dtypes=fp32, like=like)
    if not use_triton(origins):
        return trace_reference(origins, directions, table, starts, blend, radius)
    depth = torch.full((batch, rays), math.inf, device=origins.device)
    normal = torch.zeros(batch, rays, 3, device=origins.device)
    primitive = torch.full((batch, rays), -1, dtype=torch.int32, device=origins.device)
    block = 128  # one ray a lane: two would spill on sm_80
    launch(
        trace_fwd_kernel,
        (batch * -(-rays // block),),
        origins.device,
        num_warps=4,
        origins=origins.contiguous(),
        directions=directions.contiguous(),
        table=table.contiguous(),
        starts=starts.contiguous(),
        blend=blend.contiguous(),
        radius=radius.contiguous(),
        depth=depth,
        normal=normal,
        primitive=primitive,
        rays=rays,
        steps=STEPS,
        BLOCK=block,
    )
    return Hits(depth, normal, primitive)
