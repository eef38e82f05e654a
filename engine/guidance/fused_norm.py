"""One kernel for the group normalisations of an image model and the SiLU behind them, in place of two and more.

diffusers' blocks call a norm and then an activation, which write and read every feature map once more than is needed.
`fuse_group_norms` puts modules of our own in their place: the norm computes both (`dream_fast.kernels.group_norm_silu`)
and the activation does nothing. Parameters stay the same objects under the same names, so weights load and save as
before. For tensors on a CPU results are the same bit for bit; on a GPU the kernels round once where torch rounds twice.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from dream_fast.kernels import group_norm_silu


class FusedGroupNorm(nn.GroupNorm):
    """nn.GroupNorm, with SiLU behind it where ``silu``."""

    def __init__(self, norm: nn.GroupNorm, *, silu: bool) -> None:
        super().__init__(norm.num_groups, norm.num_channels, norm.eps, device="meta")
        self.weight, self.bias, self.silu = norm.weight, norm.bias, silu
        self.train(norm.training)

    def forward(self, input: Tensor) -> Tensor:
        return group_norm_silu(input, self.num_groups, self.weight, self.bias, self.eps, self.silu)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, silu={self.silu}"


class SiluLinear(nn.Linear):
    """nn.Linear with SiLU in front of it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(F.silu(input), self.weight, self.bias)


def fuse_group_norms(model: nn.Module) -> int:
    """Replace the group normalisations inside ``model``, a UNet or VAE of diffusers; how many there were.

    SiLU moves into the norms of residual blocks and into the last norm of a UNet, an encoder and a decoder. Norms of
    attention, and those of residual blocks that scale and shift by the time between norm and SiLU, stay without.
    """
    from diffusers import UNet2DConditionModel
    from diffusers.models.autoencoders.vae import Decoder, Encoder
    from diffusers.models.resnet import ResnetBlock2D

    fused = 0
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
            # The block applies its activation to the embedding of the time as well.
            block.time_emb_proj = SiluLinear(block.time_emb_proj)
        fused += len(norms)
    for block in list(model.modules()):
        for name, layer in list(block.named_children()):
            if _is_plain_norm(layer):
                setattr(block, name, FusedGroupNorm(layer, silu=False))
                fused += 1
    return fused


def _is_plain_norm(layer: nn.Module | None) -> bool:
    """Whether this is torch's group normalisation, with weights; others compute something else."""
    return type(layer) is nn.GroupNorm and layer.affine
