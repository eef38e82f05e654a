"""Check the settings of a model against sense and against its weights, before a module is built from them.

A wrong setting can request millions of layers, or turn every number into NaN. Layers are counted in the
names of the tensors, so nothing is built that the file has no weights for.
"""

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dream_fast.engine.errors import UserError, first_line
from dream_fast.engine.files import BadFile, open_regular

MAX_WHOLE = 2**31 - 1
MAX_SETTINGS_BYTES = 64_000_000  # of a file of settings or a vocabulary
MAX_TIMESTEPS = 100_000
# Least and most value of settings, wherever they occur; "whole" ones are counts.
RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("scaling_factor", "mid_block_scale_factor", "resnet_out_scale_factor"), (1e-4, 1e4)),
    **dict.fromkeys(("norm_eps", "layer_norm_eps", "layer_norm_epsilon"), (1e-30, 0.1)),
    **dict.fromkeys(("beta_start", "beta_end"), (1e-12, 1 - 1e-6)),
    "shift_factor": (-1e4, 1e4),
    "freq_shift": (-100, 100),
    "num_train_timesteps": (2, MAX_TIMESTEPS),
    "max_position_embeddings": (2, 1_000_000),
    "sample_size": (1, 4096),
    "downsample_padding": (0, 1),
    **dict.fromkeys(("norm_num_groups", "attention_head_dim", "num_attention_heads", "num_heads"), (1, 65536)),
    **dict.fromkeys(("conv_in_kernel", "conv_out_kernel"), (1, 31)),
}
# Settings that count layers, each with the index of a layer in the names of tensors.
LAYERS: dict[str, str] = {
    "num_hidden_layers": r"layers\.(\d+)\.",
    "num_layers": r"(?:block|layers)\.(\d+)\.",
    "layers_per_block": r"down_blocks\.\d+\.resnets\.(\d+)\.",
    "transformer_layers_per_block": r"transformer_blocks\.(\d+)\.",
    "reverse_transformer_layers_per_block": r"transformer_blocks\.(\d+)\.",
}
# Settings that are lists with an entry for every block.
BLOCKS: dict[str, str] = {
    "block_out_channels": r"down_blocks\.(\d+)\.",
    "down_block_types": r"down_blocks\.(\d+)\.",
    "up_block_types": r"up_blocks\.(\d+)\.",
}
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
COUNTERS = ("position_ids", "num_batches_tracked")  # tensors that are whole numbers


def check_weight_file(path: Path) -> list[str]:
    """Return the names of the tensors in a safetensors file, whose header accounts for its length.

    Raises UserError: when it is missing or damaged, or a weight is not a floating-point number.
    """
    if not path.exists():
        raise UserError(f"the model file {path} is missing")
    try:
        open_regular(path).close()
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            dtypes = {name: file.get_slice(name).get_dtype() for name in names}
    except BadFile as error:
        raise UserError(f"the model file {error}") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"the model file {path} is damaged or incomplete ({first_line(error)})") from error
    for name, dtype in dtypes.items():
        if dtype not in FLOATS and not name.endswith(COUNTERS):
            raise UserError(f"the model file {path} holds {name} as {dtype}; weights are floating-point numbers")
    return names


def check_settings(place: str, settings: Mapping[str, Any], tensors: Iterable[str] | None = None) -> None:
    """Check the settings of a component, and its counts of layers where the names of its `tensors` are known.

    `place` begins the messages, such as "the unet of the model m". Raises UserError: a value that cannot be right.
    """
    _check_numbers(place, settings)
    if tensors is not None:
        _check_layers(place, settings, "\n".join(tensors))


def check_pipeline_settings(place: str, settings: Mapping[str, Any], tensors: Iterable[str]) -> None:
    """Check the settings of a component of any architecture: finite numbers, and no more layers than any index of its
    tensors. Raises UserError: a value that cannot be right.
    """
    layers = _count(r"\.(\d+)\.", "\n".join(tensors))
    for name, value in settings.items():
        if isinstance(value, Mapping):
            check_pipeline_settings(place, value, [f".{layers - 1}."] if layers else [])
            continue
        for entry in _flatten(value):
            if type(entry) is float and not math.isfinite(entry):
                raise UserError(f"{place} states {name} {entry}, which cannot be computed with")
            counts = name in LAYERS or name in ("num_single_layers", "num_refiner_layers", "n_layers", "depth")
            if counts and layers and type(entry) is int and not 0 <= entry <= max(1, layers):
                raise UserError(f"{place} states {name} {entry}, and its weights have at most {layers}")


