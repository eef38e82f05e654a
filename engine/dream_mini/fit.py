"""A training loop that ends at a time, saves its state, and resumes with the same bits as a loop without a stop."""

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

WARM_UP = 150  # steps of linearly rising learning rate
AVERAGE = 1e-3  # least share of the newest weights in their running average
LOGGED = 50  # steps between two rows of the log


class Fit:
    """Modules, their optimiser and their running average.

    A subclass has `loss()`, which draws its batch with `self.generator` alone. `steps` is how many there will be; None:
    as many as fit into `budget` seconds, over all pieces. The learning rate is near zero at the end either way.
    """

    name = "fit"

    def __init__(self, models: nn.ModuleList, rate: float, seed: int, steps: int | None, budget: float):
        self.models = models
        self.device = next(models.parameters()).device
        self.parameters: list[Tensor] = list(models.parameters())
        self.average = [p.detach().clone() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.rate, self.steps, self.budget = rate, steps, budget
        self.step, self.seconds = 0, 0.0

    def loss(self) -> Tensor:
        """The loss of a fresh batch."""
        raise NotImplementedError

    def figures(self) -> dict[str, float]:
        """Figures for a row of the log, beside the loss."""
        return {}

    @property
    def done(self) -> float:
        """Share of the steps that are made, or of the budget that is spent, from 0 to 1."""
        if self.steps == 0:
            return 1.0
        return min(1.0, self.seconds / self.budget if self.steps is None else self.step / self.steps)

    @property
    def finished(self) -> bool:
        return self.done >= 1

    def save(self, file: Path) -> None:
        """Write the state; a crash leaves the old one."""
        state = {
            "models": self.models.state_dict(), "optimizer": self.optimizer.state_dict(), "average": self.average,
            "generator": self.generator.get_state(), "step": self.step, "seconds": self.seconds,
        }  # fmt: skip
        beside = file.with_suffix(".new")
        torch.save(state, beside)
        os.replace(beside, file)

    def load(self, file: Path) -> None:
        """Resume from a saved state."""
        state = torch.load(file, map_location=self.device, weights_only=True)
        self.models.load_state_dict(state["models"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"].cpu())
        self.average = [a.detach() for a in state["average"]]
        self.step, self.seconds = state["step"], state["seconds"]

    def learning_rate(self) -> float:
        """Linear warm-up, then a cosine to zero."""
        return self.rate * min(1.0, (self.step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * self.done))

    def run(self, until: float, file: Path, every: float, on_save: Callable[[], None], log: Path) -> bool:
        """Train until all is done or the clock is at `until` (perf_counter); returns whether all is done.

        Each `every` seconds, and at the end, the state is saved and `on_save` called.
        """
        start, before = time.perf_counter(), self.seconds
        saved = start
        while not self.finished and time.perf_counter() < until:
            loss = self._step()
            now = time.perf_counter()
            if self.step % LOGGED == 0 or self.step == 1:
                row = {"stage": self.name, "step": self.step, "done": self.done, "loss": loss.item(), **self.figures()}
                self._write(log, {**row, "seconds": round(before + time.perf_counter() - start, 1)})
            self.seconds = before + time.perf_counter() - start
            if now - saved > every:
                self.save(file)
                on_save()
                saved = time.perf_counter()
        self._wait()
        self.seconds = before + time.perf_counter() - start
        self.save(file)
        on_save()
        return self.finished

    def _step(self) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        loss = self.loss()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.step += 1
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.parameters, max(AVERAGE, 1 / self.step))
        return loss.detach()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    @staticmethod
    def _write(log: Path, row: dict) -> None:
        row = {key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()}
        print(json.dumps(row), flush=True)
        with log.open("a") as out:
            out.write(json.dumps(row) + "\n")

    @torch.no_grad()
    def averaged(self) -> list[dict[str, Tensor]]:
        """State dicts of the modules with the running average of their parameters, on the CPU."""
        names = [name for name, _ in self.models.named_parameters()]
        whole = {k: v.detach().clone() for k, v in self.models.state_dict().items()}
        whole |= dict(zip(names, self.average, strict=True))
        return [
            {k.removeprefix(f"{n}."): v.cpu() for k, v in whole.items() if k.startswith(f"{n}.")}
            for n in range(len(self.models))
        ]
