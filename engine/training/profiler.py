"""A trace of some steps of a run by torch's profiler, and a short table of what they cost."""

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

WARM_UP = 20  # steps before the trace: kernels are compiled and graphs captured in the first ones
STEPS = 20  # steps in the trace, so that an update of the occupancy grid is among them
ROWS = 10  # of the table


class Cost(NamedTuple):
    """An operator or kernel: its own ``milliseconds`` a step without what it calls, and ``calls`` a step."""

    name: str
    milliseconds: float
    calls: float


class Profile:
    """A context in which ``step`` is called after each of the ``left`` steps of a run on ``device``.

    After WARM_UP steps STEPS steps are traced into ``folder``/trace.json.gz, in Chrome's format, and the reporter says
    where it is and what cost most; a shorter run warms up less, then traces less. The run goes on.
    """

    def __init__(self, folder: Path, device: torch.device, left: int, reporter: Reporter):
        self.path, self.device, self.reporter = folder / "trace.json.gz", device, reporter
        self.steps = min(STEPS, left)
        self.warm_up = min(WARM_UP, left - self.steps)
        self._traced = 0
        self._open = ExitStack()

    def __enter__(self) -> "Profile":
        # Two lines to stderr about its start and stop are no news; a trace that saw nothing is warned of below.
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")
        # The profiler is started some steps ahead, because its start takes time.
        ahead = min(2, self.warm_up)
        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a missing warm-up, which is then said below
            plan = schedule(wait=self.warm_up - ahead, warmup=ahead, active=self.steps, repeat=1)
            profiler = profile(activities=activities, schedule=plan, on_trace_ready=self._write)
        self._profiler = self._open.enter_context(profiler)
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)

    def step(self) -> None:
        self._traced += 1
        self._profiler.step()

    def _write(self, profiler: profile) -> None:
        steps = self._traced - self.warm_up  # fewer than planned where the run was stopped
        if steps < 1:
            return
        with atomic_write(self.path) as aside:
            profiler.export_chrome_trace(str(aside))
        self.reporter.say(f"trace of steps {self.warm_up + 1} to {self._traced} of this start: {self.path}")
        if self.warm_up < WARM_UP:
            self.reporter.warn(f"the trace began after {self.warm_up} steps, so it holds what only first steps do")
        kind = DeviceType.CUDA if self.device.type == "cuda" else DeviceType.CPU
        found = costs(profiler, kind, steps)
        if not found:
            self.reporter.warn(f"the trace saw nothing of the {kind.name}: its driver may not let this user profile")
        for line in table(found, kind.name):
            self.reporter.say(line)


def costs(profiler: profile, kind: DeviceType, steps: int) -> list[Cost]:
    """What ran on devices of this ``kind`` in ``steps`` steps, the most expensive first."""
    found = []
    for event in profiler.key_averages():
        if event.device_type == kind and not event.key.startswith("ProfilerStep"):
            own = event.self_device_time_total if kind == DeviceType.CUDA else event.self_cpu_time_total
            found.append(Cost(event.key, own / 1000 / steps, event.count / steps))
    return sorted(found, key=lambda cost: -cost.milliseconds)


def table(found: list[Cost], place: str) -> list[str]:
    """The first ROWS of ``found`` as lines, with their share of all of it."""
    total = sum(cost.milliseconds for cost in found)
    lines = [f"{total:.2f} ms a step on the {place}, of which", "  ms a step  share  calls a step  name"]
    for name, milliseconds, calls in found[:ROWS]:
        share = milliseconds / total if total else 0.0
        lines.append(f"{milliseconds:11.3f}  {share:5.1%}  {calls:12.1f}  {name[:80]}")
    return lines
