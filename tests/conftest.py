"""Fixtures that several test files share.

`tiny_model` is a text-to-image model that nobody trained, in the folder layout that every Stable Diffusion has: small
enough that a guided step costs a few milliseconds, yet made of the very classes that the loader expects.
"""

import copy
import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Nothing in the tests may wait for a network; the hub's client reads this once, when it is first imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

TINY_IMAGE = 32  # pixels
TINY_WIDTH = 32  # of the text embedding


def byte_alphabet() -> list[str]:
    """The 256 printable characters that byte-level BPE writes bytes as (GPT-2's table), sorted."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = 256 - len(printable)
    return sorted(chr(code) for code in printable + [256 + i for i in range(others)])


def write_tokenizer(folder: Path, *, window: int = 77, vocabulary_size: int | None = None) -> int:
    """Write a CLIP tokenizer without merges (a token a byte) in `folder`; returns the number of its tokens.

    `vocabulary_size` fills the vocabulary up to that size with words that never occur, end of text last, as in CLIP.
    """
    folder.mkdir(parents=True)
    tokens = [character + ending for ending in ("", "</w>") for character in byte_alphabet()]
    if vocabulary_size is not None:
        tokens += [f"\u0120unused{i}" for i in range(vocabulary_size - 2 - len(tokens))]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": window,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return len(tokens)


def write_tiny_model(folder: Path, *, prediction_type: str = "epsilon", seed: int = 0) -> Path:
    """Save a random model in the Stable Diffusion folder layout: images 32 x 32, latents 4 x 8 x 8, width 32."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    tokens = write_tokenizer(folder / "tokenizer")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=tokens,
                hidden_size=TINY_WIDTH,
                intermediate_size=2 * TINY_WIDTH,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=77,
                bos_token_id=tokens - 2,
                eos_token_id=tokens - 1,
                pad_token_id=tokens - 1,
            )
        )
        unet = UNet2DConditionModel(
            sample_size=TINY_IMAGE // 4,
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            attention_head_dim=2,
            cross_attention_dim=TINY_WIDTH,
            norm_num_groups=8,
        )
        vae = AutoencoderKL(
            block_out_channels=(16, 16, 32),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=8,
            sample_size=TINY_IMAGE,
        )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    text_encoder.save_pretrained(folder / "text_encoder")
    unet.save_pretrained(folder / "unet")
    vae.save_pretrained(folder / "vae")
    scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def write_tiny_if_model(folder: Path, *, seed: int = 0) -> Path:
    """Save a random model in the layout of IF's first stage: pixels 3 x 16 x 16, text width 24, a letter a token."""
    import torch
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        ("\u2581", -2.0),
        (",", -3.0),
        *((x, -3.0) for x in letters),
    ]
    tokenizer = T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        text_encoder = T5EncoderModel(
            T5Config(
                vocab_size=len(tokenizer),
                d_model=24,
                d_kv=8,
                d_ff=32,
                num_layers=2,
                num_heads=2,
                feed_forward_proj="gated-gelu",
            )
        )
        unet = UNet2DConditionModel(
            sample_size=16,
            in_channels=3,
            out_channels=6,
            act_fn="gelu",
            addition_embed_type="text",
            addition_embed_type_num_heads=2,
            attention_head_dim=8,
            block_out_channels=(16, 32),
            cross_attention_dim=32,
            cross_attention_norm="group_norm",
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            encoder_hid_dim=24,
            encoder_hid_dim_type="text_proj",
            layers_per_block=1,
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            norm_num_groups=8,
            resnet_time_scale_shift="scale_shift",
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        )
    tokenizer.save_pretrained(folder / "tokenizer")
    text_encoder.save_pretrained(folder / "text_encoder")
    unet.save_pretrained(folder / "unet")
    schedule = dict(beta_schedule="squaredcos_cap_v2", variance_type="learned_range", thresholding=True)
    DDPMScheduler(**schedule).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "IFPipeline",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDPMScheduler"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "watermarker": [None, None],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def write_tiny_clip(folder: Path, *, seed: int = 0) -> Path:
    """Save a random CLIP: images 24 x 24, 16 numbers for an image or a text."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    tokens = write_tokenizer(folder)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    ends = dict(bos_token_id=tokens - 2, eos_token_id=tokens - 1, pad_token_id=tokens - 1)
    text = sizes | ends | dict(vocab_size=tokens, max_position_embeddings=77)
    vision = sizes | dict(image_size=24, patch_size=8)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_if_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random model that works on pixels, like IF."""
    return write_tiny_if_model(tmp_path_factory.mktemp("models") / "tiny-if")


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random CLIP."""
    return write_tiny_clip(tmp_path_factory.mktemp("models") / "tiny-clip")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random noise-predicting model that loads with `load_components` in a fraction of a second."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_velocity_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `tiny_model`, predicting velocity."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny-v", prediction_type="v_prediction")


@pytest.fixture(scope="session")
def tokenizer_writer() -> Callable[..., int]:
    """`write_tokenizer`, for tests that build their own model (tests cannot import this file)."""
    return write_tokenizer


@pytest.fixture(scope="session")
def in_fp64() -> Callable[..., Any]:
    """A function that copies the `Components` of a model in fp64; results of the copy count as exact."""
    import torch

    def copied(components):
        names = ("unet", "vae", "text_encoder")
        models = {name: copy.deepcopy(getattr(components, name)) for name in names}
        models = {name: None if model is None else model.double() for name, model in models.items()}
        return dataclasses.replace(components, **models, dtype=torch.float64)

    return copied


@pytest.fixture(scope="session")
def mse_distillation() -> type:
    """A `ScoreDistillation` whose gradient is the derivative of 1/2 |z - stopgrad(z - g)|^2 / B, by torch's autograd
    through the encoder: an oracle for the gradient that is injected."""
    import torch

    from dream_fast.engine.guidance.base import GuidanceResult, StepInputs
    from dream_fast.engine.guidance.sds import Prompts, ScoreDistillation, distillation_gradient

    class MseDistillation(ScoreDistillation):
        def __call__(self, images, cond, uncond, inputs=None, negatives=None):
            inputs = inputs or StepInputs()
            draws, prompts = self.draw(len(images), inputs), Prompts(cond, uncond, negatives)
            scalars = self.scheduled_scalars(inputs.step, inputs.progress)
            with torch.autocast(images.device.type, enabled=False):
                z = self.encode(images, draws.vae_noise)
                latent = distillation_gradient(self.components, self.config, z.detach(), draws, prompts, scalars)
                loss = 0.5 * (z - (z - latent.gradient).detach()).square().sum() / len(images)
            return GuidanceResult(loss, draws.t, torch.linalg.vector_norm(latent.gradient), *latent)

    return MseDistillation


@pytest.fixture(scope="session")
def pixels_inside() -> Callable[..., int]:
    """A function that counts the pixels whose centres lie in triangles, those in two of them twice."""
    import numpy as np

    def counted(uv, faces, resolution: int) -> int:
        count = 0
        corners = uv.astype(float)[faces] * resolution  # [T, 3, 2]
        first = np.floor(corners.min(axis=1)).astype(int)
        last = np.ceil(corners.max(axis=1)).astype(int)
        for triangle, low, high in zip(corners, first, last, strict=True):
            x, y = (np.arange(a, b) + 0.5 for a, b in zip(low, high, strict=True))
            sides = []
            for k in range(3):
                (ax, ay), (bx, by) = triangle[k], triangle[(k + 1) % 3]
                sides.append((bx - ax) * (y[:, None] - ay) - (by - ay) * (x[None] - ax))
            # Rounding of a few ulps decides about middles on an edge: they are inside of none.
            edge = 1e-6 * resolution
            inside = np.min(sides, axis=0) > edge
            count += int((inside | (np.max(sides, axis=0) < -edge)).sum())
        return count

    return counted


@pytest.fixture
def nothing_read():
    """A context in which reading a tensor's value on the host fails, or an operator whose shape depends on values.

    On a GPU each of them would wait for the device, and could not be captured in a CUDA graph.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    class NothingRead(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            name = operator.overloadpacket.__name__
            assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "index", "index_put_"), name
            return operator(*args, **(kwargs or {}))

    return NothingRead()
