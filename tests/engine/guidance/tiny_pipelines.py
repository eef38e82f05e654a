"""Small pipelines of diffusers with random weights, one of each family: the true classes, written to a folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WIDTH = 16  # of text states
LETTERS = [chr(code) for code in range(32, 127)]
CHAT = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"


def letter_tokenizer(length: int, *, end: bool = True) -> Any:
    """A tokenizer with a token for each printable letter, and with a chat template."""
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<end>", "<unk>", *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if end:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 1)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<unk>", model_max_length=length
    )
    fast.chat_template = CHAT
    fast.padding_side = "right"
    return fast


def clip_encoder(cls: type, width: int = WIDTH) -> Any:
    """A CLIP text encoder for `letter_tokenizer`."""
    config = transformers.CLIPTextConfig(
        bos_token_id=0, eos_token_id=1, pad_token_id=0, vocab_size=100, hidden_size=width, intermediate_size=32,
        num_attention_heads=2, num_hidden_layers=3, projection_dim=width, max_position_embeddings=77,
    )  # fmt: skip
    return cls(config)


def t5_encoder(width: int = WIDTH) -> Any:
    """A T5 encoder for `letter_tokenizer`."""
    return transformers.T5EncoderModel(
        transformers.T5Config(vocab_size=100, d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    )


def autoencoder(channels: int, blocks: int = 2, **settings: Any) -> Any:
    """A VAE that halves images `blocks` - 1 times."""
    return diffusers.AutoencoderKL(
        block_out_channels=(8,) * blocks, down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks, layers_per_block=1, latent_channels=channels, norm_num_groups=4,
        sample_size=16, **{"scaling_factor": 0.7, "shift_factor": 0.1} | settings,
    )  # fmt: skip


def compressing_autoencoder(channels: int) -> Any:
    """A DC-AE that halves images once."""
    return diffusers.AutoencoderDC(
        in_channels=3, latent_channels=channels, attention_head_dim=2, encoder_block_types=("ResBlock",) * 2,
        decoder_block_types=("ResBlock",) * 2, encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()), encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1), upsample_block_type="interpolate", downsample_block_type="stride_conv",
        decoder_norm_types="rms_norm", decoder_act_fns="silu", scaling_factor=0.4,
    )  # fmt: skip


def flow_scheduler(**settings: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**settings)


def sdxl() -> Any:
    return diffusers.StableDiffusionXLPipeline(
        vae=autoencoder(4, scaling_factor=0.13, shift_factor=None),
        text_encoder=clip_encoder(transformers.CLIPTextModel),
        text_encoder_2=clip_encoder(transformers.CLIPTextModelWithProjection),
        tokenizer=letter_tokenizer(77),
        tokenizer_2=letter_tokenizer(77),
        unet=diffusers.UNet2DConditionModel(
            sample_size=8, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=2 * WIDTH,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), norm_num_groups=8, attention_head_dim=(2, 4),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=8, transformer_layers_per_block=(1, 2),
            projection_class_embeddings_input_dim=6 * 8 + WIDTH,
        ),
        scheduler=diffusers.DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False
        ),
        force_zeros_for_empty_prompt=True,
    )  # fmt: skip


def sd3() -> Any:
    return diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
            caption_projection_dim=WIDTH, joint_attention_dim=2 * WIDTH, pooled_projection_dim=2 * WIDTH,
            out_channels=4, pos_embed_max_size=8,
        ),
        scheduler=flow_scheduler(shift=3.0),
        vae=autoencoder(4),
        text_encoder=clip_encoder(transformers.CLIPTextModelWithProjection),
        tokenizer=letter_tokenizer(77),
        text_encoder_2=clip_encoder(transformers.CLIPTextModelWithProjection),
        tokenizer_2=letter_tokenizer(77),
        text_encoder_3=t5_encoder(2 * WIDTH),
        tokenizer_3=letter_tokenizer(256),
    )  # fmt: skip


def prx() -> Any:
    module = transformers.models.t5gemma
    config = module.T5GemmaModuleConfig(
        vocab_size=100, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=256, layer_types=["full_attention"],
        query_pre_attn_scalar=8, dropout_rate=0.0,
    )  # fmt: skip
    return diffusers.PRXPipeline(
        transformer=diffusers.PRXTransformer2DModel(
            patch_size=2, in_channels=4, context_in_dim=WIDTH, hidden_size=16, mlp_ratio=2.0, num_heads=2, depth=2,
            axes_dim=[4, 4],
        ),
        scheduler=flow_scheduler(shift=3.0),
        text_encoder=module.modeling_t5gemma.T5GemmaEncoder(config),
        tokenizer=letter_tokenizer(256),
        vae=autoencoder(4),
        default_sample_size=16,
    )  # fmt: skip


def flux() -> Any:
    return diffusers.FluxPipeline(
        scheduler=flow_scheduler(use_dynamic_shifting=True),
        vae=autoencoder(4),
        text_encoder=clip_encoder(transformers.CLIPTextModel),
        tokenizer=letter_tokenizer(77),
        text_encoder_2=t5_encoder(),
        tokenizer_2=letter_tokenizer(512),
        transformer=diffusers.FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=[4, 4, 8],
            guidance_embeds=True,
        ),
    )  # fmt: skip


def qwen3(cls: type) -> Any:
    return cls(
        transformers.Qwen3Config(
            hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=28, num_attention_heads=2, head_dim=8,
            num_key_value_heads=2, vocab_size=100, max_position_embeddings=512,
        )
    )  # fmt: skip


def flux2_klein() -> Any:
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4, sample_size=16,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, latent_channels=4,
    )  # fmt: skip
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    return diffusers.Flux2KleinPipeline(
        scheduler=flow_scheduler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=qwen3(transformers.Qwen3ForCausalLM),
        tokenizer=letter_tokenizer(512, end=False),
        transformer=diffusers.Flux2Transformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=3 * WIDTH, axes_dims_rope=[4, 4, 4, 4], guidance_embeds=False,
        ),
    )  # fmt: skip


def z_image() -> Any:
    return diffusers.ZImagePipeline(
        scheduler=flow_scheduler(use_dynamic_shifting=True),
        vae=autoencoder(16),
        text_encoder=qwen3(transformers.Qwen3Model),
        tokenizer=letter_tokenizer(512, end=False),
        transformer=diffusers.ZImageTransformer2DModel(
            in_channels=16, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=WIDTH,
            axes_dims=[8, 4, 4], axes_lens=[512, 64, 64],
        ),
    )  # fmt: skip


def gemma2() -> Any:
    return transformers.Gemma2Model(
        transformers.Gemma2Config(
            vocab_size=100, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, max_position_embeddings=1024,
        )
    )  # fmt: skip


def lumina2() -> Any:
    return diffusers.Lumina2Pipeline(
        transformer=diffusers.Lumina2Transformer2DModel(
            sample_size=16, patch_size=2, in_channels=4, hidden_size=24, num_layers=2, num_refiner_layers=1,
            num_attention_heads=3, num_kv_heads=1, axes_dim_rope=(4, 2, 2), axes_lens=(300, 64, 64),
            cap_feat_dim=WIDTH, multiple_of=16,
        ),
        scheduler=flow_scheduler(use_dynamic_shifting=True),
        vae=autoencoder(4),
        text_encoder=gemma2(),
        tokenizer=letter_tokenizer(256),
    )  # fmt: skip


def pixart_sigma() -> Any:
    return diffusers.PixArtSigmaPipeline(
        tokenizer=letter_tokenizer(300),
        text_encoder=t5_encoder(),
        vae=autoencoder(4, scaling_factor=0.13, shift_factor=None),
        transformer=diffusers.PixArtTransformer2DModel(
            sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=2,
            caption_channels=WIDTH, in_channels=4, cross_attention_dim=16, out_channels=8, attention_bias=True,
            activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_type="ada_norm_single",
            norm_elementwise_affine=False, norm_eps=1e-6,
        ),
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
    )  # fmt: skip


def sana() -> Any:
    return diffusers.SanaPipeline(
        tokenizer=letter_tokenizer(300),
        text_encoder=gemma2(),
        vae=compressing_autoencoder(4),
        transformer=diffusers.SanaTransformer2DModel(
            patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=8,
            num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=WIDTH,
            sample_size=16,
        ),
        scheduler=flow_scheduler(shift=3.0),
    )  # fmt: skip


def qwen_image() -> Any:
    text = dict(
        hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=100, rope_scaling={"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
    )  # fmt: skip
    vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=16)
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, vocab_size=100)
    return diffusers.QwenImagePipeline(
        scheduler=flow_scheduler(use_dynamic_shifting=True),
        vae=diffusers.AutoencoderKLQwenImage(
            base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
            latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.5, 1.0, 2.0],
        ),
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=letter_tokenizer(1024, end=False),
        transformer=diffusers.QwenImageTransformer2DModel(
            patch_size=2, in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=WIDTH, axes_dims_rope=(8, 4, 4),
        ),
    )  # fmt: skip


BUILDERS: dict[str, Callable[[], Any]] = {
    "StableDiffusionXLPipeline": sdxl,
    "StableDiffusion3Pipeline": sd3,
    "PRXPipeline": prx,
    "FluxPipeline": flux,
    "Flux2KleinPipeline": flux2_klein,
    "ZImagePipeline": z_image,
    "Lumina2Pipeline": lumina2,
    "PixArtSigmaPipeline": pixart_sigma,
    "SanaPipeline": sana,
    "QwenImagePipeline": qwen_image,
}


def write_tiny_pipeline(name: str, folder: Path, seed: int = 0) -> Path:
    """Save a random pipeline of that class to `folder`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipeline = BUILDERS[name]()
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                _spread(part)
    pipeline.save_pretrained(folder, safe_serialization=True)
    if name == "PRXPipeline":  # whose loader reads the encoder's settings from those of a whole T5Gemma
        encoder = pipeline.text_encoder.config
        config = transformers.models.t5gemma.T5GemmaConfig(encoder=encoder, is_encoder_decoder=False)
        config.save_pretrained(folder / "text_encoder")
    return folder


@torch.no_grad()
def _spread(module: torch.nn.Module) -> None:
    """Give weights that start at zero, such as those of gates, random values, so that every part has an effect."""
    for parameter in module.parameters():
        if parameter.std() < 1e-6 if parameter.numel() > 1 else parameter == 0:
            parameter.add_(torch.randn_like(parameter) * 0.2)
