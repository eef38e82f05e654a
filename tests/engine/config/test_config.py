"""Settings: their checks, the order in which defaults and typed values count, and saving."""

import dataclasses
import json

import pytest

from dream_fast.engine.config.configure import configure
from dream_fast.engine.config.presets import dream_mini_cpu, dream_mini_gpu, reference, stable_diffusion
from dream_fast.engine.config.schema import Config, settings, settings_unused_by
from dream_fast.engine.config.sections import BACKBONES, DEFAULT_VIEW, CameraConfig, OptimConfig
from dream_fast.engine.config.validate import check_typed, validate
from dream_fast.engine.errors import UserError

# What chooses a model.
SD = {"dream-mini": {}, "sd": {"guidance": ("SD",)}}
DEFAULTS = (reference, stable_diffusion, dream_mini_cpu, dream_mini_gpu)

# What a run of stable-dreamfusion starts from when nothing is typed.
REFERENCE = dict(
    negative="",
    workspace="workspace",
    seed=None,
    iters=10000,
    exp_start_iter=None,
    exp_end_iter=None,
    ckpt="latest",
    radius_range=(3.0, 3.5),
    theta_range=(45, 105),
    phi_range=(-180, 180),
    fovy_range=(10, 30),
    uniform_sphere_rate=0,
    progressive_view=False,
    progressive_view_init_ratio=0.2,
    jitter_pose=False,
    jitter_center=0.2,
    jitter_target=0.2,
    jitter_up=0.02,
    angle_overhead=30,
    angle_front=None,  # 60 there, and read by nothing
    w=64,
    h=64,
    W=800,
    H=800,
    batch_size=1,
    default_radius=3.2,
    default_polar=90,
    default_azimuth=0,
    default_fovy=20,
    backbone="grid",
    density_activation="exp",
    blob_density=5,
    blob_radius=0.2,
    bg_radius=1.4,
    bound=1,
    max_steps=1024,
    dt_gamma=0,
    min_near=0.01,
    density_thresh=10,
    update_extra_interval=16,
    latent_iter_ratio=0.2,
    albedo_iter_ratio=0,
    min_ambient_ratio=0.1,
    textureless_ratio=0.2,
    progressive_level=False,
    guidance_scale=100,
    t_range=(0.02, 0.98),
    lambda_guidance=1,
    lambda_opacity_entropy=1e-3,
    lambda_opacity=0,
    lambda_orient=1e-2,
    lambda_tv=0,
    lambda_wd=0,
    lambda_2d_normal_smooth=0,
    lambda_3d_normal_smooth=0,
    grad_clip=-1,
    grad_clip_rgb=-1,
    optim="adan",
    lr=1e-3,
    eval_interval=1,
    dataset_size_valid=8,
    dataset_size_test=100,
    mcubes_resolution=256,
)


def flat(config: Config) -> dict:
    return {field.name: getattr(getattr(config, section.name), field.name) for section, field in settings()}


def test_setting_names_unique():
    """Names of settings are unique, and each has a help."""
    names = [field.name for _, field in settings()]
    assert len(set(names)) == len(names)
    assert all(field.metadata["help"] for _, field in settings())


def test_reference_values():
    """The reference preset has the reference's values."""
    preset = flat(configure({"preset": "reference"}, "cpu"))
    assert {name: preset[name] for name in REFERENCE} == REFERENCE


@pytest.mark.parametrize("defaults", DEFAULTS)
def test_defaults_survive_json(defaults):
    config = defaults()
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_typed_over_presets():
    """Typed settings win over the model and the device."""
    cpu, cuda = configure({}, "cpu"), configure({}, "cuda")
    assert cpu.output != cuda.output
    assert (cpu.run.device, cuda.run.device) == ("cpu", "cuda")
    assert cpu.run.iters == dream_mini_cpu().run.iters != reference().run.iters
    typed = configure({"iters": 7, "lr": 0.5, "W": 33}, "cpu")
    assert (typed.run.iters, typed.optim.lr, typed.camera.W) == (7, 0.5, 33)
    assert typed.camera.H == cpu.camera.H
    assert configure({"preset": "reference", "iters": 7}, "cuda").run.iters == 7


