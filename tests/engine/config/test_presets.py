"""The defaults of a run, and the settings of shortcuts."""

import re

import pytest

from dream_fast.engine.config.configure import configure, expand_shortcuts
from dream_fast.engine.config.guidances import DIFFUSION_SETTINGS, chosen_guidances, family_of
from dream_fast.engine.config.presets import (
    DMTET_OVERRIDES,
    MINI_DMTET_OVERRIDES,
    MINI_VANILLA_OVERRIDES,
    VANILLA_OVERRIDES,
    dmtet,
    dream_mini_cpu,
    dream_mini_gpu,
    reference,
    stable_diffusion,
    vanilla,
)
from dream_fast.engine.config.schema import settings
from dream_fast.engine.config.validate import check_typed, validate
from dream_fast.engine.errors import UserError

NO_SD = {"sd_version": None, "latent_iter_ratio": 0.0}
VANILLA = {"fp16": True, "backbone": "vanilla"}


def values_of(config) -> dict:
    return {field.name: getattr(getattr(config, section.name), field.name) for section, field in settings()}


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
def test_shortcuts_expand(typed, meant):
    """Their settings are added below typed ones, and their names are removed."""
    assert expand_shortcuts(typed) == meant


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        (
            {"O": True, "backbone": "vanilla"},
            "-O marches through the occupancy grid, which the vanilla backbone does not have",
        ),
        ({"cuda_ray": True, "backbone": "vanilla"}, "--cuda_ray marches through the occupancy grid"),
        ({"cuda_ray": True, "O2": True}, "--cuda_ray marches through the occupancy grid"),
        (
            {"IF": True, "guidance": ("clip", "dream-mini")},
            "--IF replaces SD, which --guidance clip dream-mini does not name: name IF there",
        ),
    ],
)
def test_shortcuts_contradicted(typed, sentence):
    """The message names the shortcut."""
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}"):
        expand_shortcuts(typed)


@pytest.mark.parametrize(
    ("typed", "family"),
    [
        ({}, "dream-mini"),
        ({"guidance": ("dream-mini", "clip"), "clip_key": "a", "t_range": (0.1, 0.5)}, "dream-mini"),
        ({"hf_key": "a"}, "stable-diffusion"),
        ({"sd_version": "1.5"}, "stable-diffusion"),
        ({"guidance": ("SD",), "perpneg": True}, "stable-diffusion"),
        ({"guidance": ("IF", "SD"), "if_key": "a", "hf_key": "b"}, "stable-diffusion"),
        ({"guidance": ("clip",), "clip_key": "a", "lr": 0.1}, "stable-diffusion"),
        ({"guidance": ("SD", "clip"), "t_range": (0.1, 0.5)}, "stable-diffusion"),
    ],
)
def test_chosen_guidances(typed, family):
    """dream-mini is used unless --guidance or a key names another model."""
    assert family_of(chosen_guidances(typed)) == family
    check_typed(typed)


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        ({"hf_key": "a", "sd_version": "1.5"}, "--hf_key and --sd_version both name a model: give one of them"),
        (
            {"hf_key": "a", "guidance": ("IF", "clip")},
            "--hf_key names a model for --guidance SD, which --guidance IF clip does not name: leave one out",
        ),
        (
            {"hf_key": "a", "if_key": "b"},
            "--if_key names a model for --guidance IF, which --guidance SD does not name: leave one out",
        ),
        (
            {"clip_key": "b"},
            "--clip_key names a model for --guidance clip, which --guidance dream-mini does not name: leave one out",
        ),
        (
            {"guidance": ("SD", "dream-mini", "IF")},
            "--guidance dream-mini cannot be combined with IF and SD: they need other settings of a run",
        ),
        *[
            (
                {"guidance": ("clip",), name: 1},
                f"--{name} has no meaning with --guidance clip alone: only diffusion models read it",
            )
            for name in sorted(DIFFUSION_SETTINGS)
        ],
    ],
)
def test_check_typed_refusals(typed, sentence):
    """The whole message, with the typed names."""
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}$"):
        check_typed(typed)


def of_model(typed: dict, model: str) -> dict:
    """The typed settings of a run with dream-mini, or with Stable Diffusion where no guidance is typed."""
    return typed if model == "dream-mini" or "guidance" in typed else {"guidance": ("SD",)} | typed


def differences(typed: dict, model: str, device: str, base) -> dict:
    """Settings of a resolved run that differ from its base, except the device."""
    plain = values_of(base)
    return {
        name: value
        for name, value in values_of(configure(of_model(typed, model), device)).items()
        if value != plain[name] and name != "device"
    }


