"""Measures of appearance: shape from normals and silhouettes, colour, and distance between sets of images.

    roughness    angle between a pixel's normal and the mean of its 3 x 3 neighbourhood, inside the silhouette
    edge_ratio   length of the silhouette's boundary over that of the silhouette opened and closed with a disc
    edge_width   pixels of partial opacity a pixel of the silhouette's boundary
    floaters     connected groups of pixels other than the largest
    delta_e      CIEDE2000 colour difference
    kid          kernel distance between two sets of features

V views of H x W pixels; normals are world normals and need not have length 1, opacities lie in [0, 1], colours are sRGB
in [0, 1]. A pixel is part of the object where its opacity exceeds 0.5.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

SOLID = 0.5  # opacity from which a pixel is part of the object
INNER = 2  # pixels from the silhouette's boundary that `roughness` leaves out
CLEAR, OPAQUE = 0.1, 0.9  # opacities between which a pixel is neither background nor object
DISC = 3  # pixels, radius of the disc that smooths a silhouette
_WHITE = (0.95047, 1.0, 1.08883)  # XYZ of D65, the white of sRGB
_TO_XYZ = (
    (0.412453, 0.357580, 0.180423),
    (0.212671, 0.715160, 0.072169),
    (0.019334, 0.119193, 0.950227),
)


def roughness(normal: Tensor, opacity: Tensor) -> float | None:
    """Mean angle in degrees of normals [V, H, W, 3] to their neighbourhoods' means; None where nothing is inside.

    Counted are pixels of the silhouette of opacities [V, H, W], eroded by INNER pixels.
    """
    inside = opacity > SOLID
    inner = _eroded(inside, torch.ones(2 * INNER + 1, 2 * INNER + 1))
    if not inner.any():
        return None
    unit = F.normalize(normal.double(), dim=-1) * inside[..., None]
    mean = F.avg_pool2d(unit.permute(0, 3, 1, 2), 3, stride=1, padding=1).permute(0, 2, 3, 1)
    # The cosine's rounding would hide angles below a tenth of a degree in fp32, and atan2 needs no clamp.
    across = torch.linalg.cross(unit, mean, dim=-1).norm(dim=-1)
    angle = torch.atan2(across, (unit * mean).sum(-1))
    return math.degrees(angle[inner].mean().item())


def edge_ratio(opacity: Tensor) -> float | None:
    """Boundary length of the silhouettes of opacities [V, H, W] over that of the smoothed ones; None without those.

    A length is the number of pixel sides between inside and outside, over all views.
    """
    inside = F.pad(opacity > SOLID, (2 * DISC,) * 4)
    disc = _disc(DISC)
    opened = _dilated(_eroded(inside, disc), disc)
    smooth = _boundary(_eroded(_dilated(opened, disc), disc))
    return _boundary(inside) / smooth if smooth else None


def edge_width(opacity: Tensor) -> float | None:
    """Pixels of partial opacity of views [V, H, W] over the boundary length of their silhouettes; None without those.

    An image of a solid object has 0, or about 1 where its pixels are averaged; haze has many times that.
    """
    length = _boundary(F.pad(opacity > SOLID, (1,) * 4))
    return int(((opacity > CLEAR) & (opacity < OPAQUE)).sum()) / length if length else None


def floaters(opacity: Tensor) -> float:
    """Connected groups (8 neighbours) of silhouette pixels other than the largest, the mean over V views [V, H, W]."""
    return sum(max(0, _groups(view > SOLID) - 1) for view in opacity) / len(opacity)


def _groups(inside: Tensor) -> int:
    """Connected groups of a mask [H, W]: the largest index of a pixel spreads through its group."""
    label = torch.arange(1, inside.numel() + 1, dtype=torch.float64, device=inside.device).view(inside.shape)
    label, before = label * inside, None
    while before is None or not torch.equal(label, before):
        before = label
        for _ in range(16):  # the comparison waits for a GPU
            label = F.max_pool2d(label[None], 3, stride=1, padding=1)[0] * inside
    return len(label[inside].unique())


def _disc(radius: int) -> Tensor:
    """Pixels [2 radius + 1, 2 radius + 1] within half a pixel of the radius: no single pixel stands out."""
    at = torch.arange(-radius, radius + 1)
    return (at[:, None].square() + at.square() <= (radius + 0.5) ** 2).float()


def _dilated(mask: Tensor, shape: Tensor) -> Tensor:
    """Pixels [V, H, W] that `shape` [K, K] around a pixel of the mask covers."""
    kernel = shape.to(mask.device)[None, None]
    return F.conv2d(mask[:, None].float(), kernel, padding=len(shape) // 2)[:, 0] > 0.5


def _eroded(mask: Tensor, shape: Tensor) -> Tensor:
    """Pixels around which `shape` lies inside the mask; what is beyond the image is outside."""
    edge = len(shape) // 2
    grown = _dilated(F.pad(~mask, (edge,) * 4, value=True), shape)
    return ~grown[:, edge:-edge, edge:-edge]


def _boundary(mask: Tensor) -> int:
    return int((mask[:, 1:] != mask[:, :-1]).sum() + (mask[:, :, 1:] != mask[:, :, :-1]).sum())


def lab(rgb: Tensor) -> Tensor:
    """CIE L*a*b* (D65) of sRGB colours [..., 3]."""
    rgb = rgb.double()
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055).clamp(min=0) ** 2.4)
    xyz = linear @ torch.tensor(_TO_XYZ, dtype=torch.float64, device=rgb.device).t()
    xyz = xyz / torch.tensor(_WHITE, dtype=torch.float64, device=rgb.device)
    f = torch.where(xyz > 216 / 24389, xyz.clamp(min=1e-12) ** (1 / 3), (24389 / 27 * xyz + 16) / 116)
    x, y, z = f.unbind(-1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def delta_e(first: Tensor, second: Tensor) -> Tensor:
    """CIEDE2000 difference of sRGB colours [..., 3]: about 1 is just visible, 100 is black against white.

    Source: Sharma, Wu and Dalal, The CIEDE2000 Color-Difference Formula, 2005, equations 2 to 22.
    """
    (l1, a1, b1), (l2, a2, b2) = lab(first).unbind(-1), lab(second).unbind(-1)
    mean_chroma = (torch.hypot(a1, b1) + torch.hypot(a2, b2)) / 2
    g = 1.5 - 0.5 * (mean_chroma**7 / (mean_chroma**7 + 25.0**7)).sqrt()
    c1, c2 = torch.hypot(g * a1, b1), torch.hypot(g * a2, b2)
    h1, h2 = torch.rad2deg(torch.atan2(b1, g * a1)) % 360, torch.rad2deg(torch.atan2(b2, g * a2)) % 360
    turn = (h2 - h1 + 180) % 360 - 180
    gray = c1 * c2 == 0
    dh = 2 * (c1 * c2).sqrt() * torch.sin(torch.deg2rad(turn) / 2)
    h = torch.where(gray, h1 + h2, (h1 + turn / 2) % 360)
    l, c = (l1 + l2) / 2, (c1 + c2) / 2  # noqa: E741
    t = 1 - 0.17 * _cos(h - 30) + 0.24 * _cos(2 * h) + 0.32 * _cos(3 * h + 6) - 0.20 * _cos(4 * h - 63)
    sl = 1 + 0.015 * (l - 50) ** 2 / (20 + (l - 50) ** 2).sqrt()
    sc, sh = 1 + 0.045 * c, 1 + 0.015 * c * t
    rotation = (
        -2 * (c**7 / (c**7 + 25.0**7)).sqrt() * torch.sin(torch.deg2rad(60 * torch.exp(-(((h - 275) / 25) ** 2))))
    )
    dl, dc, dh = (l2 - l1) / sl, (c2 - c1) / sc, dh / sh
    return (dl**2 + dc**2 + dh**2 + rotation * dc * dh).clamp(min=0).sqrt()


def _cos(degrees: Tensor) -> Tensor:
    return torch.cos(torch.deg2rad(degrees))


def part_color(rgb: Tensor, palette: Tensor) -> Tensor:
    """Median colour [3] of those pixels [N, 3] that are nearest, in L*a*b*, to the first colour of the palette [K, 3].

    Of all pixels where none is.
    """
    distance = (lab(rgb)[:, None] - lab(palette)).norm(dim=-1)
    chosen = rgb[distance.argmin(1) == 0]
    # A median over rows that share their memory reads past them (PyTorch 2.13, CPU).
    return (chosen if len(chosen) else rgb).contiguous().median(0).values


def kid(first: Tensor, second: Tensor) -> float:
    """Unbiased squared kernel distance between two sets of features [N, D] and [M, D], kernel (x.y / D + 1)^3.

    About 0 for two sets of the same distribution, where it may be negative.
    Source: Binkowski et al., Demystifying MMD GANs, 2018, section 4.
    """
    first, second = first.double(), second.double()

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.t() / x.shape[1] + 1) ** 3

    def within(x: Tensor) -> Tensor:
        values = kernel(x, x)
        return (values.sum() - values.diagonal().sum()) / (len(x) * (len(x) - 1))

    return (within(first) + within(second) - 2 * kernel(first, second).mean()).item()
