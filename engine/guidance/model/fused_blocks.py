"""Fuse norms, activations, biases and residuals of an image model, to save passes over its feature maps.

diffusers' blocks call a norm and then an activation, which write and read every feature map once more than necessary.
`fuse_group_norms` replaces them: the norm computes both (`dream_fast.kernels.group_norm_silu`) and the activation
becomes the identity. On a CPU results are the same bit for bit; on a GPU the kernels round once where torch rounds
twice.

A convolution adds its bias in another pass, and a residual block divides its sum by a factor that is 1.
`fuse_residual_blocks` adds the first bias and the time embedding in the following norm, and the second bias together
with the residual (`dream_fast.kernels.bias_residual`).

Parameters stay the same objects under the same names, so weights load and save as before.
"""

from typing import TypeGuard

import torch.nn.functional as F
from torch import Tensor, nn

from dream_fast.kernels import bias_residual, group_norm_silu


class FusedGroupNorm(nn.GroupNorm):
    """nn.GroupNorm, followed by SiLU with `silu`."""

    def __init__(self, norm: nn.GroupNorm, *, silu: bool) -> None:
        super().__init__(norm.num_groups, norm.num_channels, norm.eps, device="meta")
        self.weight, self.bias, self.silu = norm.weight, norm.bias, silu
        self.train(norm.training)

    def forward(self, input: Tensor, added: Tensor | None = None) -> Tensor:
        """Normalise `input` [N, C, ...], to which `added` [N, C] is added first."""
        return group_norm_silu(input, self.num_groups, self.weight, self.bias, self.eps, self.silu, added)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, silu={self.silu}"


class SiluLinear(nn.Linear):
    """nn.Linear after SiLU."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(F.silu(input), self.weight, self.bias)


class ResidualBlock(nn.Module):
    """Residual block of diffusers with fused norms; the operators after its convolutions add their biases."""

    PARTS = ("norm1", "conv1", "time_emb_proj", "norm2", "conv2", "conv_shortcut")

    norm1: FusedGroupNorm
    conv1: nn.Conv2d
    time_emb_proj: nn.Module | None
    norm2: FusedGroupNorm
    conv2: nn.Conv2d
    conv_shortcut: nn.Conv2d | None

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        for name in self.PARTS:
            setattr(self, name, getattr(block, name))
        self.train(block.training)

    def forward(self, input: Tensor, temb: Tensor | None = None) -> Tensor:
        """Map `input` [N, C, H, W] and the time embedding `temb` [N, E] or None to [N, D, H, W]."""
        added = _bias(self.conv1).expand(len(input), -1)
        if self.time_emb_proj is not None and temb is not None:
            added = added + self.time_emb_proj(temb)
        hidden = self.norm2(_without_bias(self.conv1, self.norm1(input)), added)
        bias, residual = _bias(self.conv2), input
        if self.conv_shortcut is not None:
            bias, residual = bias + _bias(self.conv_shortcut), _without_bias(self.conv_shortcut, input)
        return bias_residual(_without_bias(self.conv2, hidden), bias, residual)


def _bias(conv: nn.Conv2d) -> Tensor:
    assert conv.bias is not None
    return conv.bias


def _without_bias(conv: nn.Conv2d, input: Tensor) -> Tensor:
    return conv._conv_forward(input, conv.weight, None)


def fuse_group_norms(model: nn.Module) -> int:
    """Replace the group norms inside `model`, a UNet or VAE of diffusers; returns their number.

    SiLU moves into the norms of residual blocks and into the last norm of a UNet, an encoder and a decoder. Norms of
    attention, and of residual blocks with a scale and shift between norm and SiLU, stay without.
    """
    from diffusers import UNet2DConditionModel
    from diffusers.models.autoencoders.vae import Decoder, Encoder
    from diffusers.models.resnet import ResnetBlock2D

    fused = 0
    norms: tuple[str, ...]
    for block in list(model.modules()):
        if isinstance(block, ResnetBlock2D):
            norms, activation = ("norm1", "norm2"), "nonlinearity"
            if block.time_embedding_norm == "scale_shift":
                continue
        elif isinstance(block, (UNet2DConditionModel, Encoder, Decoder)):
            norms, activation = ("conv_norm_out",), "conv_act"
        else:
            continue
        silu = getattr(block, activation)
        if type(silu) is not nn.SiLU or not all(_is_plain_norm(getattr(block, name)) for name in norms):
            continue
        for name in norms:
            setattr(block, name, FusedGroupNorm(getattr(block, name), silu=True))
        setattr(block, activation, nn.Identity().train(silu.training))
        if isinstance(block, ResnetBlock2D) and block.time_emb_proj is not None and not block.skip_time_act:
            # The block also applies its activation to the time embedding.
            block.time_emb_proj = SiluLinear(block.time_emb_proj)
        fused += len(norms)
    for block in list(model.modules()):
        for name, layer in list(block.named_children()):
            if _is_plain_norm(layer):
                setattr(block, name, FusedGroupNorm(layer, silu=False))
                fused += 1
    return fused


def _is_plain_norm(layer: nn.Module | None) -> TypeGuard[nn.GroupNorm]:
    """Return whether this is torch's group norm, with weights."""
    return type(layer) is nn.GroupNorm and layer.affine


def fuse_residual_blocks(model: nn.Module) -> int:
    """Replace the residual blocks inside `model`, whose norms `fuse_group_norms` has replaced; returns their number.

    Blocks that resize, scale, use the time embedding other than by adding it, or have active dropout stay as they are.
    """
    from diffusers.models.resnet import ResnetBlock2D

    fused = 0
    for parent in list(model.modules()):
        for name, block in list(parent.named_children()):
            if isinstance(block, ResnetBlock2D) and _is_plain_block(block):
                setattr(parent, name, ResidualBlock(block))
                fused += 1
    return fused


def _is_plain_block(block: nn.Module) -> bool:
    """Return whether `ResidualBlock` is equivalent to this residual block."""
    norms, convolutions = (block.norm1, block.norm2), (block.conv1, block.conv2, block.conv_shortcut)
    return (
        all(isinstance(norm, FusedGroupNorm) and norm.silu for norm in norms)
        and all(conv is None or type(conv) is nn.Conv2d and conv.bias is not None for conv in convolutions)
        and block.upsample is None
        and block.downsample is None
        and (block.time_emb_proj is None or isinstance(block.time_emb_proj, SiluLinear))
        and block.output_scale_factor == 1
        and (block.dropout.p == 0 or not block.training)
    )
