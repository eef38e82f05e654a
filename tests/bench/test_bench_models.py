"""`bench models`: true sizes, and a tiny model through a guidance step."""

import torch

from dream_fast.bench.pipeline.models import CASES, FLOW, Case, prompt_of, random_model
from dream_fast.engine.config.sections import GuidanceConfig
from dream_fast.engine.guidance.sds import ScoreDistillation

# Millions of parameters of each network, as its publishers state them.
PUBLISHED = {"sdxl": 2567, "sd3.5-medium": 2243, "prx-512": 1170, "flux2-klein-4b": 3875}


def test_sizes_are_those_of_the_models() -> None:
    """The networks have the parameters of the models that they stand for."""
    import diffusers

    sizes = {}
    for name, case in CASES.items():
        with torch.device("meta"):
            network = getattr(diffusers, case.network[0])(**case.network[1])
        sizes[name] = sum(p.numel() for p in network.parameters()) // 10**6
    assert sizes == PUBLISHED


def test_tiny_case_gives_a_gradient() -> None:
    """A model without files goes through a guidance step."""
    tiny = Case(
        "StableDiffusion3Pipeline",
        (
            "SD3Transformer2DModel",
            dict(
                sample_size=8, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
                caption_projection_dim=16, joint_attention_dim=32, pooled_projection_dim=8, pos_embed_max_size=8,
            ),
        ),
        (
            "AutoencoderKL",
            dict(
                block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4,
                up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, norm_num_groups=4,
            ),
        ),
        FLOW,
        {"states": (5, 32), "pooled": (8,)},
    )  # fmt: skip
    model = random_model(tiny, torch.device("cpu"))
    assert (model.latent_channels, model.latent_size, model.image_size) == (4, 8, 16)
    image = torch.rand(1, 3, 32, 32).requires_grad_()
    score = ScoreDistillation(model, GuidanceConfig())
    score(image, prompt_of(tiny, model, 0), prompt_of(tiny, model, 1)).loss.backward()
    assert image.grad.abs().max() > 0
