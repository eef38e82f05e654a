"""Parts and patterns that a prompt names: is the hat there, is the mug striped?

The classifier has no outputs for them, but its features tell them apart. `fit_probe` fits a linear classifier of the
features to renders of the same object with and without what the prompt names, one for each prompt of
`protocol.ATTRIBUTED`; `bench world` stores it with its own accuracy on renders that it was not fitted to.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dream_fast.engine.dream_mini.scenes import Scene, make_scene
from dream_fast.engine.dream_mini.vocabulary import ATTRIBUTES, COLORS, find_object

RIDGE = 1e-2  # of the largest eigenvalue of the features' covariance


class Variant(NamedTuple):
    """A way to build the object of a prompt."""

    attribute: str | None  # one of ATTRIBUTES
    hat: str | None  # colour of a hat


class Probe(NamedTuple):
    """Linear classifier of K variants; the first is the one that the prompt names."""

    weight: Tensor  # [K, D]
    bias: Tensor  # [K]
    accuracy: float  # share of renders, apart from those it was fitted to, whose variant it names


def find_variants(prompt: str) -> list[Variant]:
    """The variant that a prompt names, then others of the same object: without a hat, or with other attributes.

    Raises ValueError: when the prompt names neither a hat nor an attribute.
    """
    words = prompt.split()
    attribute = next((word for word in ATTRIBUTES if word in words), None)
    if words[-1] == "hat" and ("with" in words or "wearing" in words):
        return [Variant(attribute, words[-2]), Variant(attribute, None)]
    if attribute is None:
        raise ValueError(f"{prompt!r} names no part or pattern")
    others = [None, *(word for word in ATTRIBUTES if word != attribute)]
    return [Variant(attribute, None), *(Variant(other, None) for other in others)]


def make_variant_scenes(prompt: str, variant: Variant, count: int, seed: int) -> list[Scene]:
    """Draw objects of the world that are the prompt's but for `variant`, in its colour or in their natural one."""
    name = find_object(prompt)
    assert name is not None, f"{prompt!r} names no object of the world"
    color = next((color for color in COLORS if color in prompt.partition(" with ")[0].split()), None)
    rng = np.random.default_rng([seed, *prompt.encode(), *str(variant).encode()])
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = make_scene(rng, name, color)
        if (scene.color, scene.attribute, scene.hat) == (color, *variant):
            scenes.append(scene)
    return scenes


def _fit(features: Tensor) -> tuple[Tensor, Tensor]:
    """Linear discriminant of features [K, N, D] of K classes: weights [K, D] and biases [K]."""
    mean = features.mean(1)
    within = (features - mean[:, None]).flatten(0, 1)
    covariance = within.t() @ within / len(within)
    ridge = RIDGE * torch.linalg.eigvalsh(covariance)[-1]
    weight = torch.linalg.solve(covariance + ridge * torch.eye(len(covariance), dtype=features.dtype), mean.t()).t()
    return weight, -(weight * mean).sum(1) / 2


def fit_probe(features: Tensor) -> Probe:
    """Fit a probe to features [K, N, V, D] of V views of N objects of each variant.

    Its accuracy is that of a fit to one half of the objects on the other half, both ways.
    """
    features = features.double()
    halves = features.chunk(2, dim=1)
    shares = []
    for one, other in (halves, halves[::-1]):
        weight, bias = _fit(one.flatten(1, 2))
        named = (other.flatten(1, 2) @ weight.t() + bias).argmax(-1)
        shares.append((named == torch.arange(len(features))[:, None]).double().mean())
    weight, bias = _fit(features.flatten(1, 2))
    return Probe(weight.float(), bias.float(), torch.stack(shares).mean().item())


def share_with_attribute(features: Tensor, probe: Probe) -> float:
    """Share of images, by features [N, D], in which the probe finds what the prompt names."""
    return ((features @ probe.weight.t() + probe.bias).argmax(-1) == 0).float().mean().item()
