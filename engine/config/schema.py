"""The configuration of a run: all its sections, and what is asked of them together. Imports nothing heavy."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dream_fast.engine.config.schedule import LinearSchedule, Scalar, largest
from dream_fast.engine.config.sections import (
    DEFAULT_VIEW,
    VANILLA,
    CameraConfig,
    DMTetConfig,
    FieldConfig,
    GuidanceConfig,
    LossConfig,
    OptimConfig,
    OutputConfig,
    RenderConfig,
    RunConfig,
    ShadingConfig,
)
from dream_fast.engine.config.setting import ScalarRange, value_type
from dream_fast.engine.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Config:
    """All rooms. ``Config()`` holds the reference's values."""

    run: RunConfig = RunConfig()
    camera: CameraConfig = CameraConfig()
    field: FieldConfig = FieldConfig()
    render: RenderConfig = RenderConfig()
    shading: ShadingConfig = ShadingConfig()
    guidance: GuidanceConfig = GuidanceConfig()
    loss: LossConfig = LossConfig()
    dmtet: DMTetConfig = DMTetConfig()
    optim: OptimConfig = OptimConfig()
    output: OutputConfig = OutputConfig()

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain dictionaries, room by room, ready for JSON; a schedule as it is typed."""
        rooms = {room.name: {} for room in dataclasses.fields(self)}
        for room, field in settings():
            rooms[room.name][field.name] = _written(getattr(getattr(self, room.name), field.name))
        return rooms

    @classmethod
    def from_dict(cls, data: Mapping[str, Mapping[str, Any]]) -> "Config":
        """Inverse of :meth:`to_dict`, also through JSON; `stored` reads other versions'.

        Raises UserError: unknown or missing settings, bad values.
        """
        if not isinstance(data, Mapping) or not all(isinstance(values, Mapping) for values in data.values()):
            raise UserError("a saved configuration must map rooms to their settings")
        known = {(room.name, field.name) for room, field in settings()}
        given = {(room, name) for room, values in data.items() for name in values}
        if known != given:
            listed = ", ".join(f"{room}.{name}" for room, name in sorted(known ^ given))
            raise UserError(f"the saved configuration has missing or unknown settings: {listed}")
        rooms: dict[str, dict[str, Any]] = {room.name: {} for room in dataclasses.fields(cls)}
        for room, field in settings():
            rooms[room.name][field.name] = _read(field, data[room.name][field.name])
        return cls(**{room.name: room.type(**rooms[room.name]) for room in dataclasses.fields(cls)})

    def __post_init__(self) -> None:
        if self.field.backbone in VANILLA and max(map(largest, (self.loss.lambda_tv, self.loss.lambda_wd))) > 0:
            raise UserError("--lambda_tv and --lambda_wd are of the hash table, which --backbone vanilla has not")
        self._check_guidance()
        changing = self.graph_breaking_flags()
        if self.run.cuda_graph and changing:
            raise UserError(f"--cuda_graph does not go with {changing[0]}, which changes what a step launches")

    @property
    def train_size(self) -> tuple[int, int]:
        """Height and width of a training render."""
        scale = self.dmtet.dmtet_reso_scale if self.dmtet.dmtet else 1
        return max(1, round(self.camera.h * scale)), max(1, round(self.camera.w * scale))

    def _check_guidance(self) -> None:
        """UserError for what the models that guide cannot do."""
        run, named = self.run, self.guidance.guidance
        words = f"--guidance {' '.join(named)}"
        if self.shading.latent_iter_ratio > 0 and not self.guidance.accepts_latents:
            raise UserError(
                f"--latent_iter_ratio {self.shading.latent_iter_ratio:g} does not go with {words}, which cannot be "
                "shown latents: leave it out"
            )
        if run.attention not in ("auto", "sdpa") and not {"dream-mini", "SD"} & set(named):
            raise UserError(
                f"--attention {run.attention} is for Stable Diffusion: the models of {words} keep their own"
            )
        if run.cuda_graph and (len(named) > 1 or named == ("clip",)):
            raise UserError(f"--cuda_graph replays steps of one diffusion model, not those of {words}: leave it out")
        if self.output.save_guidance and named == ("clip",):
            raise UserError("--save_guidance shows what a diffusion model sees, and --guidance clip has none")

    def graph_breaking_flags(self) -> list[str]:
        """The flags by which a kernel gets other numbers of the host in each step, so that no graph can replay it."""
        found = {
            "--dmtet": self.dmtet.dmtet,
            "--progressive_level": self.shading.progressive_level,
            "--progressive_view": self.camera.progressive_view,
        }
        return [flag for flag, on in found.items() if on]

    def override(self, typed: Mapping[str, Any]) -> "Config":
        """A copy with the settings in ``typed`` (by flag name) replaced. UserError: an unknown name or a bad value."""
        unknown = sorted(set(typed) - {field.name for _, field in settings()})
        if unknown:
            raise UserError(f"unknown setting: {', '.join(unknown)}")
        rooms = {}
        for room in dataclasses.fields(self):
            names = {field.name for field in dataclasses.fields(room.type)}
            values = {name: value for name, value in typed.items() if name in names}
            rooms[room.name] = dataclasses.replace(getattr(self, room.name), **values)
        return Config(**rooms)

    def differences(self, other: "Config") -> list[str]:
        """The settings that make this another run than ``other``, as sentences' parts: ``--lr 0.001, not 0.002``."""
        found = []
        # Training starts from the output camera's view then; looking at the result from elsewhere is free.
        learned = DEFAULT_VIEW if self.camera.progressive_view and not other.run.test else ()
        for room, field in settings():
            mine, theirs = (getattr(getattr(config, room.name), field.name) for config in (self, other))
            if field.name == "device":  # any GPU will do
                mine, theirs = device_kind(mine), device_kind(theirs)
            if mine != theirs and (field.name in learned or not field.metadata["resumable"]):
                found.append(f"--{field.name} {_shown(mine)}, not {_shown(theirs)}")
        return found


def device_kind(device: str) -> str:
    """A device without the number of a GPU: "cuda" of "cuda:1"."""
    return device.partition(":")[0]


def _written(value: Any) -> Any:
    """A setting for JSON."""
    if isinstance(value, tuple):
        return tuple(map(_written, value))
    return str(value) if isinstance(value, LinearSchedule) else value


def _read(field: dataclasses.Field, value: Any) -> Any:
    """Inverse of :func:`_written`."""
    if isinstance(value, list | tuple):
        return tuple(_read(field, item) for item in value)
    takes = value_type(field) in (Scalar, ScalarRange)
    return LinearSchedule.parse(value) if takes and isinstance(value, str) else value


def read_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by name as JSON holds them -> as :meth:`Config.override` takes them. UserError: a bad schedule."""
    known = {field.name: field for _, field in settings()}
    return {name: _read(known[name], value) if name in known else value for name, value in values.items()}


def _shown(value: Any) -> Any:
    """A setting for a sentence: a range of schedules as they are typed."""
    found = isinstance(value, tuple) and any(isinstance(item, LinearSchedule) for item in value)
    return " ".join(map(str, value)) if found else value


def settings() -> Iterator[tuple[dataclasses.Field, dataclasses.Field]]:
    """Every setting as (room's field in Config, the setting's field), in the order of this file."""
    for room in dataclasses.fields(Config):
        for field in dataclasses.fields(room.type):
            yield room, field


def settings_unused_by(backbone: str) -> set[str]:
    """The names of the settings that this backbone does not read."""
    return {field.name for _, field in settings() if backbone not in (field.metadata["backbones"] or (backbone,))}
