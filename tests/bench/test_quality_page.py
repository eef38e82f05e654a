"""The page about quality: generated from stored measurements, and current."""

import pytest
import torch

from dream_fast.bench.quality import page as quality_page
from dream_fast.bench.quality import world
from dream_fast.bench.quality.attributes import Probe
from dream_fast.bench.quality.measures import delta_e
from dream_fast.bench.quality.page import BEGIN, END, fill_page, format_attributes, format_table
from dream_fast.bench.quality.protocol import ATTRIBUTED, HELD_OUT, PROMPTS
from dream_fast.bench.quality.world import (
    PAINTS,
    WorldMeasures,
    color_error,
    main_colors,
    make_palette,
    make_scenes,
    world_summary,
)
from dream_fast.engine.dream_mini.vocabulary import COLORS, find_object

PROBES = {"a striped mug": Probe(torch.ones(2, 5), torch.zeros(2), 0.5)}


def record(**result: float) -> dict:
    measures = {"result": {"roughness_deg": 8.0, **result}, "world": {"roughness_deg": 2.5}}
    about = {"runs": 2, "device": "a GPU", "commit": "abc", "utc": "2026-11-29T00:00:00Z", "object": 0.5}
    return about | {"look": measures, "held_out": {"runs": 0}, "held_out_look": {"result": {}}}


def test_table_columns() -> None:
    """Measures without values are left out, and so is a set of prompts without runs."""
    records = {"before": record(kid=1.0), "after": record(kid=0.25)}
    lines = format_table(records, "").splitlines()
    assert lines[0] == "| | before | after | the world's own |"
    assert lines[2:] == [
        "| roughness, degrees | 8 | 8 | 2.5 |",
        "| kernel distance | 1 | 0.25 |  |",
        "| object | 0.5 | 0.5 |  |",
    ]
    assert format_table(records, "held_out") == ""


def test_attributes_table() -> None:
    """A row a prompt, the mean and the world's own; a record without such runs has no column."""
    shares = {"result": 0.5, "world": 0.96, "prompts": {"a striped mug": 0.25, "a tall robot": 0.75}}
    records = {"before": record(), "after": record() | {"attributes": shares}}
    assert format_attributes(records).splitlines() == [
        "| | after |",
        "|---|---|",
        "| a striped mug | 0.250 |",
        "| a tall robot | 0.750 |",
        "| mean | 0.500 |",
        "| renders of the world | 0.960 |",
    ]
    assert format_attributes({"before": record()}) == ""


def test_fill_page() -> None:
    """Filling twice gives the same page."""
    once = fill_page(f"a\n{BEGIN}\nold\n{END}\nb", {"before": record()})
    assert once.startswith(f"a\n{BEGIN}\n### Fixed") and once.endswith(f"{END}\nb") and "old" not in once
    assert fill_page(once, {"before": record()}) == once


@pytest.mark.skipif(not quality_page.PAGE.exists(), reason="an installed package carries no docs")
def test_the_page_is_current() -> None:
    """The page has the values of the stored measurements, and its images exist."""
    page, records = quality_page.PAGE.read_text(encoding="utf-8"), quality_page.read_records()
    assert fill_page(page, records) == page, "write it anew: python -m dream_fast.bench quality_page"
    assert all((quality_page.RESULTS / f"quality-{name}.jpg").exists() for name in records)


# ------------------------------------------------------------------------------------------------------------ the world


@pytest.mark.parametrize("prompt", ["a hamburger", "a red robot", "a snowman", "a white rabbit"])
def test_make_scenes(prompt: str) -> None:
    """A scene has the object and its colour, the natural one where none is named; the palette begins with it."""
    scenes, color = make_scenes(prompt, 5), next((name for name in COLORS if name in prompt.split()), None)
    assert {scene.name for scene in scenes} == {find_object(prompt)} and {scene.color for scene in scenes} == {color}
    palette = make_palette(prompt)
    if color is not None:
        assert delta_e(palette[0], torch.tensor(COLORS[color])) < 5
    assert (delta_e(palette[1:], palette[0]) > world.SAME).all()
    paints = main_colors(prompt)
    assert len(paints) == PAINTS
    spread = color_error(paints, paints)
    assert 0 < spread < 5 < color_error(1 - paints, paints)  # of what is there, and of the opposite


def test_read_world_by_prompt(tmp_path) -> None:
    """Rows are in the requested order; there is no result for unknown prompts or another classifier."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 3, 5), (2, 3)]
    stored = WorldMeasures(*(torch.rand(shape, generator=generator) for shape in shapes))
    path = tmp_path / "world.safetensors"
    assert world.read_world(["a mug"], path) is None
    probes = {"a striped mug": Probe(torch.rand(2, 5, generator=generator), torch.rand(2, generator=generator), 0.75)}
    assert world.read_probes(path) == {}
    world.write_world(path, ["a mug", "a hat"], stored, probes)
    read = world.read_world(["a hat", "a mug"], path)
    assert torch.equal(read.shapes, stored.shapes.flip(0))
    assert torch.equal(read.features, stored.features.half().float().flip(0))
    assert world.read_world(["a cat"], path) is None
    (probe,) = world.read_probes(path).values()
    assert all(torch.equal(*both) for both in zip(probe[:2], probes["a striped mug"][:2], strict=True))
    assert probe.accuracy == 0.75
    summary = world_summary(read)
    assert summary["roughness_deg"] == pytest.approx(stored.shapes[:, 0].mean().item())
    assert summary.keys() == {"roughness_deg", "edge_ratio", "floaters", "kid"}


def test_read_world_of_another_classifier(tmp_path, monkeypatch) -> None:
    """Features of other weights are not used."""
    path = tmp_path / "world.safetensors"
    world.write_world(path, ["a mug"], WorldMeasures(torch.rand(1, 2, 1, 5), torch.rand(1, 3)), PROBES)
    assert list(world.read_probes(path)) == list(PROBES)
    monkeypatch.setattr(world, "classifier_digest", lambda: "another")
    assert world.read_world(["a mug"], path) is None and world.read_probes(path) == {}


def test_named_measurements_prompts() -> None:
    """A column of the page has only the fixed prompts."""
    for name, stored in quality_page.read_records().items():
        prompts = {line["prompt"] for line in stored["prompts"]}
        assert prompts <= {*PROMPTS, *HELD_OUT, *ATTRIBUTED}, name
