"""What the kernels are held against: times of other implementations, and ours as they must and should be, in ms.

All figures are of an NVIDIA H100 80GB HBM3; beside times of another GPU they say nothing exact. The peers are CUDA:
stable-dreamfusion, tiny-cuda-nn 2.0 (with and without JIT fusion) and nerfacc; the best of them stands here.
"""

from typing import NamedTuple

GPU = "H100"


class Target(NamedTuple):
    """Times in ms: the fastest peer's (None: no peer), the one to reach, the one to aim at (None: no other)."""

    peer: float | None
    must: float
    aim: float | None


_FORWARD, _BOTH = "forward", "forward_backward"

# By operator, case and mode.
TARGETS = {
    ("hash_grid", "rays_64", _FORWARD): Target(0.226, 0.20, 0.12),
    ("hash_grid", "rays_256", _FORWARD): Target(3.23, 2.8, 1.8),
    ("hash_grid", "uniform_2^20", _FORWARD): Target(0.639, 0.60, 0.50),
    ("hash_grid", "rays_64", _BOTH): Target(2.03, 1.0, 0.6),
    ("hash_grid", "rays_128", _BOTH): Target(7.16, 4.0, 2.2),
    ("hash_grid", "rays_256", _BOTH): Target(29.7, 15, 8),
    ("hash_grid", "uniform_2^20", _BOTH): Target(2.85, 2.8, 1.9),
    ("field", "rays_64", _FORWARD): Target(0.192, 0.19, 0.12),
    ("field", "rays_256", _FORWARD): Target(2.29, 2.2, 1.5),
    ("field", "rays_64", _BOTH): Target(2.03, 1.0, 0.6),
    ("field", "rays_256", _BOTH): Target(27.7, 15, 8),
    ("field", "uniform_2^20", _BOTH): Target(2.69, 2.65, 2.0),
    ("field_normals", "rays_64_finite_difference", _BOTH): Target(22, 6.0, 4.0),
    ("field_normals", "rays_64_analytic", _BOTH): Target(None, 3.0, 1.5),
    ("march", "rays_64", _FORWARD): Target(0.514, 0.15, 0.08),
    ("march", "rays_128", _FORWARD): Target(0.659, 0.25, 0.12),
    ("march", "rays_256", _FORWARD): Target(1.89, 0.6, 0.3),
    ("march", "rays_512", _FORWARD): Target(8.86, 2.5, 1.2),
    ("composite", "rays_256", _FORWARD): Target(0.308, 0.15, 0.09),
    ("composite", "rays_64", _BOTH): Target(0.328, 0.12, 0.06),
    ("composite", "rays_256", _BOTH): Target(1.32, 0.5, 0.28),
    ("composite", "rays_512", _BOTH): Target(5.69, 2.0, 1.1),
    ("render", "frame_800", _FORWARD): Target(None, 5.0, None),
    ("adan", "12.2M", _FORWARD): Target(None, 0.35, 0.23),
}
