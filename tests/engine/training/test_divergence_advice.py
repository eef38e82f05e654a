"""Settings and messages for divergence, value by value."""

import dataclasses

import pytest

from dream_fast.engine.config.presets import reference
from dream_fast.engine.config.schedule import LinearSchedule
from dream_fast.engine.training import divergence


def configured(**changes):
    return reference().override(changes)


def test_rescue_of_vanished():
    """Half the rate, no opacity term, a tenth of the entropy, twice the blob density and at least 10."""
    config = configured(lr=0.5, lambda_opacity=0.25, lambda_opacity_entropy=2.0, blob_density=8.0, blob_radius=0.5)
    assert divergence.rescue_overrides(config, "vanished") == {
        "lr": 0.25,
        "lambda_opacity": 0.0,
        "lambda_opacity_entropy": 0.2,
        "blob_density": 16.0,
    }
    sparse = configured(lr=0.5, lambda_opacity=0.0, lambda_opacity_entropy=0.0, blob_density=3.0)
    assert divergence.rescue_overrides(sparse, "vanished") == {"lr": 0.25, "blob_density": 10.0}


def test_rescue_of_full():
    """Ten times the opacity term and at least 1, half the blob density and at most 10, a radius of at most 0.2."""
    config = configured(lr=0.5, lambda_opacity=0.25, blob_density=8.0, blob_radius=0.5)
    expected = {"lr": 0.25, "lambda_opacity": 2.5, "blob_density": 4.0, "blob_radius": 0.2}
    assert divergence.rescue_overrides(config, "full") == expected
    config = configured(lr=0.5, lambda_opacity=0.01, blob_density=50.0, blob_radius=0.1)
    assert divergence.rescue_overrides(config, "full") == {"lr": 0.25, "lambda_opacity": 1.0, "blob_density": 10.0}


def test_scaled_schedule():
    """The ends of the schedule are kept."""
    schedule = LinearSchedule(0.1, 1.0, 2.0, 0.9)
    scaled = divergence._scaled(schedule, 0.5)
    assert scaled == dataclasses.replace(schedule, first=0.5, last=1.0)
    assert divergence._scaled(3.0, 0.5) == 1.5


def test_degenerate_message():
    """The message has kind, number of steps, step and flags."""
    config = configured(lr=0.5, lambda_opacity=0.0, lambda_opacity_entropy=0.0, blob_density=3.0)
    assert divergence.degenerate_message(config, "vanished", 300) == (
        "the object has vanished (100 steps in a row before step 300); --rescue restarts with "
        "--lr 0.25 --blob_density 10"
    )
    assert "the object fills the whole box (100 steps" in divergence.degenerate_message(config, "full", 300)
    lost = divergence.DegenerateScene("full")
    assert lost.kind == "full" and str(lost) == "full"


def test_format_flags():
    """Switches have their name, floats no trailing zeros."""
    settings = {"vram_O": True, "cuda_graph": False, "lr": 0.5, "blob_density": 10.0, "w": 64, "text": "a"}
    assert divergence.format_flags(settings) == "--vram_O --no-cuda_graph --lr 0.5 --blob_density 10 --w 64 --text a"
    assert divergence.format_flags({}) == ""


@pytest.mark.parametrize(
    ("row", "cause", "half", "full"),
    [
        ({}, "the image model's prediction is not finite", "--no-fp16", "--guidance_scale 40"),
        (
            {"grad_norm": 1.0, "loss_guidance": None, "loss_orient": None},
            "the image model's prediction",
            "--no-fp16",
            "--guidance_scale 40",
        ),
        (
            {"grad_norm": 1.0, "loss_guidance": 1.0, "loss_orient": None, "loss_tv": None},
            "the regulariser orient is",
            "--lambda_orient 0",
            "--lambda_orient 0",
        ),
        (
            {"grad_norm": 1.0, "loss_orient": 2.0, "other": None},
            "the losses are finite and their gradients are not",
            "--no-fp16",
            "--grad_clip 1 or --lr 0.25",
        ),
    ],
)
def test_nonfinite_message(row, cause, half, full):
    """In half precision the advice is --no-fp16, in single precision another setting."""
    for fp16, advice in ((True, half), (False, full)):
        sentence = divergence.nonfinite_message(configured(fp16=fp16, guidance_scale=80.0, lr=0.5), 50, row)
        assert sentence.startswith("the gradients of the last 50 steps were not finite, so the run ends: ")
        assert f": {cause}" in sentence and f"; {advice} may help, in a new --workspace" in sentence


def test_outweighed_message():
    """Each weight is divided by the ratio, to one digit; zero weights are left out, and schedules count by their
    largest."""
    ending = "(most of 100 steps before step 700) and smooths the object away; {} would pull as hard as that"
    one = divergence.outweighed_message(configured(lambda_tv=1.0, lambda_wd=0.0), 4.0, 700)
    assert one == "--lambda_tv 1 pulls 4.0 times as hard as the guidance " + ending.format("--lambda_tv 0.2")
    scheduled = configured(lambda_tv=LinearSchedule(0.1, 1.0, 8.0, 0.9), lambda_wd=2.0)
    both = divergence.outweighed_message(scheduled, 4.0, 700)
    beginning = "--lambda_tv 8 --lambda_wd 2 pulls 4.0 times as hard as the guidance "
    assert both == beginning + ending.format("--lambda_tv 2 --lambda_wd 0.5")
