"""Load an image model, Stable Diffusion or DeepFloyd IF: from a folder, from the hub, or the one inside the package.

All are loaded alike. The folder layout is that of diffusers' StableDiffusionPipeline (model_index.json, tokenizer/,
text_encoder/, unet/, vae/, scheduler/) or IFPipeline (the same without a VAE: the first stage of IF works on pixels); a
name on the hub is first downloaded to such a folder. Every size and constant is read from the configurations there.
Weights are safetensors only: nothing is unpickled and no code from a model repository runs.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dream_fast.engine.config.model_names import SD_VERSIONS, typed_name
from dream_fast.engine.dream_mini import MODEL_FOLDER
from dream_fast.engine.errors import UserError, first_line
from dream_fast.engine.guidance.model.attention import AttentionChoice, choose_attention
from dream_fast.engine.guidance.model.checks import check_folder, check_sentencepiece
from dream_fast.engine.guidance.model.fused_blocks import ResidualBlock, fuse_group_norms, fuse_residual_blocks
from dream_fast.engine.guidance.model.hub import find_folder
from dream_fast.engine.guidance.model.image_model import Embedding
from dream_fast.engine.guidance.model.settings import check_finite, check_schedule, check_tokens
from dream_fast.engine.guidance.model.text import fit_window
from dream_fast.engine.guidance.noise import VariancePreserving
from dream_fast.engine.runtime.quiet import quiet_diffusers

logger = logging.getLogger(__name__)

MIN_WINDOW = 4  # tokens: two of a prompt, its begin and its end
IF_TOKENS = 77  # of the prompts that IF was trained with; its T5 supports longer ones

# Modules in channels-last layout on a GPU. Convolutions are faster so, and with fused norms the rest is as fast: a step
# of Stable Diffusion's size takes 24.4 ms instead of 26.9 on an H100. torch's own group norm is slow in that layout.
CHANNELS_LAST = ("unet", "vae")
# Modules that --compile compiles.
COMPILED = ("unet", "vae")
# Least side in pixels of a model's images for fused group norms on a GPU. dream-mini's 42 norms need 28 kernels, which
# take 13 s to compile on two cores, and its whole run is 600 steps of a few milliseconds.
MIN_FUSED_IMAGE_SIZE = 256


@dataclass(kw_only=True)
class Components:
    """A loaded image model and its constants.

    `image_size` and `latent_size` are the sides of its square images and latents. Latents z are
    (vae(x) - shift_factor) * scaling_factor, x being an image in [-1, 1]; without a `vae` (IF) they are x itself.
    `process` is their noise process, and `prediction_type` "epsilon" or "v_prediction". `attention` has the operators
    of the UNet and of the VAE. Prompts have `window` tokens; with `t5` they are in lower case and their padding is
    masked.
    """

    name: str
    tokenizer: Any
    text_encoder: Any
    unet: Any
    vae: Any
    device: torch.device
    dtype: torch.dtype
    image_size: int
    latent_size: int
    latent_channels: int
    scaling_factor: float
    shift_factor: float
    prediction_type: str
    process: VariancePreserving
    window: int = 77
    t5: bool = False
    attention: AttentionChoice = AttentionChoice("sdpa", "sdpa")
    embeds_again = False
    capturable = True

    @property
    def latents_are_pixels(self) -> bool:
        """True for a model that works on pixels (IF)."""
        return self.vae is None

    def fit_prompt(self, text: str, endings: Sequence[str]) -> str:
        """Cut `text` to the leading words that fit the window with each of `endings`; a warning names the others."""
        return fit_window(self.tokenizer, self.window, text, endings)

    @torch.no_grad()
    def embed(self, prompts: Sequence[str], negative: str | None = None) -> Tensor:
        """Last hidden states [N, T, D] of the text encoder for N prompts, padded or cut to its window of T tokens.

        A `negative` prompt is one more, the last. Raises ValueError: when the text encoder was freed. Raises UserError:
        when the tokenizer does not fit it, or the states are not finite.
        """
        if self.text_encoder is None:
            raise ValueError("the text encoder was freed: load the model again, or keep_text_encoder=True")
        prompts = [*prompts] if negative is None else [*prompts, negative]
        if self.t5:
            prompts = [prompt.lower().strip() for prompt in prompts]  # as IF was trained
        tokens = self.tokenizer(
            prompts, padding="max_length", max_length=self.window, truncation=True, return_tensors="pt"
        )
        mask = None
        if self.t5 or getattr(self.text_encoder.config, "use_attention_mask", False):
            mask = tokens.attention_mask.to(self.device)
        # Stable Diffusion's own pipeline leaves the padding unmasked: that is what its UNet was trained with.
        check_tokens(self.name, tokens.input_ids, self.text_encoder.config)
        states = self.text_encoder(tokens.input_ids.to(self.device), attention_mask=mask)[0]
        if not bool(torch.isfinite(states).all()):
            raise UserError(f"the text encoder of the model {self.name} has outputs that are not finite")
        return states

    def encode(self, images: Tensor, noise: Tensor | None) -> Tensor:
        """Encode images [B, 3, S, S] in [-1, 1] to latents, by the draw `noise` from the VAE's posterior or its mean.

        Differentiable. Latents are [B, C, h, w] fp32; without a VAE they are the images.
        """
        if self.vae is None:
            return images
        posterior = self.vae.encode(images.to(self.dtype)).latent_dist
        z = posterior.mean.float()
        if noise is not None:
            z = z + posterior.std.float() * noise
        return (z - self.shift_factor) * self.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents to images [B, 3, S, S] in [-1, 1]. Raises ValueError: without the VAE's decoder."""
        if self.vae is None:
            return latents
        if self.vae.decoder is None:
            raise ValueError("the model has no VAE decoder; load it with need_vae_decoder=True")
        latents = latents / self.scaling_factor + self.shift_factor
        return self.vae.decode(latents.to(self.dtype), return_dict=False)[0]

    def predict(self, noisy: Tensor, t: Tensor, embedding: Embedding) -> Tensor:
        """Output [B, C, h, w] fp32 of the UNet for noisy latents at timesteps `t` [B] and the embedding [B, T, D].

        The variance that some pixel models also predict is dropped.
        """
        assert isinstance(embedding, Tensor)
        states = embedding.to(self.dtype)
        out = self.unet(noisy.to(self.dtype), t, encoder_hidden_states=states, return_dict=False)[0].float()
        return out[:, : self.latent_channels] if out.shape[1] > self.latent_channels else out

    def guide_natively(self, guided: Tensor, cond: Tensor) -> Tensor:
        """Leave the guided output as it is."""
        return guided

    def free_text_encoder(self) -> None:
        """Free the text encoder, which is not needed once the prompts of a run are embedded."""
        self.text_encoder = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def choose_source(*, sd_version: str | None = None, hf_key: str | None = None) -> str | Path:
    """Choose the source of the model: `hf_key` (a folder or a hub name), else `sd_version`, else dream-mini."""
    if hf_key is not None:
        return hf_key
    return MODEL_FOLDER if sd_version is None else SD_VERSIONS[sd_version]


