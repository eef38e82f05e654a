"""Flags and words of other programs, each with its equivalent here.

The flags are those of earlier versions of stable-dreamfusion, threestudio, nerfstudio, the scripts of diffusers, and
AUTOMATIC1111's and CompVis's programs. A name is looked up without its dashes, in lower case, with `_` instead of `-`
(`plain_name`). Imports nothing heavy.
"""

_PROMPT = "use --text 'a hamburger' for the prompt"
_NEGATIVE = "use --negative 'blurry' for the negative prompt"
_STEPS = "use --iters N for the optimisation steps; no image is sampled, so there is no other number of steps"
_SCALE = "use --guidance_scale X for the scale of classifier-free guidance"
_FOLDER = "use --workspace FOLDER for everything that a run writes; with --test, --output FOLDER writes elsewhere"
_RESUME = (
    "repeat the command with the same --workspace to resume from its last checkpoint; --ckpt PATH names another one"
)
_AFRESH = "use --ckpt scratch to replace the run in the workspace"
_GPU = "use --device cuda:1 for the second GPU; a run uses one GPU"
_CPU = "use --device cpu to run on the CPU"
_MESH = "use --save_mesh to write mesh/mesh.glb and mesh/mesh.obj with their textures at the end of a run"
_TEST = "use --test --workspace FOLDER to write the outputs of a finished run again"
_LORA = (
    "a LoRA cannot be added; merge it into the weights with diffusers (load_lora_weights, fuse_lora, save_pretrained) "
    "and name that folder with --hf_key"
)
_EMBEDDING = "textual inversions cannot be added; describe in words what they mean"
_CONDITION = "a run starts from a prompt alone; images and maps cannot condition it"
_MODEL = "use --hf_key FOLDER_OR_HUB_NAME for a Stable Diffusion model, or --sd_version 2.1"
_OTHER_MODEL = "name a model by --hf_key FOLDER_OR_HUB_NAME; docs/image_models.md lists those that can guide"
_HALF = "use -O for half precision"
_WHOLE = "single precision is the default: leave out -O and --fp16"
_MEMORY = "use --vram_O, or a smaller --w and --h, to save memory"
_TRAIN_SIZE = "use --w and --h for the training renders, --W and --H for the output images"
_FACES = "prompts follow the view; --perpneg and --text_back 'a hamburger from behind' help against several faces"
_VIEWS = "prompts follow the view; --text_front, --text_side and --text_back replace the prompt of one side"
_BATCH = "use --batch_size N for the views of a step"
_RATE = "use --lr X for the learning rate"
_DECAY = "use --lr_decay X for the factor of the learning rate at the end of the run"
_LOGGING = (
    "metrics.jsonl has the numbers of a run, report.html their curves; use --tensorboard to write them for TensorBoard"
)
_NO_PAGE = "there is no web interface; open report.html in the workspace"
_HUB = "set the variable HF_HOME to the folder of downloads, and HF_HUB_OFFLINE=1 to forbid them"
_TOKEN = "use `hf auth login` to store the token of the hub"
_REVISION = "use --hf_key NAME@REVISION for a revision"
_FILE = "use --file FILE for arguments in a text file; --print_config prints the settings of a command"
_EVERY = "checkpoints are saved automatically, and the last two are kept"
_EVAL = "use --eval_interval N for the epochs, of 100 steps, between two sets of validation images"
_THREADS = "set the variable OMP_NUM_THREADS to the number of CPU threads"
_SAMPLER = "no image is sampled; --objective, --t_range and --t_anneal set the guidance and its timesteps"
_FRAMES = "use --dataset_size_test N for the frames of the video"
_ATTENTION = "use --attention xformers, sdpa or cudnn; by default the fastest is measured"
_BACKBONE = "use --backbone grid, grid_torch or vanilla for the field"
_INIT = "use --dmtet --init_with FOLDER_OR_MESH to refine a run or a mesh file"
_CHECK = "use --doctor to check the installation"
_TEXTURE = "use --texture_resolution N for the mesh's texture"
_GRID = "use --mcubes_resolution N for the grid of which the mesh is made"
_SEED = "use --seed N to seed all random numbers"