@pytest.mark.parametrize(
    ("typed", "model", "device", "base", "other"),
    [
        ({}, "dream-mini", "cpu", dream_mini_cpu, {}),
        ({}, "dream-mini", "cuda:1", dream_mini_gpu, {}),
        ({"preset": "auto"}, "dream-mini", "cpu", dream_mini_cpu, {}),
        ({"preset": "reference"}, "dream-mini", "cpu", reference, {}),
        (
            {"preset": "reference"},
            "dream-mini",
            "cuda",
            reference,
            {"cuda_graph": True},
        ),
        ({}, "sd", "cuda", stable_diffusion, {}),
        ({"hf_key": "a"}, "sd", "cpu", stable_diffusion, {"hf_key": "a", "sd_version": None}),
        ({"sd_version": "1.5"}, "sd", "cpu", stable_diffusion, {"sd_version": "1.5"}),
        ({"guidance": ("IF",)}, "sd", "cpu", stable_diffusion, {"guidance": ("IF",), **NO_SD}),
        ({"guidance": ("clip",)}, "sd", "cpu", stable_diffusion, {"guidance": ("clip",), **NO_SD}),
        (
            {"guidance": ("SD", "IF")},
            "sd",
            "cpu",
            stable_diffusion,
            {"guidance": ("SD", "IF"), "latent_iter_ratio": 0.0},
        ),
        (
            {"guidance": ("SD", "clip"), "latent_iter_ratio": 0.5},
            "sd",
            "cpu",
            stable_diffusion,
            {"guidance": ("SD", "clip"), "latent_iter_ratio": 0.5},
        ),
        ({"objective": "csd"}, "dream-mini", "cpu", dream_mini_cpu, {"objective": "csd", "guidance_rescale": 0.0}),
        ({"objective": "asd"}, "dream-mini", "cpu", dream_mini_cpu, {"objective": "asd", "guidance_scale": 7.5}),
        (
            {"objective": "sdi", "guidance_scale": 3.0},
            "dream-mini",
            "cpu",
            dream_mini_cpu,
            {"objective": "sdi", "guidance_scale": 3.0},
        ),
        ({"objective": "sds"}, "dream-mini", "cpu", dream_mini_cpu, {}),
        ({"deterministic": True}, "dream-mini", "cuda", dream_mini_gpu, {"deterministic": True, "cuda_graph": False}),
        (
            {"guidance": ("dream-mini", "clip")},
            "dream-mini",
            "cuda",
            dream_mini_gpu,
            {"guidance": ("dream-mini", "clip"), "cuda_graph": False},
        ),
        ({"guidance": ("dream-mini",)}, "dream-mini", "cuda", dream_mini_gpu, {}),
        ({"backbone": "grid"}, "dream-mini", "cuda", dream_mini_gpu, {}),
        (
            {"backbone": "grid_torch"},
            "dream-mini",
            "cuda",
            dream_mini_gpu,
            {"backbone": "grid_torch", "cuda_graph": False},
        ),
        ({"cuda_graph": False}, "dream-mini", "cuda", dream_mini_gpu, {"cuda_graph": False}),
        ({"dmtet": False}, "sd", "cpu", stable_diffusion, {}),
    ],
)
def test_choose_preset_differences(typed, model, device, base, other):
    """Settings of a run that differ from its defaults."""
    assert differences(typed, model, device, base()) == other
    assert configure(of_model(typed, model), device).run.device == device


@pytest.mark.parametrize(
    ("typed", "model", "device", "expected"),
    [
        ({"backbone": "vanilla"}, "sd", "cuda", VANILLA_OVERRIDES),
        ({"backbone": "vanilla", "preset": "reference"}, "dream-mini", "cuda", VANILLA_OVERRIDES),
        ({"backbone": "vanilla"}, "dream-mini", "cpu", VANILLA_OVERRIDES | MINI_VANILLA_OVERRIDES["cpu"]),
        ({"backbone": "vanilla"}, "dream-mini", "cuda:2", VANILLA_OVERRIDES | MINI_VANILLA_OVERRIDES["cuda"]),
        ({"dmtet": True}, "sd", "cpu", DMTET_OVERRIDES),
        ({"dmtet": True, "preset": "reference"}, "dream-mini", "cuda", DMTET_OVERRIDES | {"cuda_graph": False}),
        ({"dmtet": True}, "dream-mini", "cpu", MINI_DMTET_OVERRIDES["cpu"]),
        ({"dmtet": True}, "dream-mini", "cuda", MINI_DMTET_OVERRIDES["cuda"] | {"cuda_graph": False}),
        (
            {"dmtet": True, "backbone": "vanilla"},
            "dream-mini",
            "cpu",
            VANILLA_OVERRIDES | MINI_VANILLA_OVERRIDES["cpu"] | MINI_DMTET_OVERRIDES["cpu"],
        ),
    ],
)
def test_vanilla_and_dmtet_overrides(typed, model, device, expected):
    """Overrides of the vanilla backbone and of refinement win over the model and lose to typed settings."""
    values = values_of(configure(of_model(typed, model), device))
    assert {name: values[name] for name in expected} == expected
    more = values_of(configure(of_model(typed | {"latent_iter_ratio": 0.75, "lr_decay": 0.75}, model), device))
    assert (more["latent_iter_ratio"], more["lr_decay"]) == (0.75, 0.75)
    without = {"lr_geo", "tet_grid_size", "iters"} - expected.keys()
    base = configure(of_model({key: value for key, value in typed.items() if key == "preset"}, model), device)
    assert all(values[key] == values_of(base)[key] for key in without)


@pytest.mark.parametrize("device", ["mps", "", "auto"])
def test_configure_unknown_device(device):
    """The message has the value of an unknown device."""
    with pytest.raises(ValueError, match=f"^device must be cpu, cuda or cuda:N, not {device!r}$"):
        configure({}, device)


@pytest.mark.parametrize(
    ("preset", "typed", "device"),
    [
        (reference(), {"preset": "reference"}, "cpu"),
        (stable_diffusion(), {"guidance": ("SD",)}, "cpu"),
        (dream_mini_cpu(), {}, "cpu"),
        (dream_mini_gpu(), {}, "cuda"),
        (vanilla(dream_mini_gpu()), {"backbone": "vanilla"}, "cuda"),
        (dmtet(vanilla(dream_mini_cpu())), {"backbone": "vanilla", "dmtet": True}, "cpu"),
        (dmtet(stable_diffusion()), {"hf_key": "a", "dmtet": True}, "cuda"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_presets_are_complete(preset, typed, device):
    """A run has the values of its preset, except the device and the model."""
    validate(preset)
    config = configure(typed, device)
    assert config.override({name: preset.get(name) for name in ("device", "hf_key", "sd_version")}) == preset