class PrepareOptions(TypedDict, total=False):
    """Options of `prepare_components`."""

    vram_O: bool
    attention: str
    previous: AttentionChoice | None
    compiled: Sequence[str]
    channels_last: Sequence[str] | None


def load_components(
    source: str | Path,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    *,
    kind: str = "SD",
    need_vae_decoder: bool = False,
    **options: Unpack[PrepareOptions],
) -> Components:
    """Load the model at `source`, a folder or a hub name, with weights of `dtype` on `device`, for inference.

    `kind` is "SD" or "IF". Without `need_vae_decoder` only the encoder half of the VAE is kept. The other options are
    those of `prepare_components`.

    Raises UserError: when a file is missing, damaged, unreachable, or of another kind of model.
    """
    device = torch.device(device)
    folder = find_folder(source, kind, half=dtype == torch.float16)
    variants = check_folder(folder, kind, typed_name(str(source)))
    tokenizer, text_encoder, unet, vae, scheduler = _load_modules(folder, kind, dtype, variants)
    text = text_encoder.config
    longest = IF_TOKENS if kind == "IF" else text.max_position_embeddings
    try:
        constants = _model_constants(
            folder, text.hidden_size, unet.config, None if vae is None else vae.config, scheduler
        )
        window = min(int(tokenizer.model_max_length), longest)
        if window < MIN_WINDOW:
            raise ValueError(f"model_max_length is {window}")
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"the settings of the model {folder} cannot be used: {first_line(error)}") from error
    check_schedule(
        f"the scheduler of the model {folder}", scheduler.alphas_cumprod, scheduler.config.num_train_timesteps
    )
    if vae is not None and not need_vae_decoder:
        vae.decoder = None
        vae.post_quant_conv = None
    components = Components(
        name="dream-mini" if folder == MODEL_FOLDER else str(source),
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        unet=unet,
        vae=vae,
        device=device,
        dtype=dtype,
        process=VariancePreserving(scheduler.alphas_cumprod.to(device=device, dtype=torch.float32)),
        window=window,
        t5=kind == "IF",
        **constants,
    )
    prepare_components(components, longest, **options)
    for part, model in (("text_encoder", text_encoder), ("unet", unet), ("vae", vae)):
        if model is not None:
            check_finite(f"the {part} of the model {folder}", model)
    return components


