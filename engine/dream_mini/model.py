"""dream-mini's architecture: the components of a Stable Diffusion pipeline, small, and the folder that holds them."""

import json
import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dream_fast.engine.dream_mini.vocabulary import words
from dream_fast.engine.runtime.quiet import quiet_diffusers

quiet_diffusers()
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel  # noqa: E402

IMAGE, LATENT, TOKENS, WIDTH = 128, 32, 24, 192


def save_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer whose byte-pair merges make one token of each known word; other words fall into letters."""
    merges = _merges([*words(), ","])
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merged = ["".join(pair) for pair in merges]
    full = dict.fromkeys(
        [*letters, *(f"{letter}</w>" for letter in letters), *merged, "<|startoftext|>", "<|endoftext|>"]
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(full)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n")
    clip = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=TOKENS)
    clip.save_pretrained(folder)
    return clip


def _merges(vocabulary: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges (Sennrich et al. 2016) until each word is one token, the same ones every time.

    (The trainer of the tokenizers library breaks ties in the order of a hash table, another one in every process, and
    training resumed from its cache needs the tokens of that cache.)
    """
    pieces = [[*word[:-1], f"{word[-1]}</w>"] for word in vocabulary]
    merges = []
    while counts := Counter(pair for tokens in pieces for pair in pairwise(tokens)):
        pair = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(pair)
        for tokens in pieces:
            for k in range(len(tokens) - 2, -1, -1):
                if tuple(tokens[k : k + 2]) == pair:
                    tokens[k : k + 2] = ["".join(pair)]
    return merges


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=4 * WIDTH, projection_dim=WIDTH,
        num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=TOKENS, hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return CLIPTextModel(config)


def make_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 48, 64), layers_per_block=1, latent_channels=4, norm_num_groups=8, sample_size=IMAGE,
    )  # fmt: skip


def make_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=LATENT, in_channels=4, out_channels=4, block_out_channels=(64, 128, 160), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH, attention_head_dim=4, norm_num_groups=16, use_linear_projection=True,
    )  # fmt: skip


def make_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, prediction_type="v_prediction", steps_offset=1,
    )  # fmt: skip


def save_model(folder: Path, tokenizer, text_encoder, unet, vae, scheduler) -> None:
    """Write the folder in the layout of `StableDiffusionPipeline.from_pretrained`, in fp16 shards of 12 MB at most."""
    for name, part in (("text_encoder", text_encoder), ("unet", unet), ("vae", vae)):
        shutil.rmtree(folder / name, ignore_errors=True)
        part.half().save_pretrained(folder / name, max_shard_size="12MB")
        config = json.loads((folder / name / "config.json").read_text())
        config.pop("_name_or_path", None)  # where a part was loaded from is nobody's business
        (folder / name / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for file in (folder / name).iterdir():
            file.chmod(0o644)
    tokenizer.save_pretrained(folder / "tokenizer")
    scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def parameters(part: torch.nn.Module) -> int:
    return sum(p.numel() for p in part.parameters())
