"""Presets: functions that return the whole configuration that a run starts from. Imports nothing heavy.

`reference`, `stable_diffusion`, `dream_mini_cpu` and `dream_mini_gpu` are complete. `vanilla` and `dmtet` change one of
them for that backbone and for a mesh refinement. `choose_preset` puts them together for the typed settings.
"""

from collections.abc import Mapping
from typing import Any

from dream_fast.engine.config.guidances import (
    DREAM_MINI,
    GUIDANCES,
    STABLE_DIFFUSION,
    accept_latents,
    chosen_guidances,
    family_of,
    specs_of,
)
from dream_fast.engine.config.schedule import LinearSchedule
from dream_fast.engine.config.schema import Config, device_kind
from dream_fast.engine.config.sections import (
    CameraConfig,
    DMTetConfig,
    FieldConfig,
    GuidanceConfig,
    LossConfig,
    OptimConfig,
    OutputConfig,
    RenderConfig,
    RunConfig,
    ShadingConfig,
)

# Defaults of an objective where they are not the model's. The scales are those of the papers.
PAPER_GUIDANCE_SCALE = {"guidance_scale": 7.5}
OBJECTIVE_OVERRIDES: dict[str, dict[str, Any]] = {
    "csd": {"guidance_rescale": 0.0},  # the plain difference of two predictions
    "asd": PAPER_GUIDANCE_SCALE,
    "sdi": PAPER_GUIDANCE_SCALE,
}
# The vanilla backbone of stable-dreamfusion: its five layers, learning rate decay and normals.
VANILLA_OVERRIDES: dict[str, Any] = {
    "backbone": "vanilla",
    "hidden_layers": 4,
    "lr_decay": 0.1,
    "normals": "analytic",
}
# Values with which dream-mini's vanilla backbone and mesh refinements were tuned; those of its hash grid came later.
_AS_TUNED = {
    "progressive_level": False,
    "lr_finest": 1.0,
    "guidance_rescale": 0.5,
    "density_thresh": 10.0,
}
# dream-mini's on top of that. No occupancy grid cuts off thin haze, so softplus and its blob keep empty space empty
# from the start. The highest band is as fine as the small images. Those of a GPU have not been measured.
_MINI_VANILLA = (
    VANILLA_OVERRIDES
    | _AS_TUNED
    | {
        "n_frequencies": 6,
        "hidden_width": 64,
        "density_activation": "softplus",
        "blob_density": 30.0,
        "blob_radius": 0.3,
    }
)
MINI_VANILLA_OVERRIDES: dict[str, dict[str, Any]] = {
    "cpu": _MINI_VANILLA | {"w": 48, "h": 48, "W": 128, "H": 128, "num_steps": 32, "upsample_steps": 16},
    "cuda": _MINI_VANILLA | {"w": 64, "h": 64},
}
# A mesh refinement starts from a finished object: little noise, light on the shape, all sides.
DMTET_OVERRIDES: dict[str, Any] = {
    "dmtet": True,
    "latent_iter_ratio": 0.0,
    "albedo_iter_ratio": 0.0,
    "t_range": (0.02, 0.5),
    "progressive_view": False,
}
# dream-mini reads 128 x 128 pixels. The gradients of its objective are sums over an image, while the means of
# the two regularisers vanish: these weights make them about half as large. Its runs are short: at --lr the shape would
# move by no more than a pixel.
_MINI_DMTET = (
    DMTET_OVERRIDES
    | _AS_TUNED
    | {
        "dmtet_reso_scale": 2.0,
        "lambda_mesh_normal": 500.0,
        "lambda_mesh_laplacian": 1000.0,
        "lr_geo": 5e-3,
    }
)
MINI_DMTET_OVERRIDES: dict[str, dict[str, Any]] = {
    "cpu": _MINI_DMTET | {"iters": 300, "tet_grid_size": 64, "w": 80, "h": 80},
    "cuda": _MINI_DMTET,
}


def reference() -> Config:
    """Return stable-dreamfusion's values, which are the defaults of the sections, with dream-mini as the guidance.

    The EMA decay of 0.9995 a step is its 0.95 in 100 steps.
    """
    return Config(
        run=RunConfig(preset="reference"),
        camera=CameraConfig(),
        field=FieldConfig(),
        render=RenderConfig(),
        shading=ShadingConfig(),
        guidance=GuidanceConfig(),
        loss=LossConfig(),
        dmtet=DMTetConfig(),
        optim=OptimConfig(),
        output=OutputConfig(),
    )


