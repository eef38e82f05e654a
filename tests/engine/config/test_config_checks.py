"""Combinations of settings at the border of each rule; reading, comparing and copying configurations."""

import re

import pytest

from dream_fast.engine.config.guidances import DREAM_MINI, accept_latents, chosen_guidances
from dream_fast.engine.config.presets import reference
from dream_fast.engine.config.schedule import LinearSchedule
from dream_fast.engine.config.schema import Config, device_kind, read_values, settings, settings_unused_by
from dream_fast.engine.config.validate import graph_breaking_flags, validate
from dream_fast.engine.errors import UserError

FADING = LinearSchedule(0.0, 0.5, 0.0, 1.0)
IF = {"guidance": ("IF",), "latent_iter_ratio": 0.0}
CLIP = {"guidance": ("clip",), "latent_iter_ratio": 0.0}


@pytest.mark.parametrize(
    "typed",
    [
        {"exp_end_iter": 1},
        {"exp_start_iter": 9, "exp_end_iter": 10},
        {"exp_start_iter": 9, "iters": 10},
        {"exp_start_iter": 9, "exp_end_iter": 10, "iters": 2},
        {"output": "elsewhere", "test": True},
        {"test": True},
        {"compile": True},
        {"deterministic": True},
        {"max_resolution": 16, "base_resolution": 16},
        {"occupancy_resolution": 66},
        {"perpneg": True, "objective": "sds"},
        {"loss_space": "x0", "objective": "sdi"},
        {"loss_space": "x0", "objective": "sds"},
        {"objective": "csd"},
        {"backbone": "vanilla"},
        {"backbone": "grid_torch", "lambda_tv": 1.0, "lambda_wd": FADING},
        {"dmtet": True, "init_with": "a", "lr_geo": 0.1, "lock_geo": True, "tet_grid_size": 6},
        IF,
        IF | {"attention": "sdpa"},
        {"attention": "cudnn"},
        {"guidance": ("SD", "clip"), "attention": "xformers"},
        {"guidance": ("SD", "clip"), "save_guidance": True},
        {"guidance": ("SD", "clip")},
        {"guidance": ("SD",), "cuda_graph": True},
        {"cuda_graph": True},
        CLIP,
    ],
    ids=str,
)
def test_validate_takes(typed):
    """Allowed combinations keep the typed values."""
    config = reference().override(typed)
    validate(config)
    values = {field.name: getattr(getattr(config, section.name), field.name) for section, field in settings()}
    assert {name: values[name] for name in typed} == typed


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        ({"output": "elsewhere"}, "--output works only with --test"),
        ({"exp_end_iter": 9, "exp_start_iter": 10}, "--exp_end_iter must be more than --exp_start_iter 10, not 9"),
        ({"exp_start_iter": 11, "iters": 10}, "--exp_start_iter must be less than --iters 10"),
        ({"perpneg": True, "objective": "csd"}, "--perpneg works only with --objective sds, not with csd"),
        (
            {"loss_space": "x0", "objective": "csd"},
            "--loss_space x0 works only with --objective sds and sdi, not with csd",
        ),
        (
            {"loss_space": "x0", "objective": "asd"},
            "--loss_space x0 works only with --objective sds and sdi, not with asd",
        ),
        ({"guidance": ("SD", "clip", "clip")}, "--guidance names clip twice"),
        ({"backbone": "vanilla", "lambda_tv": 0.1}, "--lambda_tv and --lambda_wd apply to the hash table"),
        ({"backbone": "vanilla", "lambda_wd": FADING}, "--lambda_tv and --lambda_wd apply to the hash table"),
        ({"tet_grid_size": 7}, "--tet_grid_size must be even, not 7"),
        ({"init_with": "a"}, "--init_with belongs to the mesh refinement"),
        ({"lr_geo": 0.1}, "--lr_geo belongs to the mesh refinement"),
        ({"lock_geo": True}, "--lock_geo belongs to the mesh refinement"),
        (
            {"guidance": ("clip",)},
            "--latent_iter_ratio 0.2 cannot be combined with --guidance clip, which cannot guide",
        ),
        ({"guidance": ("IF", "clip")}, "--latent_iter_ratio 0.2 cannot be combined with --guidance IF clip"),
        (IF | {"attention": "xformers"}, "--attention xformers is for Stable Diffusion: the models of --guidance IF"),
        (
            CLIP | {"cuda_graph": True},
            "--cuda_graph replays steps of one diffusion model, not those of --guidance clip",
        ),
        (CLIP | {"save_guidance": True}, "--save_guidance saves latents of a diffusion model"),
        ({"cuda_graph": True, "dmtet": True}, "--cuda_graph cannot be combined with --dmtet, which"),
        (
            {"cuda_graph": True, "progressive_view": True, "progressive_level": True},
            "--cuda_graph cannot be combined with --progressive_view, which",
        ),
        ({"itres": 1, "Iters": 2, "iters": 3}, "unknown setting: Iters, itres"),
    ],
    ids=str,
)
def test_validate_refuses(typed, sentence):
    """The message begins with the flags that contradict each other."""
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}"):
        validate(reference().override(typed))