# Names of a flag in other programs -> the answer.
ANSWERS: dict[str, str] = {
    "prompt prompts p t text_prompt input_prompt caption description": _PROMPT,
    "negative_prompt neg neg_prompt n_prompt negative_text prompt_negative": _NEGATIVE,
    "steps n_steps nsteps num_steps_total num_inference_steps inference_steps ddim_steps sampling_steps step "
    "iterations num_iters num_iterations n_iters n_iter niter max_iters max_iterations max_num_iterations "
    "max_train_steps train_steps training_steps total_steps epochs num_epochs epoch max_epochs "
    "num_train_epochs": _STEPS,
    "cfg cfg_scale guidance_weight scale cfg_weight guidancescale text_guidance_scale sd_guidance_scale": _SCALE,
    "outdir output_dir out_dir out output_folder outputdir o result_dir results_dir save_dir save_path savedir outpath "
    "exp_root_dir exp_dir experiment_name exp_name expname logdir log_dir logging_dir name tag run_name": _FOLDER,
    "resume resume_from resume_from_checkpoint resume_path continue load load_dir load_ckpt load_model checkpoint "
    "checkpoint_path ckpt_path resume_training restore": _RESUME,
    "overwrite force fresh no_resume restart clean from_scratch": _AFRESH,
    "gpu gpus gpu_id gpu_ids device_id device_ids devices cuda_device num_gpus n_gpus n_gpu multi_gpu cuda "
    "visible_devices": _GPU,
    "cpu no_cuda use_cpu nocuda no_gpu cpu_only": _CPU,
    "mesh_format mesh save_obj save_glb export export_mesh mesh_type obj glb ply export_type exporter extract_mesh "
    "save_textured_mesh write_mesh fmt": _MESH,
    "eval evaluate render render_only infer inference validate test_only eval_only write_video save_video video": _TEST,
    "lora loras lora_path lora_weights lora_scale lora_dir lora_name lyco": _LORA,
    "embedding embeddings embedding_path embeddings_dir textual_inversion learned_embeds ti": _EMBEDDING,
    "controlnet control control_image ip_adapter ip_adapter_scale init_img init_image input_image image_path img input "
    "i reference_image ref_image mask strength": _CONDITION,
    "model model_id model_name model_path model_key pretrained_model pretrained_model_name_or_path "
    "pretrained_model_name model_name_or_path sd_path sd_model diffusion_model hf_model model_dir ckpt_dir "
    "sd_key": _MODEL,
    "sdxl xl sd_xl flux sd3 turbo lcm lightning hyper": _OTHER_MODEL,
    "deepfloyd": "use --IF for DeepFloyd IF",
    "half amp fp_16 bf16 bfloat16 float16 mixed_precision dtype torch_dtype variant weights_dtype precision "
    "autocast use_fp16": _HALF,
    "no_half full_precision fp32 float32 no_half_vae no_fp_16 precision_full": _WHOLE,
    "medvram lowvram low_vram low_mem gradient_checkpointing enable_attention_slicing attention_slicing vae_slicing "
    "enable_vae_slicing cpu_offload enable_model_cpu_offload enable_sequential_cpu_offload use_8bit_adam "
    "memory_efficient vram": _MEMORY,
    "width height resolution res size image_size img_size ref_size train_resolution render_resolution": _TRAIN_SIZE,
    "suppress_face front_back janus suppress_faces": _FACES,
    "dir_text view_dependent view_prompts view_dependent_prompting directional_text": _VIEWS,
    "bs batch train_batch_size n_views num_views batchsize n_samples": _BATCH,
    "learning_rate lr_init base_lr": _RATE,
    "lr_scheduler lr_schedule scheduler_gamma warm_iters lr_warmup_steps": _DECAY,
    "wandb report_to use_wandb logger log_with tb wandb_project verbose debug v": _LOGGING,
    "share listen port server_port viewer vis gradio web ui webui autolaunch api viser": _NO_PAGE,
    "cache_dir hf_home offline local_files_only no_download hf_cache data_dir": _HUB,
    "token hf_token use_auth_token auth_token access_token api_key": _TOKEN,
    "revision model_revision commit branch": _REVISION,
    "config opt config_file cfg_file yaml options args from_file dry_run": _FILE,
    "checkpointing_steps save_interval ckpt_interval save_every checkpoint_interval save_steps checkpoints_total_limit "
    "save_ckpt": _EVERY,
    "val_interval validation_steps val_freq eval_every test_freq val_check_interval validation_epochs": _EVAL,
    "threads num_threads num_workers workers dataloader_num_workers n_jobs": _THREADS,
    "sampler scheduler sampler_name sampling_method plms ddim ddim_eta eta karras": _SAMPLER,
    "n_frames frames num_frames test_samples": _FRAMES,
    "xformers enable_xformers enable_xformers_memory_efficient_attention use_xformers opt_sdp_attention "
    "opt_sdp_no_mem_attention opt_split_attention flash_attention flash_attn sdp": _ATTENTION,
    "nerf network field tcnn hashgrid use_tcnn": _BACKBONE,
    "init_mesh mesh_init init_from init_geo init_shape refine geometry_convert_from": _INIT,
    "check selftest doctor_only diagnose skip_torch_cuda_test info": _CHECK,
    "max_grad_norm clip_grad grad_norm gradient_clip": "use --grad_clip X to limit the gradient of a parameter",
    "bg background bg_color background_color": "use --bg_radius -1 to learn no background",
    "albedo_iters": "use --albedo_iter_ratio X for the part of the run without shading",
    "latent_iters": "use --latent_iter_ratio X for the first part of the run, in which normals are the latent",
    "lambda_smooth": "use --lambda_2d_normal_smooth or --lambda_3d_normal_smooth to smooth the normals",
    "train": "a run always optimises; use --test to write the outputs of a finished one",
    "torch_compile": "use --compile for torch.compile of the image model",
    "deterministic_mode reproducible": "use --deterministic for the same bits with the same --seed",
    "random_seed s": _SEED,
    "fov": "use --fovy_range LOW HIGH for the training cameras, --default_fovy X for the output camera",
    "elevation azimuth camera_distance": "use --default_polar, --default_azimuth and --default_radius for the output "
    "camera; polar angles count from above, so elevation 0 is polar 90",
    "texture_size texture_res tex_size tex_resolution texture_map_size": _TEXTURE,
    "mc_resolution mc_res mesh_resolution mesh_res isosurface_resolution export_resolution": _GRID,
    "quiet q": "the output is in log.txt as well; redirect it to be quiet",
}