def stable_diffusion() -> Config:
    """Return the configuration of Stable Diffusion, which starts from the reference's values."""
    model = STABLE_DIFFUSION.default_model
    return reference().override({"preset": "auto", "guidance": (STABLE_DIFFUSION.name,), **model})


def dream_mini_cpu() -> Config:
    """Return dream-mini's configuration on a CPU: a small field and small images, so that two cores take minutes."""
    return reference().override(
        dict(
            preset="auto",
            device="cpu",
            iters=750,
            radius_range=(3.0, 3.5),
            theta_range=(50.0, 95.0),
            fovy_range=(20.0, 26.0),
            default_fovy=23.0,
            default_polar=75.0,
            view_blend=20.0,
            w=72,
            h=72,
            W=192,
            H=192,
            eval_interval=2,
            n_levels=5,
            log2_hashmap_size=15,
            max_resolution=64,  # a cell is a pixel of the training images: finer ones hold noise alone
            hidden_width=32,
            hidden_layers=1,
            bg_radius=-1.0,
            blob_density=10.0,
            bound=0.6,
            max_steps=128,
            occupancy_resolution=64,
            density_thresh=2.0,  # at 10, edges were cut off along the cells of the occupancy grid, and thin parts lost
            latent_iter_ratio=0.0,
            albedo_iter_ratio=1.0,
            normal_epsilon=0.03,
            guidance_scale=LinearSchedule(
                0.0, 8.0, 4.0, 1.0
            ),  # a high scale finds the shape, a low one keeps colours natural
            guidance_rescale=0.8,
            t_range=(0.02, 0.98),
            t_anneal="square",
            lambda_opacity_entropy=30.0,
            lr=1e-3,
            lr_decay=0.3,
            lr_finest=0.3,
            progressive_level=True,
            ema_decay=0.99,
            dataset_size_test=48,
            mcubes_resolution=128,
            texture_resolution=1024,
        )
    )


def dream_mini_gpu() -> Config:
    """Return dream-mini's configuration on a GPU: a finer grid and larger images than on a CPU, in CUDA graphs."""
    return dream_mini_cpu().override(
        {
            "device": "cuda",
            "cuda_graph": True,
            "iters": 1500,
            "w": 128,
            "h": 128,
            "n_levels": 8,
            "W": 256,
            "H": 256,
            "occupancy_resolution": 128,
            "dataset_size_test": 100,
            "mcubes_resolution": 192,
        }
    )


def vanilla(config: Config) -> Config:
    """Return `config` for the vanilla backbone."""
    kind = _mini_kind(config)
    overrides = VANILLA_OVERRIDES if kind is None else MINI_VANILLA_OVERRIDES[kind]
    return config.override({"cuda_graph": False, **overrides})


def dmtet(config: Config) -> Config:
    """Return `config` for a mesh refinement."""
    kind = _mini_kind(config)
    overrides = DMTET_OVERRIDES if kind is None else MINI_DMTET_OVERRIDES[kind]
    return config.override({"cuda_graph": False, **overrides})


def _mini_kind(config: Config) -> str | None:
    """Return the kind of device of a configuration that started from dream-mini's presets, else None."""
    is_mini = config.run.preset == "auto" and family_of(specs_of(config.guidance.guidance)) == DREAM_MINI.family
    return device_kind(config.run.device) if is_mini else None


def choose_preset(typed: Mapping[str, Any], device: str) -> Config:
    """Return the configuration that the typed settings start from, on `device` ("cpu", "cuda" or "cuda:N").

    Only the guidances, their model settings, `preset`, `backbone`, `dmtet` and `objective` of `typed` matter.
    """
    specs = chosen_guidances(typed)
    if typed.get("preset") == "reference":
        config = reference().override({"device": device})
    elif family_of(specs) == DREAM_MINI.family:
        config = dream_mini_gpu() if device_kind(device) == "cuda" else dream_mini_cpu()
    else:
        config = stable_diffusion()
    models: dict[str, Any] = dict.fromkeys(name for spec in GUIDANCES.values() for name in spec.model_settings)
    for spec in specs:
        if not typed.keys() & set(spec.model_settings):
            models |= spec.default_model
    config = config.override({"guidance": tuple(spec.name for spec in specs), **models})
    if typed.get("backbone") == "vanilla":
        config = vanilla(config)
    if typed.get("dmtet"):
        config = dmtet(config)
    overrides = dict(OBJECTIVE_OVERRIDES.get(typed.get("objective", ""), {}))
    if not accept_latents(specs):  # as the reference's --IF
        overrides["latent_iter_ratio"] = 0.0
    return config.override(overrides)
