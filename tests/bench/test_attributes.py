"""Parts and patterns: which variants a prompt is told from, how they are drawn, and what the probe finds."""

import pytest
import torch

from dream_fast.bench.quality import run as quality
from dream_fast.bench.quality.attributes import (
    Variant,
    find_variants,
    fit_probe,
    make_variant_scenes,
    share_with_attribute,
)
from dream_fast.bench.quality.protocol import ATTRIBUTED, HELD_OUT, PROMPTS
from dream_fast.engine.dream_mini.vocabulary import ATTRIBUTES, check_prompt


def test_attributed_prompts() -> None:
    """Eight prompts that no other measure uses, in words that dream-mini knows, with hats and every attribute."""
    assert len(set(ATTRIBUTED)) == 8 and not set(ATTRIBUTED) & {*PROMPTS, *HELD_OUT}
    assert [check_prompt(prompt) for prompt in ATTRIBUTED] == [[]] * 8
    named = [find_variants(prompt)[0] for prompt in ATTRIBUTED]
    assert {variant.attribute for variant in named} == {None, *ATTRIBUTES}
    assert {variant.hat for variant in named} == {None, "red", "blue"}


def test_find_variants() -> None:
    """The named variant is the first, the others differ from it in one thing."""
    assert find_variants("a bear with a blue hat") == [Variant(None, "blue"), Variant(None, None)]
    assert find_variants("a tall bear wearing a red hat") == [Variant("tall", "red"), Variant("tall", None)]
    first, *others = find_variants("a striped mug")
    assert first == Variant("striped", None)
    assert set(others) == {Variant(other, None) for other in (None, "tall", "wide", "spotted")}
    with pytest.raises(ValueError, match="'a black hat' names no part or pattern"):
        find_variants("a black hat")


@pytest.mark.parametrize(("prompt", "color"), [("a red striped mug", "red"), ("a snowman with a red hat", None)])
def test_make_variant_scenes(prompt, color) -> None:
    """Objects are as the variant says, in the prompt's colour; the hat's colour is not that of the object."""
    for variant in find_variants(prompt)[:2]:
        scenes = make_variant_scenes(prompt, variant, 2, seed=1)
        assert [(scene.color, scene.attribute, scene.hat) for scene in scenes] == [(color, *variant)] * 2
        again = make_variant_scenes(prompt, variant, 2, seed=1)
        assert [scene.primitives[0].size for scene in scenes] == [scene.primitives[0].size for scene in again]


def test_fit_probe() -> None:
    """Variants that lie apart are told apart, also along a direction of little variance; equal ones are guessed."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([5.0, 1.0, 1.0])
    noise = torch.randn(3, 12, 8, 3, generator=generator) * spread
    centers = torch.tensor([[0.0, 0, 0], [0, 6, 0], [0, 0, 6]])
    apart, equal = fit_probe(noise + centers[:, None, None]), fit_probe(noise)
    assert apart.accuracy > 0.98 and 0.2 < equal.accuracy < 0.5
    of_first = torch.randn(64, 3, generator=generator) * spread
    assert share_with_attribute(of_first, apart) > 0.95
    assert share_with_attribute(of_first + centers[1], apart) < 0.05


def test_summarize_attributes(monkeypatch) -> None:
    """A share a prompt over all its runs, and the mean; prompts without a probe or a run are left out."""
    probe = fit_probe(torch.tensor([1.0, -1.0]).view(2, 1, 1, 1) + 0.1 * torch.randn(2, 4, 2, 1))
    monkeypatch.setattr(quality, "read_probes", lambda: {"a striped mug": probe, "a tall robot": probe})
    monkeypatch.setattr(quality.Path, "exists", lambda path: True)
    features = {"a-striped-mug-0": [[1.0], [1.0]], "a-striped-mug-1": [[1.0], [-1.0]]}
    monkeypatch.setattr(quality, "read_views", lambda path: torch.tensor(features[path.stem]))
    monkeypatch.setattr(quality, "load_classifier", lambda: type("", (), {"features": staticmethod(lambda x: x)}))
    rows = [{"prompt": prompt, "seed": seed} for prompt in ("a striped mug", "a mug") for seed in (0, 1)]
    found = quality.summarize_attributes(rows, quality.Path("work"))
    assert found == {"result": 0.75, "world": probe.accuracy, "prompts": {"a striped mug": 0.75}}
    assert quality.summarize_attributes([], quality.Path("work"))["result"] is None
