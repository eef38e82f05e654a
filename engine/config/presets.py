"""The configurations that a run starts from: the reference's, Stable Diffusion's, and dream-mini's for a CPU and a GPU.

`resolve` puts together what a run computes with. Nothing heavy is imported, as in `config`.
"""

from collections.abc import Mapping
from typing import Any

from dream_fast.engine.config.schedule import LinearSchedule
from dream_fast.engine.config.schema import Config, device_kind, settings_unused_by
from dream_fast.engine.errors import UserError

# What a score wants instead of the model's own values. The scales are those of the papers.
PAPER_GUIDANCE_SCALE = {"guidance_scale": 7.5}
SCORE_DEFAULTS: dict[str, dict[str, Any]] = {
    "csd": {"guidance_rescale": 0.0},  # the plain difference of two predictions
    "asd": PAPER_GUIDANCE_SCALE,
    "sdi": PAPER_GUIDANCE_SCALE,
}
# The vanilla backbone of stable-dreamfusion: its five layers, its learning rate's end, its normals.
VANILLA_DEFAULTS: dict[str, Any] = {"hidden_layers": 4, "lr_decay": 0.1, "normals": "analytic"}
# dream-mini's on top of that. Without an occupancy grid to cut off thin haze, softplus and its blob leave empty space
# empty from the start; the bands end where the small pictures do. Those of a GPU have not been measured.
_MINI_VANILLA = {
    "n_frequencies": 6,
    "hidden_width": 64,
    "density_activation": "softplus",
    "blob_density": 30.0,
    "blob_radius": 0.3,
}
MINI_VANILLA: dict[str, dict[str, Any]] = {
    "cpu": _MINI_VANILLA | {"w": 48, "h": 48, "W": 128, "H": 128, "num_steps": 32, "upsample_steps": 16},
    "cuda": _MINI_VANILLA | {"w": 64, "h": 64},
}
# A mesh refinement starts from what is there: little noise, light on the shape, all sides.
DMTET_DEFAULTS: dict[str, Any] = {
    "dmtet": True,
    "latent_iter_ratio": 0.0,
    "albedo_iter_ratio": 0.0,
    "t_range": (0.02, 0.5),
    "progressive_view": False,
}
# dream-mini's: it looks at 128 x 128 pixels. Beside the gradients of its score, sums over a picture, the means of the
# two regularisers are nothing: with these weights they are about half as large. Its runs are short: at --lr the shape
# would move by no more than a pixel.
_MINI_DMTET = DMTET_DEFAULTS | {
    "dmtet_reso_scale": 2.0,
    "lambda_mesh_normal": 500.0,
    "lambda_mesh_laplacian": 1000.0,
    "lr_geo": 5e-3,
}
MINI_DMTET: dict[str, dict[str, Any]] = {
    "cpu": _MINI_DMTET | {"iters": 300, "tet_grid_size": 64},
    "cuda": _MINI_DMTET,
}
# What only a diffusion model reads.
DIFFUSION_SETTINGS = (
    "negative score loss_space inversion_steps guidance_scale t_range t_anneal guidance_rescale clip_grad_latent "
    "perpneg negative_w front_decay_factor side_decay_factor compile"
).split()
# Why a setting is refused: with a grid, and with the vanilla backbone.
REFUSAL_BY_BACKBONE = (
    "its rays march through the occupancy grid, where --max_steps sets the samples of a ray",
    "that has no hash grid, and its rays take --num_steps and --upsample_steps without an occupancy grid",
)


def reference_defaults() -> Config:
    """stable-dreamfusion's values; its EMA decay of 0.95 in 100 steps is 0.9995 a step."""
    return Config()


def sd_defaults() -> Config:
    """Stable Diffusion starts from the reference's values."""
    return reference_defaults()


def mini_cpu_defaults() -> Config:
    """dream-mini on a CPU: a small field and small pictures, so that two cores finish in minutes."""
    return Config().override(
        dict(
            iters=750,
            radius_range=(3.0, 3.5),
            theta_range=(50.0, 95.0),
            fovy_range=(20.0, 26.0),
            default_fovy=23.0,
            default_polar=75.0,
            view_blend=20.0,
            w=80,
            h=80,
            W=192,
            H=192,
            eval_interval=2,
            n_levels=8,
            log2_hashmap_size=15,
            max_resolution=128,
            hidden_width=32,
            hidden_layers=1,
            bg_radius=-1.0,
            blob_density=10.0,
            bound=0.6,
            max_steps=128,
            occupancy_resolution=64,
            latent_iter_ratio=0.0,
            albedo_iter_ratio=1.0,
            normal_epsilon=0.03,
            guidance_scale=LinearSchedule(0.0, 8.0, 4.0, 1.0),  # strong finds the shape, weak keeps colours natural
            guidance_rescale=0.5,
            t_range=(0.02, 0.98),
            t_anneal="square",
            lambda_opacity_entropy=30.0,
            lr=1e-3,
            lr_decay=0.3,
            ema_decay=0.99,
            dataset_size_test=48,
            mcubes_resolution=128,
            texture_resolution=1024,
        )
    )


def mini_cuda_defaults() -> Config:
    """dream-mini on a GPU: the same run, with a finer grid and larger pictures."""
    return mini_cpu_defaults().override(
        dict(
            iters=1000,
            w=128,
            h=128,
            W=256,
            H=256,
            occupancy_resolution=128,
            dataset_size_test=100,
            mcubes_resolution=192,
        )
    )