def test_vanilla_defaults():
    """The vanilla backbone has its own defaults under every preset."""
    for typed, model, device in (
        ({"preset": "reference"}, "dream-mini", "cpu"),
        ({}, "sd", "cuda"),
        ({}, "dream-mini", "cpu"),
        ({}, "dream-mini", "cuda"),
    ):
        grid, vanilla = (configure(SD[model] | typed | {"backbone": name}, device) for name in ("grid", "vanilla"))
        assert (vanilla.field.hidden_layers, vanilla.optim.lr_decay, vanilla.render.normals) == (4, 0.1, "analytic")
        if "preset" in typed or model == "sd":
            assert (grid.field.hidden_layers, grid.optim.lr_decay) == (2, 1.0)
            expected = {"backbone", "hidden_layers", "lr_decay", "normals"}
            assert {name for name, value in flat(vanilla).items() if value != flat(grid)[name]} == expected
            assert (vanilla.render.num_steps, vanilla.render.upsample_steps, vanilla.field.n_frequencies) == (
                64,
                32,
                12,
            )
    typed = {"backbone": "vanilla", "hidden_layers": 1, "lr_decay": 0.5, "num_steps": 7}
    config = configure(typed, "cpu")
    assert (config.field.hidden_layers, config.optim.lr_decay, config.render.num_steps) == (1, 0.5, 7)


def test_check_typed_other_backbone():
    assert (
        settings_unused_by("grid")
        == settings_unused_by("grid_torch")
        == {"n_frequencies", "num_steps", "upsample_steps"}
    )
    for backbone in BACKBONES:
        for name in settings_unused_by(backbone):
            with pytest.raises(UserError, match=f"^--{name} has no meaning with --backbone {backbone}: "):
                configure({"backbone": backbone, name: flat(reference())[name]}, "cpu")


def test_table_regularisers_need_table():
    """Regularisers of the hash table need a hash table."""
    for name in ("lambda_tv", "lambda_wd"):
        with pytest.raises(UserError, match="apply to the hash table, which --backbone vanilla does not have"):
            validate(reference().override({"backbone": "vanilla", name: 0.1}))
        validate(reference().override({"backbone": "grid_torch", name: 0.1}))


def test_phase_ends_outside_run():
    """The phases may end after the run or start late in it."""
    run = configure({"iters": 5, "exp_end_iter": 9, "exp_start_iter": 8}, "cpu").run
    assert (run.exp_start_iter, run.exp_end_iter) == (8, 9)
    assert configure({"iters": 5, "exp_start_iter": 4}, "cpu").run.exp_end_iter is None


def test_half_precision_is_a_gpus():
    assert all(configure({"fp16": True}, device).run.fp16 for device in ("cuda", "cpu"))