def _load_modules(
    folder: Path, kind: str, dtype: torch.dtype, variants: Mapping[str, str | None]
) -> tuple[Any, Any, Any, Any | None, Any]:
    """Load tokenizer, text encoder, UNet, VAE (None: the model works on pixels) and scheduler on the CPU."""
    quiet_diffusers()
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

    tokenizer_class, encoder_class = CLIPTokenizer, CLIPTextModel
    if kind == "IF":
        check_sentencepiece(folder)
        tokenizer_class, encoder_class = T5TokenizerFast, T5EncoderModel
    with quiet_progress():
        tokenizer = _load(tokenizer_class, folder, "tokenizer")
        scheduler = _load(DDIMScheduler, folder, "scheduler")  # read for its noise schedule, which all kinds share
        text_encoder = _load_model(encoder_class, folder, "text_encoder", dtype=dtype, variant=variants["text_encoder"])
        unet = _load_model(UNet2DConditionModel, folder, "unet", torch_dtype=dtype, variant=variants["unet"])
        vae = None
        if "vae" in variants:
            vae = _load_model(AutoencoderKL, folder, "vae", torch_dtype=dtype, variant=variants["vae"])
    return tokenizer, text_encoder, unet, vae, scheduler


def prepare_components(
    components: Components,
    tokens: int,
    *,
    vram_O: bool = False,
    attention: str = "auto",
    previous: AttentionChoice | None = None,
    compiled: Sequence[str] = (),
    channels_last: Sequence[str] | None = None,
) -> None:
    """Prepare loaded modules to guide with prompts of `tokens`: frozen, on their device, with their attention.

    `attention` and `previous` are those of `choose_attention`. `vram_O` encodes one image at a time, recomputes the
    encoder's blocks in its backward, and takes xformers' attention where none is named and it works. `compiled` names
    the modules for torch.compile, "unet" and "vae" (not the latter with `vram_O`: compiling undoes the recomputation),
    `channels_last` those in channels-last layout. On a GPU a model with images of at least MIN_FUSED_IMAGE_SIZE gets
    the modules of `fused_blocks`, and CHANNELS_LAST. For a model that works on pixels, all this concerns the UNet,
    which keeps the attention of diffusers: its keys and values of prompt and image are concatenated.

    Raises UserError: when an attention does not work on the device, or `compiled` is set without a GPU.
    """
    if compiled and components.device.type != "cuda":
        raise UserError("--compile needs a GPU: it has no benefit on a CPU; leave it out")
    unet, vae = components.unet, components.vae
    for model in (components.text_encoder, unet, vae):
        if model is not None:
            model.requires_grad_(False).eval().to(components.device)
    large = components.device.type == "cuda" and components.image_size >= MIN_FUSED_IMAGE_SIZE
    if channels_last is None:
        channels_last = CHANNELS_LAST if large else ()
    encoder = None if vae is None else vae.encoder
    for name, model in (("unet", unet), ("vae", encoder)):
        if model is None:
            continue
        if name in channels_last:
            to_channels_last(model)
        if large:
            fuse_group_norms(model)
            fuse_residual_blocks(model)
    if encoder is not None:
        if vram_O:
            vae.enable_slicing()
            enable_gradient_checkpointing(encoder)
        choose = partial(choose_attention, unet=unet, encoder=encoder, size=components.latent_size, tokens=tokens)
        components.attention = (
            _memory_efficient(choose)
            if vram_O and attention == "auto" and previous is None and components.device.type == "cuda"
            else choose(attention, previous)
        )
    if "unet" in compiled:
        unet.compile(dynamic=False)
    if "vae" in compiled and encoder is not None and not vram_O:
        encoder.compile(dynamic=False)


def _memory_efficient(choose: Callable[[str, AttentionChoice | None], AttentionChoice]) -> AttentionChoice:
    """Choose xformers where it works, else torch's own."""
    try:
        return choose("xformers", None)
    except UserError as error:
        logger.info("%s", error)
        return choose("sdpa", None)


