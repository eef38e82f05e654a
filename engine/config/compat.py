"""Flags and values of stable-dreamfusion that this program does not do, each with the reason that the user is told.

Refusing is better than ignoring: a command moved over from there either means the same here or says why not.
"""

_IMAGE = "a run starts from a prompt here; image conditioning is not there yet"
_VIEWER = "there is no viewer; look at results/ or open mesh/mesh.glb"

REFUSED_FLAGS: dict[str, str] = {
    "--dataset_size_train": "an epoch is always 100 steps; set --iters",
    "--dont_override_stuff": "nothing that you type is overridden",
    "--fovy": _VIEWER + " (the output camera has --default_fovy)",
    "--gui": _VIEWER,
    "--image": _IMAGE,
    "--image_config": _IMAGE,
    "--known_view_interval": _IMAGE,
    "--known_view_noise_scale": _IMAGE,
    "--known_view_scale": _IMAGE,
    "--lambda_depth": _IMAGE,
    "--lambda_mask": _IMAGE,
    "--lambda_normal": _IMAGE,
    "--lambda_rgb": _IMAGE,
    "--light_phi": _VIEWER,
    "--light_theta": _VIEWER,
    "--max_ray_batch": "it never did anything; memory is bounded without it",
    "--max_spp": _VIEWER,
    "--radius": _VIEWER + " (the output camera has --default_radius)",
    "--taichi_ray": "that is another extension's marching; ours is always on",
    "--zero123_ckpt": _IMAGE,
    "--zero123_config": _IMAGE,
    "--zero123_grad_scale": _IMAGE,
}

REFUSED_VALUES: dict[tuple[str, str], str] = {
    ("--backbone", "grid_taichi"): "that is another extension's grid; use --backbone grid",
    ("--backbone", "grid_tcnn"): "that is another extension's grid; use --backbone grid",
    ("--ckpt", "best"): "every checkpoint here holds the averaged weights; use --ckpt latest",
    ("--ckpt", "latest_model"): "a checkpoint is always taken up whole; use --ckpt latest",
    ("--guidance", "zero123"): _IMAGE,
}

# Flags that earlier versions had, with what does the same now.
RENAMED_FLAGS: dict[str, str] = {
    "--guidance_scale_end": "--guidance_scale takes a schedule, as in --guidance_scale 0.0:8:4:1.0",
}