def test_which_model_guides():
    assert configure({}, "cpu").guidance.guidance == ("dream-mini",)
    named = {"guidance": ("SD",)}
    config = configure(named, "cpu")
    assert (config.guidance.sd_version, config.guidance.guidance) == ("2.1", ("SD",))
    keyed = {"hf_key": "folder"}
    config = configure(keyed, "cpu")
    assert (config.guidance.hf_key, config.guidance.sd_version) == ("folder", None)
    assert config.guidance.guidance == ("SD",)
    assert config.optim == stable_diffusion().optim


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ({"hf_key": "a", "sd_version": "2.1"}, "give one of them"),
        ({"guidance": ("dream-mini",), "hf_key": "a"}, "--guidance dream-mini does not name: leave one out"),
        ({"guidance": ("IF", "clip"), "sd_version": "1.5"}, "--sd_version names a model for --guidance SD, which"),
        ({"if_key": "a"}, "--if_key names a model for --guidance IF, which --guidance dream-mini does not name"),
        ({"guidance": ("SD",), "clip_key": "a"}, "--clip_key names a model for --guidance clip"),
        ({"guidance": ("SD", "dream-mini")}, "dream-mini cannot be combined with SD: they need other settings"),
        ({"guidance": ("IF", "SD", "dream-mini")}, "dream-mini cannot be combined with IF and SD"),
        ({"guidance": ("clip",), "t_range": (0.1, 0.5)}, "--t_range has no meaning with --guidance clip alone"),
    ],
)
def test_two_models_at_once_are_refused(typed, words):
    with pytest.raises(UserError, match=words):
        check_typed(typed)


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        ({"iters": 0}, "--iters must be at least 1, not 0"),
        ({"iters": 2.5}, "--iters takes a whole number, not 2.5"),
        ({"batch_size": True}, "--batch_size takes a whole number, not True"),
        ({"save_mesh": 1}, "--save_mesh takes true or false, not 1"),
        ({"text": 3}, "--text takes text, not 3"),
        ({"text": " "}, "--text is empty"),
        ({"lr": float("nan")}, "--lr must be a finite number, not nan"),
        ({"lr": 0.0}, "--lr must be more than 0, not 0"),
        ({"bound": float("inf")}, "--bound must be a finite number, not inf"),
        ({"t_range": (0.9, 0.1)}, "--t_range is reversed: its lower end 0.9 is more than its upper end 0.1"),
        ({"t_range": (0.1, 1.5)}, "--t_range must be at most 1, not 1.5"),
        ({"t_range": (0.1, float("nan"))}, "--t_range must be a finite number, not nan"),
        ({"radius_range": (3.0,)}, r"--radius_range takes two numbers, not \(3.0,\)"),
        ({"fovy_range": (20.0, 180.0)}, "--fovy_range must be less than 180, not 180"),
        ({"angle_front": 0.0}, "--angle_front must be more than 0, not 0"),
        ({"angle_front": 181.0}, "--angle_front must be at most 180, not 181"),
        ({"optim": "sgd"}, "--optim is one of adan, adam, not 'sgd'"),
        ({"guidance": ()}, "--guidance needs at least one value"),
        ({"guidance": ("zero",)}, "--guidance is one of dream-mini, SD, IF, clip, not 'zero'"),
        ({"guidance": ("SD", "SD")}, "--guidance names SD twice"),
        (
            {"guidance": ("SD", "IF")},
            "--latent_iter_ratio 0.2 cannot be combined with --guidance SD IF, which cannot guide latents: "
            "leave it out",
        ),
        (
            {"guidance": ("IF",), "latent_iter_ratio": 0.0, "attention": "cudnn"},
            "--attention cudnn is for Stable Diffusion: the models of --guidance IF keep their own",
        ),
        (
            {"guidance": ("SD", "clip"), "cuda_graph": True},
            "--cuda_graph replays steps of one diffusion model, not those of --guidance SD clip: leave it out",
        ),
        (
            {"guidance": ("clip",), "latent_iter_ratio": 0.0, "save_guidance": True},
            "--save_guidance saves latents of a diffusion model, and --guidance clip has none",
        ),
        ({"ema_decay": 1.0}, "--ema_decay must be less than 1, not 1"),
        ({"max_resolution": 8}, "--max_resolution 8 is less than --base_resolution 16: the levels .* coarse to fine"),
        ({"max_resolution": 40, "base_resolution": 41}, "--max_resolution 40 is less than --base_resolution 41: .*"),
        ({"occupancy_resolution": 65}, "--occupancy_resolution must be even, not 65"),
        ({"exp_start_iter": -1}, "--exp_start_iter must be at least 0, not -1"),
        ({"exp_end_iter": 0}, "--exp_end_iter must be at least 1, not 0"),
        ({"exp_start_iter": 9, "exp_end_iter": 9}, "--exp_end_iter must be more than --exp_start_iter 9, not 9"),
        ({"exp_start_iter": 9, "iters": 9}, "--exp_start_iter must be less than --iters 9, where the phases .* not 9"),
        ({"itres": 5}, "unknown setting: itres"),
    ],
)
def test_a_bad_value_is_refused_by_name(typed, sentence):
    with pytest.raises(UserError, match=f"^{sentence}$"):
        validate(reference().override(typed))