def _check_layers(place: str, settings: Mapping[str, Any], tensors: str) -> None:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            _check_layers(place, value, tensors)
        elif name in LAYERS:
            layers = _count(LAYERS[name], tensors)
            least, most = 1, layers
            if "transformer" in name:  # 1 is usual without such layers, and 0 in a list
                least, most = int(not isinstance(value, list)), max(1, layers)
            for count in _flatten(value):
                if type(count) is int and not least <= count <= most:
                    raise UserError(f"{place} states {name} {count}, and its weights have {layers}")
        elif name in BLOCKS and isinstance(value, list) and len(value) != (blocks := _count(BLOCKS[name], tensors)):
            raise UserError(f"{place} states {len(value)} {name}, and its weights have {blocks} blocks")


def _count(pattern: str, text: str) -> int:
    """Return one more than the largest index that `pattern` finds in names, one a line; 0 where it finds none."""
    return max((int(index[:9]) + 1 for index in re.findall(pattern, text)), default=0)


def _flatten(value: Any) -> Iterable[Any]:
    for entry in value if isinstance(value, list | tuple) else [value]:
        if isinstance(entry, list | tuple):
            yield from _flatten(entry)
        else:
            yield entry


def _check_numbers(place: str, settings: Mapping[str, Any]) -> None:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            _check_numbers(place, value)
            continue
        for entry in _flatten(value):
            if isinstance(entry, bool) or not isinstance(entry, int | float):
                continue
            if not (abs(entry) <= MAX_WHOLE if type(entry) is int else math.isfinite(entry)):
                raise UserError(f"{place} states {name} {str(entry)[:40]}, which cannot be computed with")
            low, high = RANGES.get(name, (-math.inf, math.inf))
            if not low <= entry <= high:
                raise UserError(f"{place} states {name} {entry}, of {low:g} to {high:g}")


def check_finite(place: str, module: nn.Module) -> None:
    """Raises UserError: a weight of `module` is not finite. Waits for the device once."""
    tensors = {n: t for n, t in module.state_dict().items() if t.is_floating_point() and t.numel() and not t.is_meta}
    if not tensors:
        return
    # The least and the largest value are NaN where a value is: one pass over the weights, and no copy of them.
    bounds = torch.stack([torch.stack(_bounds(tensor)) for tensor in tensors.values()])
    bad = ~torch.isfinite(bounds).all(dim=1)
    if bool(bad.any()):
        name = list(tensors)[int(bad.nonzero()[0])]
        raise UserError(f"{place} has weights that are not finite, such as {name}")


def _bounds(tensor: Tensor) -> tuple[Tensor, Tensor]:
    low, high = tensor.aminmax()
    return low.float(), high.float()


def check_schedule(place: str, alphas_cumprod: Tensor, timesteps: int) -> None:
    """Raises UserError: the signal power of the noise schedule does not fall from at most 1 to at least 0."""
    if len(alphas_cumprod) != timesteps:
        raise UserError(f"{place} states {timesteps} timesteps and {len(alphas_cumprod)} betas")
    first, last = float(alphas_cumprod[0]), float(alphas_cumprod[-1])
    falls = bool((alphas_cumprod[1:] <= alphas_cumprod[:-1]).all()) and last < 0.99 * first
    faster = last <= first * float(alphas_cumprod[-2])  # the last step adds no less noise than the first one
    if not (falls and faster and 0 < first <= 1 and 0 <= last):
        raise UserError(f"{place} states a noise schedule whose signal does not fall from 1 to 0")


def check_tokens(model: str, ids: Tensor, config: Any) -> None:
    """Raises UserError: some `ids` are no tokens of the text encoder with that configuration."""
    count = getattr(config, "vocab_size", None)
    if count is not None and not (0 <= int(ids.min()) and int(ids.max()) < count):
        raise UserError(f"the tokenizer of the model {model} does not fit its text encoder, which has {count} tokens")