def test_graph_breaking_flags_order():
    """Each of the settings gives a flag, progressive levels with PyTorch's hash grid only, and other settings none."""
    assert graph_breaking_flags(reference()) == []
    every = {"dmtet": True, "progressive_view": True, "progressive_level": True}
    torch_grid = reference().override({"backbone": "grid_torch"})
    assert graph_breaking_flags(torch_grid.override(every)) == [f"--{name}" for name in every]
    for name in every:
        assert graph_breaking_flags(torch_grid.override({name: True})) == [f"--{name}"]
    assert graph_breaking_flags(reference().override({"progressive_level": True})) == []


@pytest.mark.parametrize(
    ("values", "embedded", "accepts_latents"),
    [
        ({}, True, True),
        ({"guidance": ("dream-mini", "clip")}, True, True),
        ({"sd_version": "1.5"}, False, True),
        ({"hf_key": "a"}, False, True),
        ({"guidance": ("SD",)}, False, True),
        ({"guidance": ("SD", "clip")}, False, True),
        ({"guidance": ("SD", "IF")}, False, False),
        ({"guidance": ("IF", "clip")}, False, False),
        ({"guidance": ("clip",)}, False, False),
    ],
)
def test_guidance_kinds(values, embedded, accepts_latents):
    """Typed settings choose the models; a latent phase needs a diffusion model, and all of them to accept latents."""
    specs = chosen_guidances(values)
    assert (DREAM_MINI in specs, accept_latents(specs)) == (embedded, accepts_latents)


def test_train_size_of_a_mesh():
    """Height and width are rounded, and at least one pixel."""
    base = reference().override({"h": 10, "w": 7, "dmtet_reso_scale": 1.5})
    assert base.train_size == (10, 7)
    mesh = base.override({"dmtet": True})
    assert mesh.train_size == (15, 10)
    assert mesh.override({"dmtet_reso_scale": 0.01}).train_size == (1, 1)


def test_view_prompts_by_side():
    """Only sides with their own prompt are listed."""
    typed = {"text_front": "f", "text_side": "s", "text_back": "b", "text_overhead": "o"}
    assert reference().run.view_prompts == {}
    assert reference().override(typed).run.view_prompts == {"front": "f", "side": "s", "back": "b", "overhead": "o"}


def test_from_dict_kinds():
    """Schedules and tuples are restored; a prompt that looks like a schedule stays text."""
    typed = {
        "text": "0:1:2:3",
        "lambda_tv": LinearSchedule(0, 1.0, 2.0, 3, fractions=False),
        "t_range": (0.02, LinearSchedule(0.0, 0.9, 0.5, 1.0)),
        "guidance": ("SD", "clip"),
    }
    config = reference().override(typed)
    saved = config.to_dict()
    assert saved["loss"]["lambda_tv"] == "0:1:2:3" and saved["guidance"]["t_range"] == (0.02, "0.0:0.9:0.5:1.0")
    saved["guidance"]["t_range"] = list(saved["guidance"]["t_range"])
    assert Config.from_dict(saved) == config
    values = {
        "text": "0:1:2:3",
        "lambda_tv": "0:1:2:3",
        "t_range": [0.02, "0.0:0.9:0.5:1.0"],
        "guidance": ["SD", "clip"],
    }
    assert read_values(values | {"other": "0:1:2:3"}) == typed | {"other": "0:1:2:3"}
    with pytest.raises(UserError, match="is not a schedule"):
        read_values({"lambda_tv": "fast"})


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda data: data["run"].pop("text"), "the saved configuration has missing or unknown settings: run.text"),
        (lambda data: data.pop("dmtet"), "settings: dmtet.dmtet, dmtet.dmtet_reso_scale, dmtet.init_with, "),
        (lambda data: data.update(more={"a": 1}), "settings: more.a$"),
        (lambda data: data["loss"].update(b=1, a=1), "settings: loss.a, loss.b$"),
        (lambda data: data.update(run=3), "must map sections to their settings"),
        (lambda data: data["optim"].update(lr=-1.0), "--lr must be more than 0"),
    ],
)
def test_from_dict_damaged(damage, sentence):
    """The message names missing, unknown and bad settings."""
    data = reference().to_dict()
    damage(data)
    with pytest.raises(UserError, match=sentence):
        Config.from_dict(data)


def test_differences_of_learned_settings():
    """All GPUs are the same device, schedules are shown as typed, and a view counts where training starts from it."""
    base = reference().override({"device": "cuda:1"})
    assert base.differences(base.override({"device": "cuda:0"})) == []
    assert base.differences(base.override({"device": "cpu"})) == ["--device cuda, not cpu"]
    fading = base.override({"lambda_tv": FADING, "t_range": (0.02, LinearSchedule(0.0, 0.9, 0.5, 1.0))})
    assert fading.differences(base) == [
        "--t_range 0.02 0.0:0.9:0.5:1.0, not (0.02, 0.98)",
        "--lambda_tv 0.0:0.5:0:1.0, not 0.0",
    ]
    started = reference().override({"progressive_view": True})
    moved = started.override({"default_polar": 60.0})
    assert started.differences(moved) == ["--default_polar 90.0, not 60.0"]
    assert reference().differences(moved) == ["--progressive_view False, not True"]


def test_device_kind_and_unused_settings():
    """The number of a GPU is cut off, and each backbone lacks the settings of the others."""
    assert [device_kind(name) for name in ("cuda:1", "cuda", "cpu")] == ["cuda", "cuda", "cpu"]
    assert {"n_levels", "max_steps", "lambda_tv", "lambda_wd"} <= settings_unused_by("vanilla")
    assert not {"lr", "hidden_width", "n_frequencies"} & settings_unused_by("vanilla")