def test_sections_checked_and_frozen():
    """Sections made in Python are checked and cannot be changed."""
    with pytest.raises(UserError, match="--lr must be more than 0"):
        OptimConfig(lr=-1.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        OptimConfig().lr = 3.0
    assert CameraConfig(theta_range=(60, 60)).theta_range == (60, 60)


def test_from_dict_other_settings():
    """A saved configuration of another version is refused."""
    data = reference().to_dict()
    data["run"]["itres"] = 3
    del data["optim"]["lr"]
    with pytest.raises(UserError, match="optim.lr, run.itres"):
        Config.from_dict(data)
    with pytest.raises(UserError, match="map sections"):
        Config.from_dict([1, 2])


def test_what_makes_it_another_run():
    base = reference()
    free = base.override(dict(iters=5, workspace="w", W=9, H=9, vram_O=True, save_mesh=True, dataset_size_test=3))
    free = free.override(dict(attention="sdpa", compile=True))
    assert base.differences(free) == []
    assert base.differences(base.override(dict(lr=0.5, text="a cat"))) == [
        "--text None, not a cat",
        "--lr 0.001, not 0.5",
    ]


def test_differences_progressive_view():
    """The output camera shapes a run whose view starts there."""
    base = reference().override(dict(progressive_view=True))
    moved = base.override(dict(default_radius=4, default_polar=60, default_azimuth=10, default_fovy=30, W=9))
    assert [part.split()[0] for part in base.differences(moved)] == [f"--{name}" for name in DEFAULT_VIEW]
    assert base.differences(moved.override({"test": True})) == []
    assert reference().differences(reference().override(dict(default_polar=60))) == []


def test_compiled_kernels_do_not_repeat_bits():
    with pytest.raises(UserError, match="--compile cannot be combined with --deterministic"):
        reference().override(dict(compile=True, deterministic=True))


@pytest.mark.parametrize("other", [{"progressive_view": True}, {"dmtet": True}])
def test_cuda_graph_refusals(other):
    """A CUDA graph needs steps with the same launches."""
    flag = f"--{next(iter(other))}"
    with pytest.raises(UserError, match=f"--cuda_graph cannot be combined with {flag}"):
        validate(reference().override({"cuda_graph": True, **other}))


@pytest.mark.parametrize(
    ("typed", "model", "device", "graph"),
    [
        ({}, "dream-mini", "cuda", True),
        ({}, "dream-mini", "cpu", False),
        ({}, "sd", "cuda", False),
        ({"cuda_graph": True}, "sd", "cuda", True),
        ({"cuda_graph": False}, "dream-mini", "cuda", False),
        ({"deterministic": True}, "dream-mini", "cuda", False),
        ({"lambda_tv": 0.1}, "dream-mini", "cuda", True),
        ({"progressive_view": True}, "dream-mini", "cuda", False),
        ({"backbone": "vanilla"}, "dream-mini", "cuda", False),
        ({"backbone": "grid_torch"}, "dream-mini", "cuda", False),
        ({"guidance": ("dream-mini", "clip")}, "dream-mini", "cuda", False),
        ({"backbone": "vanilla", "cuda_graph": True}, "dream-mini", "cuda", True),
    ],
)
def test_cuda_graph_default(typed, model, device, graph):
    """Steps are replayed by default where that is faster."""
    assert configure(SD[model] | typed, device).run.cuda_graph is graph