def expand_shortcuts(typed: Mapping[str, Any]) -> dict[str, Any]:
    """What was typed, with ``-O``, ``-O2`` and ``--IF`` (names O, O2 and IF) replaced by what they stand for.

    They never overrule a setting that was typed as well, but ``--IF`` takes the place of SD in --guidance. As in
    stable-dreamfusion ``-O2`` does nothing beside ``-O``. UserError: marching through an occupancy grid for a backbone
    that has none; nothing that IF could replace.
    """
    values = {name: value for name, value in typed.items() if name not in ("O", "O2", "IF")}
    meant: dict[str, Any] = {}
    if typed.get("O"):
        meant = {"fp16": True}
    elif typed.get("O2"):
        meant = {"fp16": True, "backbone": "vanilla"}
        if not typed.get("test"):  # the run that is looked at has its own
            meant["progressive_level"] = True
    values = meant | values
    if typed.get("IF"):
        named = values.get("guidance", ("SD",))
        if not {"SD", "IF"} & set(named):
            words = f"--guidance {' '.join(named)}"
            raise UserError(f"--IF takes the place of SD, which {words} does not name: name IF there")
        values["guidance"] = tuple(dict.fromkeys("IF" if name == "SD" else name for name in named))
    for name, flag in (("O", "-O"), ("cuda_ray", "--cuda_ray")):
        if typed.get(name) and values.get("backbone") == "vanilla":
            raise UserError(
                f"{flag} marches through the occupancy grid, which the vanilla backbone has not; use --fp16"
            )
    return values


def chosen_model(typed: Mapping[str, Any]) -> str:
    """Whose defaults the typed settings ask for: "dream-mini" where it guides, else "sd".

    UserError: models that contradict each other, and settings that none of them reads.
    """
    sources = [name for name in ("hf_key", "sd_version") if name in typed]
    if len(sources) > 1:
        raise UserError("--hf_key and --sd_version both name a model: give one of them")
    named = typed.get("guidance", ("SD",) if sources else ("dream-mini",))
    keys = {name: "SD" for name in sources} | {"if_key": "IF", "clip_key": "clip"}
    for key, model in keys.items():
        if key in typed and model not in named:
            words = f"--guidance {' '.join(named)}"
            raise UserError(f"--{key} is a model for --guidance {model}, which {words} does not name: leave one out")
    if "dream-mini" in named and (others := {"SD", "IF"} & set(named)):
        raise UserError(
            f"--guidance dream-mini does not go with {' and '.join(sorted(others))}: they need other settings of a run"
        )
    if named == ("clip",):
        for name in typed:
            if name in DIFFUSION_SETTINGS:
                raise UserError(f"--{name} has no meaning with --guidance clip alone: only diffusion models read it")
    return "dream-mini" if "dream-mini" in named else "sd"


def _check_backbone(typed: Mapping[str, Any]) -> None:
    """UserError for a typed setting that the run's backbone does not read."""
    backbone = typed.get("backbone", Config().field.backbone)
    for name in typed:
        if name in settings_unused_by(backbone):
            raise UserError(
                f"--{name} has no meaning with --backbone {backbone}: {REFUSAL_BY_BACKBONE[backbone == 'vanilla']}"
            )


def resolve(typed: Mapping[str, Any], model: str, device: str) -> Config:
    """The configuration of a run: defaults of the model and the device, then the preset, then what the user typed.

    typed: values by flag name, only those that were typed. model: "dream-mini" or "sd" (:func:`chosen_model`).
    device: "cpu", "cuda" or "cuda:N", where the run really takes place. The seed stays None when none was typed: it
    is drawn when a new run starts.
    """
    kind = device_kind(device)
    if model not in ("dream-mini", "sd") or kind not in ("cpu", "cuda"):
        raise ValueError(f"resolve: model {model!r} must be dream-mini or sd, device {device!r} cpu or cuda")
    vanilla, mesh = VANILLA_DEFAULTS, DMTET_DEFAULTS
    if typed.get("preset") == "reference":
        base = reference_defaults()
    elif model == "sd":
        base = sd_defaults()
    else:
        base = mini_cuda_defaults() if kind == "cuda" else mini_cpu_defaults()
        vanilla, mesh = vanilla | MINI_VANILLA[kind], MINI_DMTET[kind]
    if typed.get("backbone") == "vanilla":
        base = base.override(vanilla)
    if typed.get("dmtet"):
        base = base.override(mesh)
    _check_backbone(typed)
    values = {**typed, "device": device}
    if kind == "cuda" and model == "dream-mini":
        # Replayed, two runs were not the same bit for bit; and it was measured with this backbone alone.
        plain = typed.get("backbone", "grid") == "grid" and not typed.get("deterministic")
        plain = plain and len(typed.get("guidance", ("dream-mini",))) == 1
        values.setdefault("cuda_graph", plain and not base.override(typed).graph_breaking_flags())
    for name, value in SCORE_DEFAULTS.get(typed.get("objective"), {}).items():
        values.setdefault(name, value)
    if model == "sd":
        named = values.setdefault("guidance", ("SD",))
        if "SD" in named and "hf_key" not in typed:
            values.setdefault("sd_version", "2.1")
        if "SD" not in named or "IF" in named:  # nothing to show latents to, as in the reference's --IF
            values.setdefault("latent_iter_ratio", 0.0)
    return base.override(values)
