"""Compatibility with stable-dreamfusion: its flags, those that are refused with the reason, and differences.

A command of the reference has the same effect here, or is refused. Nothing is ignored silently.
"""

_IMAGE = "image conditioning is not supported; a run starts from a prompt"
_VIEWER = "there is no viewer; look at results/ or open mesh/mesh.glb"

UNSUPPORTED_FLAGS: dict[str, str] = {
    "--dataset_size_train": "an epoch is always 100 steps; set --iters",
    "--dont_override_stuff": "typed settings are never overridden",
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
    "--max_ray_batch": "memory is bounded without it",
    "--max_spp": _VIEWER,
    "--radius": _VIEWER + " (the output camera has --default_radius)",
    "--taichi_ray": "Taichi is not used; rays always march through the occupancy grid",
    "--zero123_ckpt": _IMAGE,
    "--zero123_config": _IMAGE,
    "--zero123_grad_scale": _IMAGE,
}

UNSUPPORTED_VALUES: dict[tuple[str, str], str] = {
    ("--backbone", "grid_taichi"): "that extension is not used; use --backbone grid",
    ("--backbone", "grid_tcnn"): "that extension is not used; use --backbone grid",
    ("--ckpt", "best"): "every checkpoint here holds the averaged weights; use --ckpt latest",
    ("--ckpt", "latest_model"): "a checkpoint is always resumed whole; use --ckpt latest",
    ("--guidance", "zero123"): _IMAGE,
}

# Flags of earlier versions that are gone, with their replacement.
RENAMED_FLAGS: dict[str, str] = {
    "--guidance_scale_end": "--guidance_scale takes a schedule, as in --guidance_scale 0.0:8:4:1.0",
}


# Every flag of stable-dreamfusion's main command.
REFERENCE_FLAGS = """
    --file --text --negative -O -O2 --test --six_views --eval_interval --test_interval --workspace --seed --image
    --image_config --known_view_interval --IF --guidance --guidance_scale --save_mesh --mcubes_resolution
    --decimate_target --dmtet --tet_grid_size --init_with --lock_geo --perpneg --negative_w --front_decay_factor
    --side_decay_factor --iters --lr --ckpt --cuda_ray --taichi_ray --max_steps --num_steps --upsample_steps
    --update_extra_interval --max_ray_batch --latent_iter_ratio --albedo_iter_ratio --min_ambient_ratio
    --textureless_ratio --jitter_pose --jitter_center --jitter_target --jitter_up --uniform_sphere_rate --grad_clip
    --grad_clip_rgb --bg_radius --density_activation --density_thresh --blob_density --blob_radius --backbone --optim
    --sd_version --hf_key --fp16 --vram_O --w --h --known_view_scale --known_view_noise_scale --dmtet_reso_scale
    --batch_size --bound --dt_gamma --min_near --radius_range --theta_range --phi_range --fovy_range --default_radius
    --default_polar --default_azimuth --default_fovy --progressive_view --progressive_view_init_ratio
    --progressive_level --angle_overhead --angle_front --t_range --dont_override_stuff --lambda_entropy --lambda_opacity
    --lambda_orient --lambda_tv --lambda_wd --lambda_mesh_normal --lambda_mesh_laplacian --lambda_guidance --lambda_rgb
    --lambda_mask --lambda_normal --lambda_depth --lambda_2d_normal_smooth --lambda_3d_normal_smooth --save_guidance
    --save_guidance_interval --gui --W --H --radius --fovy --light_theta --light_phi --max_spp --zero123_config
    --zero123_ckpt --zero123_grad_scale --dataset_size_train --dataset_size_valid --dataset_size_test --exp_start_iter
    --exp_end_iter
""".split()


# Flags of the reference that work differently.
DIFFERENCES = {
    "--angle_front": "changes the prompt, only where it is given; the reference ignores it",
    "--angle_overhead": "changes the prompt; the reference ignores it",
    "--IF": "the same as IF in --guidance; --if_key chooses a model other than XL",
    "--ckpt": "latest, scratch or a path",
    "--cuda_ray": "always on with a grid; the vanilla backbone has no occupancy grid, so it is refused there",
    "--dmtet": "also from a sphere; its checkpoints can be resumed, tested and exported as any other",
    "--file": "quotes and # comments work",
    "--fp16": "on a GPU; a CPU with AMX runs in bf16, others in fp32",
    "--guidance": "dream-mini needs no download; with clip the prompt follows the view, so the back counts as much as "
    "the front",
    "--init_with": "the folder of a run, its checkpoint (.safetensors), or a mesh file; no .pth",
    "--jitter_pose": "the prompt follows the moved camera, whose axes stay orthogonal",
    "--lambda_entropy": "an alias of --lambda_opacity_entropy, the entropy of the opacity of rays; the reference's, of "
    "the weights of samples, is --lambda_entropy_weights",
    "--lambda_orient": "a mean over samples",
    "--max_steps": "refused with --backbone vanilla, like every setting of the grids",
    "--min_near": "limits the samples of rays; it has no effect in the reference",
    "--num_steps": "only with --backbone vanilla: the grids always march through the occupancy grid",
    "--save_guidance": "the one-step estimate is correct at every t; the reference uses single scheduler steps",
    "--save_mesh": "mesh.glb, and mesh.obj with mesh.mtl, mesh.png and mesh_normal.png",
    "--sd_version": "2.1 where Stable Diffusion is chosen without a version; from hub names that still exist",
    "--seed": "drawn when not given, and stored in manifest.json",
    "--tet_grid_size": "any even number: the grid is computed, not read; 128 has 129 layers of vertices across",
    "--test_interval": "results/turntable_step_*.mp4",
    "--upsample_steps": "only with --backbone vanilla",
    "--vram_O": "xformers attention, VAE in slices, gradient checkpointing in its encoder; no offloading to the CPU",
}
