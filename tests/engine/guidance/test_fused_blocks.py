"""Fused norms and residual blocks in diffusers' models: the same outputs, gradients and names as the plain modules."""

import copy
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from dream_fast.bench.accuracy import check
from dream_fast.engine.guidance.model import components as loader
from dream_fast.engine.guidance.model.components import Components
from dream_fast.engine.guidance.model.fused_blocks import (
    FusedGroupNorm,
    ResidualBlock,
    fuse_group_norms,
    fuse_residual_blocks,
)

UNET = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "cross_attention_dim": 8,
    "norm_num_groups": 8,
}


def random_unet(**changes) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return spread(UNet2DConditionModel(**(UNET | changes)))


def random_vae() -> AutoencoderKL:
    torch.manual_seed(0)
    channels = (16, 16, 32)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    return spread(AutoencoderKL(block_out_channels=channels, norm_num_groups=8, **blocks))


def spread(model: nn.Module) -> nn.Module:
    """Give norms random weights, since new ones are all 1 and 0."""
    for layer in model.modules():
        if isinstance(layer, nn.GroupNorm):
            nn.init.normal_(layer.weight, 1, 0.3), nn.init.normal_(layer.bias, 0, 0.3)
    return model.requires_grad_(False).eval()


def fused(model: nn.Module) -> nn.Module:
    copied = copy.deepcopy(model)
    norms = sum(isinstance(layer, nn.GroupNorm) for layer in model.modules())
    assert fuse_group_norms(copied) == norms > 0
    assert all(isinstance(layer, FusedGroupNorm) for layer in copied.modules() if isinstance(layer, nn.GroupNorm))
    assert fuse_group_norms(copied) == 0
    return copied


def residual(model: nn.Module) -> nn.Module:
    replaced = fused(model)
    fuse_residual_blocks(replaced)
    return replaced


def blocks_of(model: nn.Module, kind: type) -> int:
    return sum(isinstance(layer, kind) for layer in model.modules())


def unet_of(model: UNet2DConditionModel, sample: torch.Tensor) -> torch.Tensor:
    text = torch.randn(2, 5, model.config.cross_attention_dim, generator=torch.Generator().manual_seed(1))
    return model(sample, torch.tensor([3, 700]), encoder_hidden_states=text.to(sample)).sample


def moments_of(model: AutoencoderKL, image: torch.Tensor) -> torch.Tensor:
    return model.encode(image).latent_dist.parameters


def both(call, plain: nn.Module, other: nn.Module | None, shape: tuple[int, ...], order=torch.contiguous_format):
    """Outputs and gradients of the input, of both models or of one."""
    generator = torch.Generator().manual_seed(2)
    source = torch.randn(shape, generator=generator).contiguous(memory_format=order)
    results = []
    for model in (plain, other):
        if model is None:
            continue
        leaf = source.to(model.dtype, copy=True).requires_grad_()
        out = call(model.to(memory_format=order), leaf)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out)
        results.append((out.detach(), *torch.autograd.grad(out, leaf, upstream)))
    return results


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "changes", [{}, {"resnet_time_scale_shift": "scale_shift"}, {"resnet_skip_time_act": True}, {"act_fn": "gelu"}]
)
def test_the_unet_gives_the_same(changes, order):
    plain = random_unet(**changes)
    for one, two in zip(*both(unet_of, plain, fused(plain), (2, 4, 8, 8), order), strict=True):
        assert one.abs().max() > 0 and torch.equal(one, two)


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_the_encoder_gives_the_same(order):
    plain = random_vae()
    for one, two in zip(*both(moments_of, plain, fused(plain), (1, 3, 32, 32), order), strict=True):
        assert one.abs().max() > 0 and torch.equal(one, two)


def test_the_decoder_gives_the_same():
    plain = random_vae()
    for one, two in zip(*both(lambda vae, z: vae.decode(z).sample, plain, fused(plain), (1, 4, 8, 8)), strict=True):
        assert one.abs().max() > 0 and torch.equal(one, two)


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("call", "make", "shape"), [(unet_of, random_unet, (2, 4, 8, 8)), (moments_of, random_vae, (1, 3, 32, 32))]
)
def test_residual_blocks_give_the_same(call, make, shape, order):
    """Outputs and gradients are as near to fp64 as those of the plain modules."""
    torch.manual_seed(1)
    plain = make()
    for layer in plain.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.bias, 0, 0.3)
    single = both(call, plain, residual(plain), shape, order)
    (exact,) = both(call, copy.deepcopy(plain).double(), None, shape, order)
    for name, reference, result, true in zip(("output", "gradient"), *single, exact, strict=True):
        check(name, result, reference, true)


