"""Which defaults a run starts from, and what the shortcuts stand for."""

import re

import pytest

from dream_fast.engine.config.presets import (
    DIFFUSION_SETTINGS,
    DMTET_DEFAULTS,
    MINI_DMTET,
    MINI_VANILLA,
    VANILLA_DEFAULTS,
    chosen_model,
    expand_shortcuts,
    mini_cpu_defaults,
    mini_cuda_defaults,
    reference_defaults,
    resolve,
    sd_defaults,
)
from dream_fast.engine.config.schema import settings
from dream_fast.engine.errors import UserError

VANILLA = {"fp16": True, "backbone": "vanilla"}


def values_of(config) -> dict:
    return {field.name: getattr(getattr(config, room.name), field.name) for room, field in settings()}


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ({"O": True}, {"fp16": True}),
        ({"O": False, "O2": False, "IF": False}, {}),
        ({"O": True, "fp16": False, "lr": 0.5}, {"fp16": False, "lr": 0.5}),
        ({"O2": True}, VANILLA | {"progressive_level": True}),
        ({"O2": True, "test": True}, VANILLA | {"test": True}),
        ({"O2": True, "test": False}, VANILLA | {"test": False, "progressive_level": True}),
        (
            {"O2": True, "backbone": "grid", "cuda_ray": True},
            {"fp16": True, "backbone": "grid", "cuda_ray": True, "progressive_level": True},
        ),
        ({"O": True, "O2": True}, {"fp16": True}),
        ({"IF": True}, {"guidance": ("IF",)}),
        ({"IF": True, "guidance": ("clip", "SD")}, {"guidance": ("clip", "IF")}),
        ({"IF": True, "guidance": ("SD", "IF")}, {"guidance": ("IF",)}),
        ({"IF": True, "guidance": ("IF", "clip")}, {"guidance": ("IF", "clip")}),
        ({"cuda_ray": True}, {"cuda_ray": True}),
        ({"backbone": "vanilla"}, {"backbone": "vanilla"}),
    ],
)
def test_shortcuts_stand_for_settings(typed, meant):
    """What they mean is added under what was typed, and their own names are gone."""
    assert expand_shortcuts(typed) == meant


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        (
            {"O": True, "backbone": "vanilla"},
            "-O marches through the occupancy grid, which the vanilla backbone has not",
        ),
        ({"cuda_ray": True, "backbone": "vanilla"}, "--cuda_ray marches through the occupancy grid"),
        ({"cuda_ray": True, "O2": True}, "--cuda_ray marches through the occupancy grid"),
        (
            {"IF": True, "guidance": ("clip", "dream-mini")},
            "--IF takes the place of SD, which --guidance clip dream-mini does not name: name IF there",
        ),
    ],
)
def test_shortcuts_that_contradict_what_was_typed_are_refused(typed, sentence):
    """The sentence names the shortcut."""
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}"):
        expand_shortcuts(typed)


@pytest.mark.parametrize(
    ("typed", "model"),
    [
        ({}, "dream-mini"),
        ({"guidance": ("dream-mini", "clip"), "clip_key": "a", "t_range": (0.1, 0.5)}, "dream-mini"),
        ({"hf_key": "a"}, "sd"),
        ({"sd_version": "1.5"}, "sd"),
        ({"guidance": ("SD",), "perpneg": True}, "sd"),
        ({"guidance": ("IF", "SD"), "if_key": "a", "hf_key": "b"}, "sd"),
        ({"guidance": ("clip",), "clip_key": "a", "lr": 0.1}, "sd"),
        ({"guidance": ("SD", "clip"), "t_range": (0.1, 0.5)}, "sd"),
    ],
)
def test_chosen_model_is_the_one_that_is_named(typed, model):
    """dream-mini guides unless another model is named, by --guidance or by its key."""
    assert chosen_model(typed) == model


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        ({"hf_key": "a", "sd_version": "1.5"}, "--hf_key and --sd_version both name a model: give one of them"),
        (
            {"hf_key": "a", "guidance": ("IF", "clip")},
            "--hf_key is a model for --guidance SD, which --guidance IF clip does not name: leave one out",
        ),
        (
            {"hf_key": "a", "if_key": "b"},
            "--if_key is a model for --guidance IF, which --guidance SD does not name: leave one out",
        ),
        (
            {"clip_key": "b"},
            "--clip_key is a model for --guidance clip, which --guidance dream-mini does not name: leave one out",
        ),
        (
            {"guidance": ("SD", "dream-mini", "IF")},
            "--guidance dream-mini does not go with IF and SD: they need other settings of a run",
        ),
        *[
            (
                {"guidance": ("clip",), name: 1},
                f"--{name} has no meaning with --guidance clip alone: only diffusion models read it",
            )
            for name in DIFFUSION_SETTINGS
        ],
    ],
)
def test_models_that_contradict_each_other_are_refused(typed, sentence):
    """The whole sentence, with the names as they were typed."""
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}$"):
        chosen_model(typed)


def differences(typed: dict, model: str, device: str, base) -> dict:
    """What a resolved run has otherwise than its base, beside the device."""
    plain = values_of(base)
    return {
        name: value
        for name, value in values_of(resolve(typed, model, device)).items()
        if value != plain[name] and name != "device"
    }


