"""Every setting of a run, in one frozen dataclass a section. The command line is generated from the fields.

A field's name is its flag (`iters` is `--iters`), so names are unique over all sections. The defaults written here are
the reference's (`--preset reference`); `presets` has the others. Imports nothing heavy.

Units: angles in degrees, lengths in scene units, ratios in fractions of the run. Axes: docs/conventions.md.
A section raises UserError when it is made with a bad value.
"""

from dataclasses import dataclass

from dream_fast.engine.config.guidances import DREAM_MINI, GUIDANCES
from dream_fast.engine.config.schedule import Scalar
from dream_fast.engine.config.setting import ConfigSection, Range, ScalarRange, setting
from dream_fast.engine.errors import UserError

BACKBONES = ("grid", "grid_torch", "vanilla")
GRIDS, VANILLA = BACKBONES[:2], BACKBONES[2:]
# The settings of the output camera's view.
DEFAULT_VIEW = ("default_radius", "default_polar", "default_azimuth", "default_fovy")


@dataclass(frozen=True, kw_only=True)
class RunConfig(ConfigSection):
    """Run control."""

    text: str | None = setting(None, "the prompt")
    negative: str = setting("", "negative prompt: what the images should not show; replaces the empty prompt")
    text_front: str | None = setting(None, "the whole prompt of the front view; default: TEXT, front view")
    text_side: str | None = setting(None, "the whole prompt of the two sides")
    text_back: str | None = setting(None, "the whole prompt of the back")
    text_overhead: str | None = setting(None, "the whole prompt of the view from above")
    workspace: str = setting("workspace", "folder of everything that the run writes", resumable=True)
    seed: int | None = setting(None, "seed of all random numbers; drawn when not given", low=0, high=2**32 - 1)
    iters: int = setting(10000, "optimisation steps", low=1, resumable=True)
    exp_start_iter: int | None = setting(
        None, "step at which the phases, progressive view and progressive levels start; default: 0", low=0
    )
    exp_end_iter: int | None = setting(
        None,
        "step at which they end, also in a run that is extended later; default: the last",
        low=1,
    )
    preset: str = setting(
        "auto",
        "auto: defaults of the model and the device; reference: those of stable-dreamfusion",
        choices=("auto", "reference"),
        resumable=True,
    )
    test: bool = setting(False, "no optimisation: write the outputs of the workspace's checkpoint", resumable=True)
    output: str | None = setting(
        None,
        "with --test: folder for the outputs; the workspace is only read",
        resumable=True,
    )
    six_views: bool = setting(False, "write the six views only, no video", resumable=True)
    save_mesh: bool = setting(False, "export a textured mesh to mesh/ at the end, as GLB and as OBJ", resumable=True)
    ckpt: str = setting(
        "latest",
        "checkpoint to start from; latest: resume if there is one; scratch: start over; or a path",
        resumable=True,
    )
    fp16: bool = setting(False, "half precision: fp16 on a CUDA GPU, bf16 on a CPU with AMX; other CPUs run in fp32")
    vram_O: bool = setting(
        False,
        "less memory: xformers attention, VAE in slices, gradient checkpointing in its encoder",
        resumable=True,
    )
    attention: str = setting(
        "auto",
        "backend of the image model's attention; auto: the fastest one, measured at the start of a run (torch's sdpa "
        "on a CPU) and kept when the run is resumed",
        choices=("auto", "xformers", "sdpa", "cudnn"),
        resumable=True,
    )
    compile: bool = setting(
        False,
        "torch.compile of the image model, on a GPU: faster steps after one to three minutes of compiling at each "
        "start (less with a warm cache); for long runs with Stable Diffusion",
        resumable=True,
    )
    deterministic: bool = setting(False, "on a GPU, repeat results bit for bit with the same seed; somewhat slower")
    device: str = setting(
        "auto",
        "device of the run; auto: the GPU if there is one; cuda:N: GPU number N of those in CUDA_VISIBLE_DEVICES",
        choices=("auto", "cpu", "cuda", "cuda:N"),
    )
    cuda_graph: bool = setting(
        False,
        "on a GPU, replay a step up to the optimiser as one CUDA graph: for small image models, whose steps are "
        "bound by the host; the default of dream-mini there",
        resumable=True,
        aliases=("step_graph",),
    )
    log_every: int = setting(10, "steps between two rows of metrics.jsonl", low=1, resumable=True)
    rescue: bool = setting(
        False,
        "restart a run whose object vanished or filled the scene, at most twice, with safer settings; without this "
        "flag a warning names them",
        resumable=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        start = self.exp_start_iter or 0
        if self.exp_end_iter is not None and self.exp_end_iter <= start:
            raise UserError(f"--exp_end_iter must be more than --exp_start_iter {start}, not {self.exp_end_iter}")
        if self.exp_end_iter is None and self.iters <= start:
            raise UserError(
                f"--exp_start_iter must be less than --iters {self.iters}, where the phases end without "
                f"--exp_end_iter, not {start}"
            )
        if self.output is not None and not self.test:
            raise UserError("--output works only with --test: a run writes everything to its --workspace")
        if self.compile and self.deterministic:
            raise UserError(
                "--compile cannot be combined with --deterministic: compiled kernels are tuned by measuring, so they "
                "may sum in another order the next time"
            )

    @property
    def drawn_seed(self) -> int:
        """The seed of a run after `configure.finalize`, which sets one where none is typed."""
        assert self.seed is not None
        return self.seed

    @property
    def view_prompts(self) -> dict[str, str]:
        """The whole prompts of the views that have one: front, side, back, overhead."""
        texts = dict(front=self.text_front, side=self.text_side, back=self.text_back, overhead=self.text_overhead)
        return {view: text for view, text in texts.items() if text is not None}


@dataclass(frozen=True, kw_only=True)
class CameraConfig(ConfigSection):
    """Training cameras and the output camera."""

    radius_range: Range = setting((3.0, 3.5), "distance of the training cameras", above=0)
    theta_range: Range = setting((45.0, 105.0), "polar angle: 0 is above, 90 the horizon", low=0, high=180)
    phi_range: Range = setting((-180.0, 180.0), "azimuth: 0 is in front (+z), 90 at +x", low=-360, high=360)
    fovy_range: Range = setting((10.0, 30.0), "vertical field of view", above=0, below=180)
    progressive_view: bool = setting(
        False, "widen these four ranges from the output camera's default view to their full width during the phases"
    )
    progressive_view_init_ratio: float = setting(
        0.2, "part of their width at which progressive_view starts; it grows by 2 in a whole run", low=0, high=1
    )
    uniform_sphere_rate: float = setting(
        0.0, "probability of a batch spread evenly over the upper half of the sphere", low=0, high=1
    )
    jitter_pose: bool = setting(False, "move, turn and roll the training cameras a little; the prompt follows")
    jitter_center: float = setting(0.2, "with jitter_pose: width of the cube in which a camera is moved", low=0)
    jitter_target: float = setting(
        0.2, "with jitter_pose: standard deviation of the point that a camera looks at, along each axis", low=0
    )
    jitter_up: float = setting(
        0.02,
        "with jitter_pose: standard deviation of the change of a camera's upward unit vector, along each axis",
        low=0,
    )
    angle_overhead: float = setting(30.0, "polar angle up to which the prompt has overhead view", low=0, high=180)
    view_blend: float = setting(
        90.0, "degrees around azimuths 45 and 135 over which the prompts of two sides are blended", low=1, high=90
    )
    angle_front: float | None = setting(
        None,
        "no blending: the prompt has front or back view within half of this angle from azimuth 0 or 180, side view "
        "elsewhere; default: blended",
        above=0,
        high=180,
    )
    # A resumed run may change these three, to fit into the memory of a GPU.
    w: int = setting(64, "width of a training render", low=1, high=4096, resumable=True)
    h: int = setting(64, "height of a training render", low=1, high=4096, resumable=True)
    batch_size: int = setting(1, "views in a step", low=1, high=1024, resumable=True)
    default_radius: float = setting(3.2, "distance of the output camera", above=0, resumable=True)
    default_polar: float = setting(90.0, "polar angle of the output camera", low=0, high=180, resumable=True)
    default_azimuth: float = setting(
        0.0, "azimuth at which the output camera starts", low=-360, high=360, resumable=True
    )
    default_fovy: float = setting(
        20.0, "vertical field of view of the output camera", above=0, below=180, resumable=True
    )
    W: int = setting(800, "width of the output images", low=1, high=16384, resumable=True)
    H: int = setting(800, "height of the output images", low=1, high=16384, resumable=True)


@dataclass(frozen=True, kw_only=True)
class FieldConfig(ConfigSection):
    """The field: hash grid or frequency encoding, MLP, density, background."""

    backbone: str = setting(
        "grid",
        "the field: grid a hash grid and an MLP, in Triton on a GPU; grid_torch the same on PyTorch's operators; "
        "vanilla a frequency encoding and a residual MLP, without an occupancy grid",
        choices=BACKBONES,
    )
    n_levels: int = setting(16, "levels of the hash grid", low=1, high=32, backbones=GRIDS, aliases=("levels",))
    n_features_per_level: int = setting(2, "features of a level", low=1, high=8, backbones=GRIDS, aliases=("features",))
    log2_hashmap_size: int = setting(
        19, "log2 of the table's entries in a level", low=4, high=24, backbones=GRIDS, aliases=("log2_entries",)
    )
    base_resolution: int = setting(16, "resolution of the coarsest level", low=2, backbones=GRIDS)
    max_resolution: int = setting(2048, "resolution of the finest level", low=2, backbones=GRIDS)
    interpolation: str = setting(
        "smoothstep",
        "interpolation inside a cell of the grid",
        choices=("smoothstep", "linear"),
        backbones=GRIDS,
    )
    n_frequencies: int = setting(
        12,
        "bands of the frequency encoding, each twice as fine as the one before",
        low=1,
        high=24,
        backbones=VANILLA,
        aliases=("frequencies",),
    )
    hidden_width: int = setting(64, "width of the MLP's hidden layers", low=1, high=4096)
    hidden_layers: int = setting(2, "number of the MLP's hidden layers", low=0, high=8)
    density_activation: str = setting("exp", "activation of the density", choices=("exp", "softplus"))
    blob_density: float = setting(5.0, "density at the centre of the initial blob", low=0)
    blob_radius: float = setting(0.2, "radius of the initial blob", above=0)
    bg_radius: float = setting(1.4, "more than 0: a small MLP learns a background; else a plain colour")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_resolution < self.base_resolution:
            raise UserError(
                f"--max_resolution {self.max_resolution} is less than --base_resolution {self.base_resolution}: the "
                "levels of the hash grid go from coarse to fine"
            )


@dataclass(frozen=True, kw_only=True)
class RenderConfig(ConfigSection):
    """Samples of rays: marching through the occupancy grid, or by importance."""

    bound: float = setting(1.0, "the scene is the cube [-bound, bound]^3", above=0, high=128)
    max_steps: int = setting(
        1024, "most samples of a ray; also sets the step, 2 sqrt(3) / max_steps", low=1, high=16384, backbones=GRIDS
    )
    dt_gamma: float = setting(
        0.0, "factor by which the step grows with distance; 0: even steps", low=0, backbones=GRIDS
    )
    num_steps: int = setting(64, "stratified samples of a ray", low=1, high=4096, backbones=VANILLA)
    upsample_steps: int = setting(
        32, "importance samples of a ray, drawn from the weights of the even ones", low=0, high=4096, backbones=VANILLA
    )
    min_near: float = setting(0.01, "nearest distance of a sample from the camera", low=0)
    density_thresh: float = setting(
        10.0,
        "density above which a cell of the grid is occupied, at most the mean density (the isovalue of a mesh is found "
        "from silhouettes instead)",
        above=0,
    )
    update_extra_interval: int = setting(16, "steps between two updates of the occupancy grid", low=1, backbones=GRIDS)
    occupancy_resolution: int = setting(
        128, "cells of the occupancy grid along an edge", low=8, high=512, backbones=GRIDS
    )
    normals: str = setting("finite_difference", "how normals are computed", choices=("finite_difference", "analytic"))
    normal_epsilon: float = setting(0.01, "step of finite-difference normals", above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.occupancy_resolution % 2:
            raise UserError(f"--occupancy_resolution must be even, not {self.occupancy_resolution}")


@dataclass(frozen=True, kw_only=True)
class ShadingConfig(ConfigSection):
    """Phases of the run and their shading."""

    latent_iter_ratio: float = setting(
        0.2, "first part of the run, in which normals and opacity are used as latents", low=0, high=1
    )
    albedo_iter_ratio: float = setting(0.0, "part of the run up to which colour is not shaded", low=0, high=1)
    min_ambient_ratio: Scalar = setting(0.1, "least ambient light of a shaded step", low=0, high=1)
    textureless_ratio: Scalar = setting(0.2, "probability that a shaded step has no colour", low=0, high=1)
    progressive_level: bool = setting(False, "add finer levels of the grid, or frequencies, during the run")


@dataclass(frozen=True, kw_only=True)
class GuidanceConfig(ConfigSection):
    """Guidance: the image model and its objective."""

    guidance: tuple[str, ...] = setting(
        (DREAM_MINI.name,),
        f"image models: {'; '.join(f'{name}, {spec.description}' for name, spec in GUIDANCES.items())}. The losses of "
        "several are added",
        choices=tuple(GUIDANCES),
    )
    sd_version: str | None = setting(None, "Stable Diffusion from the hub, by version", choices=("1.5", "2.0", "2.1"))
    hf_key: str | None = setting(
        None,
        "Stable Diffusion, SDXL, SD3, FLUX or another pipeline of diffusers (docs/image_models.md), from a folder, or "
        "from the hub by NAME or NAME@REVISION",
    )
    if_key: str | None = setting(None, "the first stage of IF, named as in --hf_key; default: DeepFloyd/IF-I-XL-v1.0")
    clip_key: str | None = setting(None, "CLIP, named as in --hf_key; default: openai/clip-vit-base-patch16")
    objective: str = setting(
        "sds",
        "what is subtracted from the guided prediction: sds the noise, csd the unconditional prediction (without "
        "--guidance_rescale by default), asd the conditional one at a later timestep, sdi the noise that inverts the "
        "image (slower: 2 rows an inversion step); --guidance_scale defaults to the model's own for sds and csd, to "
        "7.5 for asd and sdi",
        choices=("sds", "csd", "asd", "sdi"),
        aliases=("score",),
    )
    loss_space: str = setting(
        "noise",
        "with sds and sdi: compare the predicted noise, or the clean latents x0 that it implies",
        choices=("noise", "x0"),
    )
    inversion_steps: int = setting(10, "with --objective sdi: calls of the model for the inversion", low=1, high=1000)
    guidance_scale: Scalar = setting(100.0, "s in eps = eps_uncond + s (eps_cond - eps_uncond)", low=0)
    t_range: ScalarRange = setting(
        (0.02, 0.98), "range of the timestep t, as parts of the noise schedule", low=0, high=1
    )
    t_anneal: str = setting(
        "none",
        "none: t is drawn from the whole range; others: t falls with progress",
        choices=("none", "linear", "sqrt", "square"),
    )
    guidance_rescale: Scalar = setting(
        0.0,
        "share of a rescale of the guided prediction to the standard deviation of the unguided one",
        low=0,
        high=1,
    )
    lambda_guidance: Scalar = setting(1.0, "weight of the guidance", low=0)
    clip_grad_latent: Scalar = setting(
        -1.0, "largest element of the gradient in the latents; -1: no limit", low=-1, is_limit=True
    )
    perpneg: bool = setting(
        False, "Perp-Neg: push away from the prompts of front and side where those are out of sight"
    )
    negative_w: float = setting(-2.0, "with --perpneg: base weight of those prompts, 0 to about -4", high=0)
    front_decay_factor: float = setting(
        2.0, "with --perpneg: how fast the front's weight falls towards the front", low=0
    )
    side_decay_factor: float = setting(10.0, "with --perpneg: how fast the side's weight falls towards the side", low=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.guidance:
            if self.guidance.count(name) > 1:
                raise UserError(f"--guidance names {name} twice")
        if self.perpneg and self.objective != "sds":
            raise UserError(
                f"--perpneg works only with --objective sds, not with {self.objective}: leave one of them out"
            )
        if self.loss_space == "x0" and self.objective not in ("sds", "sdi"):
            raise UserError(
                f"--loss_space x0 works only with --objective sds and sdi, not with {self.objective}: leave one of "
                "them out"
            )


@dataclass(frozen=True, kw_only=True)
class LossConfig(ConfigSection):
    """Regularisers and gradient limits."""

    regularizers: str = setting(
        "plain",
        "plain: weights as in the reference, to be tuned for each image model; guided: weights are relative to the "
        "gradient of the guidance, so they transfer between models",
        choices=("plain", "guided"),
    )
    lambda_opacity_entropy: Scalar = setting(1e-3, "entropy of the opacity of rays", low=0, aliases=("lambda_entropy",))
    lambda_entropy_weights: Scalar = setting(0.0, "entropy of the weights of samples, as in the reference", low=0)
    lambda_opacity: Scalar = setting(0.0, "mean square of the opacity", low=0)
    lambda_orient: Scalar = setting(1e-2, "normals that face away from the camera", low=0)
    lambda_tv: Scalar = setting(0.0, "total variation of the hash table", low=0, backbones=GRIDS)
    lambda_wd: Scalar = setting(0.0, "weight decay of the hash table, level by level", low=0, backbones=GRIDS)
    lambda_2d_normal_smooth: Scalar = setting(0.0, "total variation of the normal image", low=0)
    lambda_3d_normal_smooth: Scalar = setting(0.0, "difference of normals at nearby points", low=0)
    lambda_mesh_normal: Scalar = setting(
        0.5, "with --dmtet, whose only regularisers are these two: angle between neighbouring triangles", low=0
    )
    lambda_mesh_laplacian: Scalar = setting(
        0.5, "with --dmtet: distance of vertices from the mean of their neighbours", low=0
    )
    grad_clip: Scalar = setting(-1.0, "largest gradient of a parameter; -1: no limit", low=-1, is_limit=True)
    grad_clip_rgb: Scalar = setting(-1.0, "largest gradient of a pixel; -1: no limit", low=-1, is_limit=True)


@dataclass(frozen=True, kw_only=True)
class DMTetConfig(ConfigSection):
    """Refinement as a mesh (DMTet)."""

    dmtet: bool = setting(
        False,
        "refine a mesh instead of a density: a surface in a grid of tetrahedra, rendered at --w and --h times "
        "--dmtet_reso_scale; by default with t_range 0.02 0.5 and shading from the start",
    )
    init_with: str | None = setting(
        None, "with --dmtet: start from the folder of a run, a checkpoint of it, or a mesh file; default: a sphere"
    )
    dmtet_reso_scale: float = setting(8.0, "with --dmtet: factor of the training render's sides", above=0, high=64)
    tet_grid_size: int = setting(
        128, "with --dmtet: layers of tetrahedra across the grid, an even number", low=4, high=256
    )
    lr_geo: float | None = setting(None, "with --dmtet: learning rate of the shape; default: --lr", above=0)
    lock_geo: bool = setting(False, "with --dmtet: optimise only the colours")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tet_grid_size % 2:
            raise UserError(f"--tet_grid_size must be even, not {self.tet_grid_size}")
        given = {"init_with": self.init_with is not None, "lr_geo": self.lr_geo is not None, "lock_geo": self.lock_geo}
        for name in given:
            if given[name] and not self.dmtet:
                raise UserError(f"--{name} belongs to the mesh refinement: it works only with --dmtet")


@dataclass(frozen=True, kw_only=True)
class OptimConfig(ConfigSection):
    """The optimiser."""

    optim: str = setting("adan", "the optimiser", choices=("adan", "adam"))
    lr: float = setting(
        1e-3,
        "base learning rate: the MLPs use 5 times this with adan and 1 time with adam, the hash table 10 times the "
        "rate of the MLPs, the shape of --dmtet this rate",
        above=0,
    )
    lr_decay: float = setting(1.0, "factor of the learning rates at the end, reached exponentially", above=0, high=1)
    lr_finest: float = setting(
        1.0,
        "factor of the hash table's learning rate at its finest level, with a geometric sequence in between",
        above=0,
        high=1,
        backbones=GRIDS,
    )
    ema_decay: float = setting(0.9995, "decay of the averaged weights, a step", low=0, below=1)

    @property
    def network_lr(self) -> float:
        """Learning rate of the MLPs at the start of a run: `lr` is Adam's, and Adan takes 5 times as much."""
        return self.lr * (5.0 if self.optim == "adan" else 1.0)

    @property
    def table_lr(self) -> float:
        """Learning rate of the hash table at the start of a run."""
        return self.network_lr * 10.0


@dataclass(frozen=True, kw_only=True)
class OutputConfig(ConfigSection):
    """Outputs and their resolution."""

    eval_interval: int = setting(
        1, "epochs between two sets of validation images; an epoch is 100 steps", low=1, resumable=True
    )
    test_interval: int = setting(
        100,
        "epochs between two test videos during the run, in addition to results/turntable.mp4 at its end",
        low=1,
        resumable=True,
    )
    save_guidance: bool = setting(
        False,
        "save the render, its noisy latents and the one-step estimate as images in guidance/; loads the VAE's decoder",
        resumable=True,
    )
    save_guidance_interval: int = setting(
        10, "with --save_guidance: interval between these images in steps", low=1, resumable=True
    )
    tensorboard: bool = setting(
        False, "write the numbers of metrics.jsonl for TensorBoard, too, to tensorboard/", resumable=True
    )
    profile: bool = setting(
        False, "trace 20 steps after the first 20 with torch's profiler, to profile/", resumable=True
    )
    dataset_size_valid: int = setting(8, "images in a validation set", low=1, high=10_000, resumable=True)
    dataset_size_test: int = setting(100, "frames of the 360-degree video", low=1, high=10_000, resumable=True)
    mcubes_resolution: int = setting(256, "points along an edge of the mesh's grid", low=8, high=512, resumable=True)
    decimate_target: int = setting(50_000, "most triangles of the mesh; 0: all of them", low=0, resumable=True)
    texture_resolution: int = setting(
        2048, "texels along an edge of the mesh's texture", low=16, high=8192, resumable=True
    )
    video_fps: int = setting(25, "frames a second of the video", low=1, high=240, resumable=True)