def test_other_residual_blocks_stay():
    """Other kinds of residual blocks are not replaced."""
    for changes in ({"resnet_time_scale_shift": "scale_shift"}, {"act_fn": "gelu"}):
        model = residual(random_unet(**changes))
        assert blocks_of(model, ResidualBlock) == 0 < blocks_of(model, ResnetBlock2D), changes
    halved, training = fused(random_unet()), fused(random_unet(dropout=0.1)).train()
    for block in halved.modules():
        if isinstance(block, ResnetBlock2D):
            block.output_scale_factor = 2.0
    assert fuse_residual_blocks(halved) == fuse_residual_blocks(training) == 0
    assert fuse_residual_blocks(training.eval()) > 0


@pytest.mark.parametrize("make", [random_unet, random_vae])
def test_names_and_weights_stay(make):
    model = make()
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    fuse_group_norms(model)
    fuse_residual_blocks(model)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before
    assert not model.training and not any(layer.training for layer in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.load_state_dict(make().state_dict())


def test_silu_fused_into_norms():
    """SiLU is fused into the norms before it."""
    model = random_unet()
    fuse_group_norms(model)
    found = {name: layer.silu for name, layer in model.named_modules() if isinstance(layer, FusedGroupNorm)}
    assert {name.split(".")[-1] for name, silu in found.items() if silu} == {"norm1", "norm2", "conv_norm_out"}
    assert {name.split(".")[-1] for name, silu in found.items() if not silu} == {"norm"}  # in front of attention
    # What is left of SiLU belongs to the embedding of the time.
    assert [name for name, layer in model.named_modules() if isinstance(layer, nn.SiLU)] == ["time_embedding.act"]


def test_stable_diffusions_own_sizes():
    """UNet and encoder of 2.1-base have 22 and 10 residual blocks, a last norm each, 16 and 1 attentions."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            attention_head_dim=(5, 10, 20, 20), cross_attention_dim=1024, sample_size=64, use_linear_projection=True
        )
        encoder = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        ).encoder
    for model, blocks, attentions in ((unet, 22, 16), (encoder, 10, 1)):
        names = list(model.state_dict())
        assert fuse_group_norms(model) == 2 * blocks + 1 + attentions and list(model.state_dict()) == names
        silu = [layer.silu for layer in model.modules() if isinstance(layer, FusedGroupNorm)]
        assert silu.count(True) == 2 * blocks + 1
        assert fuse_residual_blocks(model) == blocks and fuse_residual_blocks(model) == 0
        assert list(model.state_dict()) == names


def kinds(components: Components) -> set[type]:
    models = (components.unet, components.vae)
    return {type(layer) for model in models for layer in model.modules() if isinstance(layer, nn.GroupNorm)}


def test_a_model_on_the_cpu_keeps_its_own(tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loader, "MIN_FUSED_IMAGE_SIZE", 0)
    assert kinds(loader.load_components(tiny_model, "cpu")) == {nn.GroupNorm}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="on a CPU the loader leaves the norms as they are")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_large_model_on_gpu(tiny_model: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """Encoder, its gradient and UNet are as near to fp64 as the plain modules."""
    for switch in (torch.backends.cuda.matmul, torch.backends.cudnn):
        monkeypatch.setattr(switch, "allow_tf32", False)
    plain = loader.load_components(tiny_model, "cuda", dtype)
    assert kinds(plain) == {nn.GroupNorm}  # made for 32 x 32 pixels
    monkeypatch.setattr(loader, "MIN_FUSED_IMAGE_SIZE", 32)
    prepared = loader.load_components(tiny_model, "cuda", dtype)
    assert kinds(prepared) == {FusedGroupNorm}
    assert blocks_of(prepared.unet, ResidualBlock) > 0 and blocks_of(prepared.vae, ResidualBlock) > 0
    exact = loader.load_components(tiny_model, "cpu", torch.float64)
    image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    latent = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    text = torch.randn(2, 77, 32, generator=torch.Generator().manual_seed(2))
    gradients = []
    for model in (prepared, plain, exact):
        to = {"device": model.device, "dtype": model.dtype}
        leaf = image.to(**to).requires_grad_()
        moments = model.vae.encode(leaf).latent_dist.parameters
        (grad,) = torch.autograd.grad(moments.square().sum(), leaf)
        time = torch.tensor([3, 700], device=model.device)
        noise = model.unet(latent.to(**to), time, encoder_hidden_states=text.to(**to)).sample
        gradients.append([tensor.detach().cpu() for tensor in (moments, grad, noise)])
    for name, got, single, true in zip(("moments", "gradient", "noise"), *gradients, strict=True):
        check(name, got, single, true)
