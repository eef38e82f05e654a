"""The optimiser: Adan or Adam over one flat buffer of parameters, a moving average of them, and a loss scale for fp16.

The parameters of the field become views of one fp32 buffer, the hash table first, so a step, the average and a skipped
step are each one operation over one tensor. The learning rate of the table is ten times that of the networks. A step
whose gradient is not finite changes nothing; the host does not read that.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dream_fast import kernels
from dream_fast.engine.config.sections import OptimConfig

ADAM_BETAS, ADAM_EPS = (0.9, 0.99), 1e-15


class Optimizer:
    """Optimises a hash table, networks and a shape in place and keeps their exponential moving average (EMA).

    Table and shape may be missing. The learning rate of the shape is `shape_lr`, or --lr itself.

    After construction the parameters and their gradients are views of `params` and `grads`, both flat [P] fp32. Move
    the module to its device first; afterwards do not replace `.data` or `.grad` of a parameter, and use `zero_grad` of
    this class.

    Raises TypeError: when a parameter is not fp32.
    """

    def __init__(
        self,
        table: nn.Parameter | None,
        networks: list[nn.Parameter],
        config: OptimConfig,
        shape: list[nn.Parameter] | None = None,
        shape_lr: float | None = None,
        level_rows: tuple[int, ...] = (),
    ):
        self.config = config
        parameters = [*([] if table is None else [table]), *networks, *(shape or [])]
        for parameter in parameters:
            if parameter.dtype != torch.float32:
                raise TypeError(f"parameters must be float32, one is {parameter.dtype}")
        with torch.no_grad():
            self.params = torch.cat([parameter.detach().reshape(-1) for parameter in parameters])
            self.grads = torch.zeros_like(self.params)
            start = 0
            for parameter in parameters:
                stop = start + parameter.numel()
                parameter.data = self.params[start:stop].view_as(parameter)
                parameter.grad = self.grads[start:stop].view_as(parameter)
                start = stop
        groups = [] if table is None else table_groups(table, config, level_rows)
        self.scene = self.params.numel() - sum(parameter.numel() for parameter in shape or [])
        groups.append(("network", self.scene, config.network_lr))
        if shape:
            groups.append(("shape", self.params.numel(), config.lr if shape_lr is None else shape_lr))
        self.groups, self.group_ends, self.lrs = zip(*groups, strict=True)
        self.steps = 0  # attempted ones, which the host knows; they set the warm-up of the average alone
        init_state = kernels.AdanState.zeros if config.optim == "adan" else AdamState
        self.state = init_state(self.params)

    def learning_rates(self, lr_scale: float = 1.0) -> dict[str, float]:
        """The learning rate of each group of parameters, as a step with `lr_scale` uses it."""
        return {group: lr * lr_scale for group, lr in zip(self.groups, self.lrs, strict=True)}

    def zero_grad(self) -> None:
        """Set the gradients to 0, in place."""
        self.grads.zero_()

    def step(
        self,
        *,
        skip: Tensor | None = None,
        inverse_scale: float | Tensor = 1.0,
        grad_clip: float = -1.0,
        lr_scale: float = 1.0,
    ) -> Tensor:
        """Take one step with the gradients times `inverse_scale`; returns a bool on the device, true if it was skipped.

        With `skip`, a bool on the device, the step is skipped, as one without a finite gradient is. `grad_clip` > 0
        limits each component of the unscaled gradient; `lr_scale` multiplies every learning rate.
        """
        if skip is not None:
            inverse_scale = torch.where(skip, torch.nan, inverse_scale)  # no gradient is finite then
        if grad_clip > 0:
            # Clamping would turn an infinity into a usable number; adding NaN keeps the step recognisable as bad.
            poison = (self.grads * 0).sum()
            self.grads.mul_(inverse_scale).clamp_(-grad_clip, grad_clip).add_(poison)
            inverse_scale = 1.0
        decay = min(self.config.ema_decay, (1 + self.steps) / (10 + self.steps))
        self.steps += 1
        update: Callable[..., Tensor] = kernels.adan_step if self.config.optim == "adan" else adam_step
        return update(
            self.params,
            self.grads,
            self.state,
            group_ends=self.group_ends,
            lrs=tuple(self.learning_rates(lr_scale).values()),
            inverse_scale=inverse_scale,
            ema_decay=decay,
        )

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Inside the `with` block the parameters hold their average; afterwards they are restored bit for bit."""
        trained = self.params.clone()
        self.params.copy_(self.state.ema)
        try:
            yield
        finally:
            self.params.copy_(trained)

    @torch.no_grad()
    def start_scene(self, average: Tensor) -> None:
        """Start from the averaged parameters [P'] of a run with the same table and networks, and no shape.

        Raises ValueError: when their number differs.
        """
        if average.shape != (self.scene,):
            raise ValueError(f"ema has shape {tuple(average.shape)}, expected {(self.scene,)}")
        self.params[: self.scene] = average.to(self.params.device)
        self.state.ema.copy_(self.params)

    def state_dict(self) -> dict[str, Tensor]:
        """The state that a resumed run needs: parameters, moments, average, counters."""
        return {"params": self.params, "steps": torch.tensor(self.steps), **vars(self.state)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from `state_dict()`. Raises ValueError: when a name or a shape differs."""
        current = self.state_dict()
        if state.keys() != current.keys():
            raise ValueError(f"the optimiser's state holds {sorted(state)}, expected {sorted(current)}")
        for name, tensor in current.items():
            if state[name].shape != tensor.shape:
                raise ValueError(f"{name} has shape {tuple(state[name].shape)}, expected {tuple(tensor.shape)}")
        for name, tensor in current.items():
            tensor.copy_(state[name])
        self.steps = int(state["steps"])


def table_groups(table: Tensor, config: OptimConfig, level_rows: tuple[int, ...]) -> list[tuple[str, int, float]]:
    """Groups of parameters of a hash table [rows, F]: name, end in the flat buffer, learning rate.

    `level_rows` are the rows at which the levels end. With --lr_finest each level has its own learning rate.
    """
    if config.lr_finest == 1 or len(level_rows) < 2:
        return [("table", table.numel(), config.table_lr)]
    last = len(level_rows) - 1
    return [
        (f"table_{level}", rows * table.shape[1], config.table_lr * config.lr_finest ** (level / last))
        for level, rows in enumerate(level_rows)
    ]


class AdamState:
    """Moments, average and step count of `adam_step`."""

    def __init__(self, params: Tensor):
        self.exp_avg = torch.zeros_like(params)
        self.exp_avg_sq = torch.zeros_like(params)
        self.ema = params.clone()
        self.step = torch.zeros((), dtype=torch.int64, device=params.device)


@torch.no_grad()
def adam_step(
    params: Tensor,
    grads: Tensor,
    state: AdamState,
    *,
    group_ends: tuple[int, ...],
    lrs: tuple[float, ...],
    inverse_scale: float | Tensor = 1.0,
    ema_decay: float,
) -> Tensor:
    """Take a step of Adam (Kingma and Ba, 2015) over flat [P] buffers in place, with the average.

    Group g is params[group_ends[g - 1] : group_ends[g]] and has the learning rate lrs[g]. Returns a bool on the device,
    true if the step was skipped.
    """
    gradient = grads * inverse_scale
    found_inf = ~torch.isfinite(gradient).all()
    keep = (~found_inf).to(params.dtype)  # 0 leaves everything as it is
    gradient = torch.where(found_inf, 0, gradient)
    state.step += ~found_inf
    beta1, beta2 = ADAM_BETAS
    state.exp_avg.lerp_(gradient, keep * (1 - beta1))
    state.exp_avg_sq.lerp_(gradient.square(), keep * (1 - beta2))
    step = state.step.clamp(min=1)
    denominator = (state.exp_avg_sq / (1 - beta2**step)).sqrt_().add_(ADAM_EPS)
    change = state.exp_avg / denominator / (1 - beta1**step) * keep
    start = 0
    for stop, lr in zip(group_ends, lrs, strict=True):
        params[start:stop] -= lr * change[start:stop]
        start = stop
    state.ema.lerp_(params, keep * (1 - ema_decay))
    return found_inf


class LossScaler:
    """Loss scale that halves after a non-finite step and doubles after `interval` finite ones, all on the device.

    Disabled (on a CPU, or in fp32) the scale stays 1.
    """

    def __init__(self, enabled: bool, device: torch.device | str, *, start: float = 65536.0, interval: int = 2000):
        self.enabled, self.interval = enabled, interval
        self.scale = torch.tensor(start if enabled else 1.0, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int64, device=device)

    @property
    def inverse(self) -> Tensor:
        """Factor of the gradients before a step."""
        return 1.0 / self.scale

    def update(self, found_inf: Tensor) -> None:
        """Adapt the scale to the outcome of a step."""
        if not self.enabled:
            return
        good = torch.where(found_inf, 0, self.good_steps + 1)
        grow = good >= self.interval
        self.scale.mul_(torch.where(found_inf, 0.5, torch.where(grow, 2.0, 1.0)))
        self.good_steps.copy_(torch.where(grow, 0, good))

    def state_dict(self) -> dict[str, Tensor]:
        """The scale and the count of good steps."""
        return {"scale": self.scale, "good_steps": self.good_steps}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from `state_dict()`; a disabled scaler stays at 1."""
        if self.enabled:
            self.scale.copy_(state["scale"])
            self.good_steps.copy_(state["good_steps"])
