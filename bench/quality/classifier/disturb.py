"""Images as a rendered field or a decoded latent may look: what makes the judge's lessons harder than its world."""

import torch
from torch import Tensor
from torch.nn import functional as F


def disturb(images: Tensor, generator: torch.Generator) -> Tensor:
    """Distort images [N, 3, S, S] in [0, 1] as a rendered field or a decoded latent may look.

    Shifted, scaled and tilted; blurred; as if seen through fewer pixels; cloudy; with specks in empty space; stronger
    or weaker in contrast and colour; noisy.
    """
    n, _, size, _ = images.shape
    device = images.device

    def draw(*shape: int) -> Tensor:
        return torch.rand(n, *shape, generator=generator, device=device)

    def normal(*shape: int) -> Tensor:
        return torch.randn(n, *shape, generator=generator, device=device)

    def enlarged(small: Tensor) -> Tensor:
        return F.interpolate(small, (size, size), mode="bilinear")

    scale, tilt = 0.85 + 0.4 * draw(), 0.12 * (draw() - 0.5)
    rows = torch.stack([torch.stack([scale, -tilt], 1), torch.stack([tilt, scale], 1)], 1)
    theta = torch.cat([rows, 0.3 * (draw(2, 1) - 0.5)], dim=2)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    soft = F.avg_pool2d(F.pad(images, (2, 2, 2, 2), mode="replicate"), 5, 1)
    images = torch.lerp(images, soft, draw(1, 1, 1))
    coarse = F.interpolate(images, (size * 5 // 12, size * 5 // 12), mode="bilinear", antialias=True)
    images = torch.lerp(images, enlarged(coarse), draw(1, 1, 1) ** 2)
    images = images + 0.07 * draw(1, 1, 1) ** 2 * enlarged(normal(3, max(1, size // 8), max(1, size // 8)))
    specks = enlarged((normal(1, size // 3, size // 3) > 2.8).float()) * (draw(1, 1, 1) < 0.3)
    images = torch.lerp(images, draw(3, 1, 1).expand_as(images), specks)
    gray = images.mean(1, keepdim=True)
    images = gray + (images - gray) * (0.75 + 0.6 * draw(1, 1, 1))
    middle = gray.mean((2, 3), keepdim=True)
    images = middle + (images - middle) * (0.7 + 0.6 * draw(1, 1, 1))
    gain, lift = 0.88 + 0.24 * draw(1, 1, 1) + 0.1 * (draw(3, 1, 1) - 0.5), 0.1 * (draw(1, 1, 1) - 0.5)
    return (images * gain + lift + 0.05 * draw(1, 1, 1) * normal(3, size, size)).clamp(0, 1)