# Flag without its dashes -> the answer.
FLAGS: dict[str, str] = {name: answer for names, answer in ANSWERS.items() for name in names.split()}

# threestudio and DreamGaussian take settings as words: the end of the name -> the answer.
KEYS: dict[str, str] = {
    "prompt": _PROMPT,
    "negative_prompt": _NEGATIVE,
    "guidance_scale": _SCALE,
    "max_steps": _STEPS,
    "iters": _STEPS,
    "pretrained_model_name_or_path": _MODEL,
    "seed": _SEED,
    "width": _TRAIN_SIZE,
    "height": _TRAIN_SIZE,
    "batch_size": _BATCH,
    "lr": _RATE,
    "resume": _RESUME,
    "save_path": _FOLDER,
    "exp_root_dir": _FOLDER,
    "name": _FOLDER,
    "tag": _FOLDER,
    "exporter_type": _MESH,
    "fmt": _MESH,
    "geometry_convert_from": _INIT,
    "val_check_interval": _EVAL,
    "lambda_orient": "use --lambda_orient X for the weight of normals that face away",
    "use_perp_neg": "use --perpneg",
    "input": _CONDITION,
    "elevation": "use --default_polar X for the output camera; it counts from above, so elevation 0 is 90",
}

# Words that come before the flags in programs with several commands.
COMMANDS: dict[str, str] = {
    **dict.fromkeys(("train", "run", "generate", "fit", "launch", "start"), "begin with --text"),
    **dict.fromkeys(("test", "eval", "render", "validate"), _TEST),
    **dict.fromkeys(("export", "mesh"), _MESH),
    **dict.fromkeys(("doctor", "check"), _CHECK),
    "help": "use --help to show all flags",
    "version": "use --version",
}

# Words of other programs as values of flags here.
VALUES: dict[tuple[str, str], str] = {
    **{
        ("--guidance", name): "use --guidance SD for Stable Diffusion"
        for name in ("stable-diffusion", "sd", "sd2", "sd1")
    },
    **{
        ("--guidance", name): "use --guidance IF, or --IF, for DeepFloyd IF"
        for name in ("deepfloyd", "if", "deep-floyd")
    },
    ("--guidance", "CLIP"): "use --guidance clip for CLIP",
    **{
        ("--sd_version", name): "the versions are 1.5, 2.0 and 2.1; use --hf_key for other models of those "
        "architectures"
        for name in ("1", "2", "v1-5", "v1.5", "1-5", "2.1-base", "2.0-base", "v2", "v2-1")
    },
    ("--sd_version", "1.4"): "use --hf_key CompVis/stable-diffusion-v1-4 for Stable Diffusion 1.4",
    **{("--sd_version", name): _OTHER_MODEL for name in ("xl", "XL", "sdxl", "SDXL", "3.5", "turbo")},
    **{
        ("--device", name): "use --device cuda for a GPU, --device cuda:1 for the second one"
        for name in ("gpu", "GPU", "gpu:0", "gpu:1", "0", "1", "2", "3", "cuda0", "cuda1", "cuda:", "nvidia", "0,1")
    },
    **{
        ("--device", name): "such devices are not supported; leave --device out"
        for name in ("mps", "xpu", "tpu", "dml")
    },
    **{("--seed", name): "leave --seed out to draw one" for name in ("-1", "random", "none", "None")},
    **{("--ckpt", name): "use --ckpt latest to resume a run" for name in ("last", "newest", "resume", "auto")},
    **{("--ckpt", name): "use --ckpt scratch to start over" for name in ("none", "None", "no", "new")},
    **{
        ("--attention", name): "use --attention sdpa for torch's own attention and its flash kernels"
        for name in ("flash", "flash_attn", "torch", "sdp", "math", "flash_attention_2")
    },
}


def plain_name(flag: str) -> str:
    """Return the name of a flag in these tables: `cfg_scale` for `--CFG-scale`. A single letter keeps its case."""
    name = flag.lstrip("-\u2013\u2014\u2212").replace("-", "_")
    return name.lower() if len(name) > 1 else name
