"""Trace some steps of a run with torch's profiler, and print a short table of the most expensive operators."""

import os
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, schedule

from dream_fast.engine.runtime.reporter import Reporter
from dream_fast.engine.workspace.atomic import atomic_write

WARM_UP = 20  # steps before the trace, in which kernels are compiled and graphs captured
STEPS = 20  # steps in the trace: enough for an update of the occupancy grid
ROWS = 10  # of the table


class Cost(NamedTuple):
    """Cost of an operator or kernel: `milliseconds` a step, without the operators it calls, and `calls` a step."""

    name: str
    milliseconds: float
    calls: float


class Profile:
    """Context of a run on `device`, in which `step` is called after each of its `steps_left` steps.

    After WARM_UP steps, STEPS steps are traced into `folder`/trace.json.gz, in Chrome's format, and the reporter prints
    the path and the table. A shorter run has a shorter warm-up, then a shorter trace. The run continues.
    """

    def __init__(self, folder: Path, device: torch.device, steps_left: int, reporter: Reporter):
        self.path, self.device, self.reporter = folder / "trace.json.gz", device, reporter
        self.steps = min(STEPS, steps_left)
        self.warm_up = min(WARM_UP, steps_left - self.steps)
        self._taken = 0
        self._open = ExitStack()

    def __enter__(self) -> "Profile":
        # Suppresses two lines on stderr about start and stop; an empty trace is warned of below.
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")
        # The profiler starts some steps early, because its start takes time.
        early = min(2, self.warm_up)
        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a missing warm-up, which is warned of below
            plan = schedule(wait=self.warm_up - early, warmup=early, active=self.steps, repeat=1)
            profiler = profile(activities=activities, schedule=plan, on_trace_ready=self._write)
        self._profiler = self._open.enter_context(profiler)
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)

    def step(self) -> None:
        self._taken += 1
        self._profiler.step()

    def _write(self, profiler: profile) -> None:
        steps = self._taken - self.warm_up  # fewer than planned where the run was stopped
        if steps < 1:
            return
        with atomic_write(self.path) as temporary:
            profiler.export_chrome_trace(str(temporary))
        self.reporter.say(f"trace of steps {self.warm_up + 1} to {self._taken} of this start: {self.path}")
        if self.warm_up < WARM_UP:
            self.reporter.warn(f"the trace began after {self.warm_up} steps, so it includes work of first steps only")
        kind = DeviceType.CUDA if self.device.type == "cuda" else DeviceType.CPU
        costs = collect_costs(profiler, kind, steps)
        if not costs:
            self.reporter.warn(f"the trace has no events of the {kind.name}: its driver may not allow profiling")
        for line in format_table(costs, kind.name):
            self.reporter.say(line)


def collect_costs(profiler: profile, kind: DeviceType, steps: int) -> list[Cost]:
    """Costs on devices of a `kind`, of a trace of `steps` steps, the most expensive first."""
    costs = []
    for event in profiler.key_averages():
        if event.device_type == kind and not event.key.startswith("ProfilerStep"):
            microseconds = event.self_device_time_total if kind == DeviceType.CUDA else event.self_cpu_time_total
            costs.append(Cost(event.key, microseconds / 1000 / steps, event.count / steps))
    return sorted(costs, key=lambda cost: -cost.milliseconds)


def format_table(costs: list[Cost], device: str) -> list[str]:
    """Format the first ROWS of `costs` as lines, with their share of the total."""
    total = sum(cost.milliseconds for cost in costs)
    lines = [f"{total:.2f} ms a step on the {device}, of which", "  ms a step  share  calls a step  name"]
    for name, milliseconds, calls in costs[:ROWS]:
        share = milliseconds / total if total else 0.0
        lines.append(f"{milliseconds:11.3f}  {share:5.1%}  {calls:12.1f}  {name[:80]}")
    return lines