def to_channels_last(model: torch.nn.Module) -> None:
    """Convert `model` and its input to channels-last layout.

    torch's convolution first converts the gradient of its output to the layout of its input. With an input in another
    layout, the gradient of an encoder's first convolution would be transposed twice, half a millisecond at 512 x 512.
    """

    def convert(_: torch.nn.Module, inputs: tuple) -> tuple:
        return inputs[0].contiguous(memory_format=torch.channels_last), *inputs[1:]

    model.to(memory_format=torch.channels_last).register_forward_pre_hook(convert)  # type: ignore[call-overload]


def enable_gradient_checkpointing(encoder: torch.nn.Module) -> None:
    """Let the residual blocks of `encoder` save their inputs alone and recompute the rest in the backward."""
    from diffusers.models.resnet import ResnetBlock2D

    for block in encoder.modules():
        if isinstance(block, (ResnetBlock2D, ResidualBlock)):
            # No random numbers are drawn inside, and reading their state would break the capture of a CUDA graph.
            forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
            block.forward = forward  # type: ignore[method-assign]


def _load(cls: Any, folder: Path, part: str, **options: Any) -> Any:
    """Call `cls.from_pretrained` for one component. Raises UserError: when it fails."""
    try:
        return cls.from_pretrained(folder / part, local_files_only=True, **options)
    except Exception as error:  # settings that the library does not expect raise any of Python's errors
        raise UserError(f"the {part} of the model {folder} does not load: {first_line(error)}") from error


def _load_model(cls: Any, folder: Path, part: str, **options: Any) -> Any:
    """Load a component with weights. Raises UserError: when it fails, or a weight is missing."""
    model, info = _load(cls, folder, part, use_safetensors=True, output_loading_info=True, **options)
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(f"the {part} of the model {folder} lacks {len(missing)} of its weights, such as {missing[0]}")
    return model


def _model_constants(folder: Path, text_width: int, unet: Any, vae: Any | None, scheduler: Any) -> dict[str, Any]:
    """Read sizes and constants from the configurations. Raises UserError: when they do not fit each other."""
    sides = unet.sample_size if isinstance(unet.sample_size, (list, tuple)) else [unet.sample_size]
    if len(set(sides)) != 1 or not isinstance(sides[0], int):
        raise UserError(f"the unet of the model {folder} states no square sample_size ({unet.sample_size})")
    if vae is None:
        if unet.in_channels != 3 or unet.out_channels not in (3, 6):  # 6: three more for a learned variance
            raise UserError(
                f"the unet of the model {folder} maps {unet.in_channels} to {unet.out_channels} channels, but that of "
                "the first stage of IF maps 3 to 6: its later stages enlarge images and cannot guide"
            )
    elif unet.in_channels != vae.latent_channels or unet.out_channels != vae.latent_channels:
        raise UserError(
            f"the unet of the model {folder} maps {unet.in_channels} to {unet.out_channels} channels but its vae has "
            f"{vae.latent_channels}; inpainting and other conditioned models cannot guide"
        )
    expected = unet.encoder_hid_dim or unet.cross_attention_dim  # some project the text to another width first
    if expected != text_width:
        raise UserError(
            f"the text encoder of the model {folder} has width {text_width} but its unet expects {expected}"
        )
    prediction = scheduler.config.prediction_type
    if prediction not in ("epsilon", "v_prediction"):
        raise UserError(f"the model {folder} predicts {prediction!r}; epsilon or v_prediction is needed")
    return {
        "image_size": sides[0] * (1 if vae is None else 2 ** (len(vae.block_out_channels) - 1)),
        "latent_size": sides[0],
        "latent_channels": 3 if vae is None else vae.latent_channels,
        "scaling_factor": 1.0 if vae is None else float(vae.scaling_factor),
        "shift_factor": 0.0 if vae is None else float(vae.get("shift_factor") or 0.0),
        "prediction_type": prediction,
    }


@contextmanager
def quiet_progress() -> Iterator[None]:
    """Inside the `with` block, hide the libraries' progress bars of loading; downloads keep theirs.

    Afterwards the caller's settings are restored: transformers switches the hub's bars together with its own.
    """
    from diffusers.utils import logging as diffusers_logging
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
    from transformers.utils import logging as transformers_logging

    shown = [library for library in (diffusers_logging, transformers_logging) if library.is_progress_bar_enabled()]
    downloads_shown = not are_progress_bars_disabled()
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()
        if not downloads_shown:
            disable_progress_bars()