@pytest.mark.parametrize(
    ("typed", "model", "device", "base", "other"),
    [
        ({}, "dream-mini", "cpu", mini_cpu_defaults, {}),
        ({}, "dream-mini", "cuda:1", mini_cuda_defaults, {"cuda_graph": True}),
        ({"preset": "auto"}, "dream-mini", "cpu", mini_cpu_defaults, {}),
        ({"preset": "reference"}, "dream-mini", "cpu", reference_defaults, {"preset": "reference"}),
        (
            {"preset": "reference"},
            "dream-mini",
            "cuda",
            reference_defaults,
            {"preset": "reference", "cuda_graph": True},
        ),
        ({}, "sd", "cuda", sd_defaults, {"guidance": ("SD",), "sd_version": "2.1"}),
        ({"hf_key": "a"}, "sd", "cpu", sd_defaults, {"guidance": ("SD",), "hf_key": "a"}),
        ({"sd_version": "1.5"}, "sd", "cpu", sd_defaults, {"guidance": ("SD",), "sd_version": "1.5"}),
        ({"guidance": ("IF",)}, "sd", "cpu", sd_defaults, {"guidance": ("IF",), "latent_iter_ratio": 0.0}),
        ({"guidance": ("clip",)}, "sd", "cpu", sd_defaults, {"guidance": ("clip",), "latent_iter_ratio": 0.0}),
        (
            {"guidance": ("SD", "IF")},
            "sd",
            "cpu",
            sd_defaults,
            {"guidance": ("SD", "IF"), "latent_iter_ratio": 0.0, "sd_version": "2.1"},
        ),
        (
            {"guidance": ("SD", "clip"), "latent_iter_ratio": 0.5},
            "sd",
            "cpu",
            sd_defaults,
            {"guidance": ("SD", "clip"), "latent_iter_ratio": 0.5, "sd_version": "2.1"},
        ),
        ({"objective": "csd"}, "dream-mini", "cpu", mini_cpu_defaults, {"objective": "csd", "guidance_rescale": 0.0}),
        ({"objective": "asd"}, "dream-mini", "cpu", mini_cpu_defaults, {"objective": "asd", "guidance_scale": 7.5}),
        (
            {"objective": "sdi", "guidance_scale": 3.0},
            "dream-mini",
            "cpu",
            mini_cpu_defaults,
            {"objective": "sdi", "guidance_scale": 3.0},
        ),
        ({"objective": "sds"}, "dream-mini", "cpu", mini_cpu_defaults, {}),
        ({"deterministic": True}, "dream-mini", "cuda", mini_cuda_defaults, {"deterministic": True}),
        (
            {"guidance": ("dream-mini", "clip")},
            "dream-mini",
            "cuda",
            mini_cuda_defaults,
            {"guidance": ("dream-mini", "clip")},
        ),
        ({"guidance": ("dream-mini",)}, "dream-mini", "cuda", mini_cuda_defaults, {"cuda_graph": True}),
        ({"backbone": "grid"}, "dream-mini", "cuda", mini_cuda_defaults, {"cuda_graph": True}),
        ({"backbone": "grid_torch"}, "dream-mini", "cuda", mini_cuda_defaults, {"backbone": "grid_torch"}),
        ({"cuda_graph": False}, "dream-mini", "cuda", mini_cuda_defaults, {}),
        ({"dmtet": False}, "sd", "cpu", sd_defaults, {"guidance": ("SD",), "sd_version": "2.1"}),
    ],
)
def test_defaults_of_the_model_the_device_and_the_preset(typed, model, device, base, other):
    """What a run has otherwise than the defaults it starts from."""
    assert differences(typed, model, device, base()) == other
    assert resolve(typed, model, device).run.device == device


@pytest.mark.parametrize(
    ("typed", "model", "device", "wanted"),
    [
        ({"backbone": "vanilla"}, "sd", "cuda", VANILLA_DEFAULTS),
        ({"backbone": "vanilla", "preset": "reference"}, "dream-mini", "cuda", VANILLA_DEFAULTS),
        ({"backbone": "vanilla"}, "dream-mini", "cpu", VANILLA_DEFAULTS | MINI_VANILLA["cpu"]),
        ({"backbone": "vanilla"}, "dream-mini", "cuda:2", VANILLA_DEFAULTS | MINI_VANILLA["cuda"]),
        ({"dmtet": True}, "sd", "cpu", DMTET_DEFAULTS),
        ({"dmtet": True, "preset": "reference"}, "dream-mini", "cuda", DMTET_DEFAULTS | {"cuda_graph": False}),
        ({"dmtet": True}, "dream-mini", "cpu", MINI_DMTET["cpu"]),
        ({"dmtet": True}, "dream-mini", "cuda", MINI_DMTET["cuda"] | {"cuda_graph": False}),
        (
            {"dmtet": True, "backbone": "vanilla"},
            "dream-mini",
            "cpu",
            VANILLA_DEFAULTS | MINI_VANILLA["cpu"] | MINI_DMTET["cpu"],
        ),
    ],
)
def test_backbone_and_mesh_bring_their_own_defaults(typed, model, device, wanted):
    """The tables of the vanilla backbone and of the refinement count more than the model, less than what is typed."""
    values = values_of(resolve(typed, model, device))
    assert {name: values[name] for name in wanted} == wanted
    more = values_of(resolve(typed | {"latent_iter_ratio": 0.75, "lr_decay": 0.75}, model, device))
    assert (more["latent_iter_ratio"], more["lr_decay"]) == (0.75, 0.75)
    without = {"lr_geo", "tet_grid_size", "iters"} - wanted.keys()
    base = resolve({key: value for key, value in typed.items() if key == "preset"}, model, device)
    assert all(values[key] == values_of(base)[key] for key in without)


@pytest.mark.parametrize(("model", "device"), [("SD", "cpu"), ("sd", "mps"), ("", ""), ("dream-mini", "auto")])
def test_resolve_takes_a_model_and_a_device_that_there_are(model, device):
    """Both values are in the message."""
    words = f"resolve: model {model!r} must be dream-mini or sd, device {device!r} cpu or cuda"
    with pytest.raises(ValueError, match=f"^{words}$"):
        resolve({}, model, device)
