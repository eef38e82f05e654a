"""The field of the backbone `vanilla`: a frequency encoding and a residual MLP, in plain PyTorch.

    h_1 = relu(W_1 enc(x) + b_1);  h_l = silu(h_{l-1} + norm(W_l h_{l-1} + b_l));  out = W_L h_{L-1} + b_L
    sigma = act(out_0 + blob(x)), albedo = sigmoid(out_1..3), act and blob as in `dream_fast.kernels.field`

norm is layer normalisation with a scale and a shift. The background: a frequency encoding (4 bands) and 27 -> 32 -> 3.
Source: Mildenhall et al., NeRF, 2020 (the encoding); stable-dreamfusion, nerf/network.py (the network).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dream_fast import kernels
from dream_fast.engine.config.sections import FieldConfig
from dream_fast.engine.scene.field import Field, FieldOutput, frequency_encoding, linear_layers


class FrequencyField(Field):
    """A frequency MLP. Encoding, normalisation, blob and results are fp32; the products are in `compute_dtype`."""

    background_bands = 4

    def __init__(self, config: FieldConfig, bound: float, generator: torch.Generator):
        super().__init__(config, bound)
        self.bands = config.n_frequencies
        width, layers = config.hidden_width, config.hidden_layers
        self.weights, self.biases = linear_layers([3 + 6 * self.bands, *[width] * layers, 4], generator)
        residual = max(0, layers - 1)
        self.scales = nn.ParameterList(torch.ones(width, device=generator.device) for _ in range(residual))
        self.shifts = nn.ParameterList(torch.zeros(width, device=generator.device) for _ in range(residual))
        self._add_background(generator)

    def _network(self, x: Tensor, active: int | Tensor | None) -> tuple[Tensor, Tensor]:
        """Logits of the density [N], including the blob, and of the albedo [N, 3]."""
        h = frequency_encoding(x, self.bands, active)
        for layer in range(len(self.weights) - 1):
            out = self._linear(h, layer)
            if layer == 0:
                h = F.relu(out)
            else:
                norm = F.layer_norm(out, out.shape[1:], self.scales[layer - 1], self.shifts[layer - 1])
                h = F.silu(h + norm)
        out = self._linear(h, len(self.weights) - 1)
        return kernels.density_logit(x, out[:, 0], self.spec), out[:, 1:]

    def _linear(self, h: Tensor, layer: int) -> Tensor:
        dtype = self.compute_dtype or h.dtype
        return F.linear(h.to(dtype), self.weights[layer].to(dtype), self.biases[layer].to(dtype)).to(h.dtype)

    def forward(
        self,
        x: Tensor,
        *,
        active_levels: int | Tensor | None = None,
        count: Tensor | None = None,
        normals: str | None = None,
        normal_epsilon: float = 0.01,
    ) -> FieldOutput:
        """As `Field.forward`. Normals follow the gradient of the density's logit."""

        def network(points: Tensor) -> tuple[Tensor, Tensor]:
            return self._network(points, active_levels)

        # The gradient of the density has the same direction but leaves the range of half precision.
        gradient = None
        if normals == "analytic":
            logit, colour, gradient = kernels.autograd_gradient(network, x)
        else:
            logit, colour = network(x)
        if normals == "finite_difference":
            gradient = kernels.central_differences(lambda points: network(points)[0], x, normal_epsilon, self.bound)
        normal = None if gradient is None else kernels.normal_of_gradient(gradient)
        density = kernels.density_activation(logit, self.spec)
        return FieldOutput(density, colour.sigmoid(), normal).without_padding(count)

    def backend_description(self, normals: str) -> str:
        return "on PyTorch's operators"
