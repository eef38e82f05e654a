"""The configuration of a run: all its sections, and how it is stored and compared. Imports nothing heavy."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dream_fast.engine.config.schedule import LinearSchedule, Scalar
from dream_fast.engine.config.sections import (
    DEFAULT_VIEW,
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
    """The configuration of a run, in sections. `presets` makes whole ones, `validate` checks them."""

    run: RunConfig
    camera: CameraConfig
    field: FieldConfig
    render: RenderConfig
    shading: ShadingConfig
    guidance: GuidanceConfig
    loss: LossConfig
    dmtet: DMTetConfig
    optim: OptimConfig
    output: OutputConfig

    @property
    def train_size(self) -> tuple[int, int]:
        """Height and width of a training render, in pixels."""
        scale = self.dmtet.dmtet_reso_scale if self.dmtet.dmtet else 1
        return max(1, round(self.camera.h * scale)), max(1, round(self.camera.w * scale))

    def get(self, name: str) -> Any:
        """Return the setting `name`, of whichever section."""
        return next(getattr(getattr(self, section.name), name) for section, field in settings() if field.name == name)

    def override(self, overrides: Mapping[str, Any]) -> "Config":
        """Return a copy with the settings in `overrides`, by name, replaced.

        Raises UserError: when a name is unknown, or a section refuses a value.
        """
        unknown = sorted(set(overrides) - {field.name for _, field in settings()})
        if unknown:
            raise UserError(f"unknown setting: {', '.join(unknown)}")
        sections = {}
        for section in dataclasses.fields(self):
            names = {field.name for field in dataclasses.fields(section_type(section))}
            values = {name: value for name, value in overrides.items() if name in names}
            sections[section.name] = dataclasses.replace(getattr(self, section.name), **values)
        return Config(**sections)

    def differences(self, other: "Config") -> list[str]:
        """Return the differences that make this another run than `other`, for a message: `--lr 0.001, not 0.002`."""
        differences = []
        # Only with progressive_view does training depend on the output camera's view.
        learned = DEFAULT_VIEW if self.camera.progressive_view and not other.run.test else ()
        for section, field in settings():
            mine, theirs = (getattr(getattr(config, section.name), field.name) for config in (self, other))
            if field.name == "device":  # any GPU will do
                mine, theirs = device_kind(mine), device_kind(theirs)
            if mine != theirs and (field.name in learned or not field.metadata["resumable"]):
                differences.append(f"--{field.name} {_format_value(mine)}, not {_format_value(theirs)}")
        return differences

    def run_facts(self, seed: int) -> dict[str, Any]:
        """Return what a checkpoint states of its run: its prompt, `seed`, and a digest of its settings.

        The digest changes with the settings of a version, so it compares runs of one version alone.
        """
        values = self.to_dict()
        names = [(section.name, field.name) for section, field in settings() if not field.metadata["resumable"]]
        decisive = {f"{section}.{name}": values[section][name] for section, name in names if name != "device"}
        decisive |= {"run.seed": seed}
        digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]
        return {"text": self.run.text, "seed": seed, "settings": digest}

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return plain dictionaries, section by section, for JSON; schedules are strings."""
        sections: dict[str, dict[str, Any]] = {section.name: {} for section in dataclasses.fields(self)}
        for section, field in settings():
            sections[section.name][field.name] = _to_json(getattr(getattr(self, section.name), field.name))
        return sections

    @classmethod
    def from_dict(cls, data: Mapping[str, Mapping[str, Any]]) -> "Config":
        """Make a configuration from the result of `to_dict`, also through JSON. `stored_run` reads other versions.

        Raises UserError: when settings are unknown or missing, or a section refuses a value.
        """
        if not isinstance(data, Mapping) or not all(isinstance(values, Mapping) for values in data.values()):
            raise UserError("a saved configuration must map sections to their settings")
        known = {(section.name, field.name) for section, field in settings()}
        given = {(section, name) for section, values in data.items() for name in values}
        if known != given:
            names = ", ".join(f"{section}.{name}" for section, name in sorted(known ^ given))
            raise UserError(f"the saved configuration has missing or unknown settings: {names}")
        sections: dict[str, dict[str, Any]] = {section.name: {} for section in dataclasses.fields(cls)}
        for section, field in settings():
            sections[section.name][field.name] = _from_json(field, data[section.name][field.name])
        types = {section.name: section_type(section) for section in dataclasses.fields(cls)}
        return cls(**{name: types[name](**values) for name, values in sections.items()})


def section_type(section: dataclasses.Field) -> Any:
    """Return the class of a section from its field of Config."""
    return section.type


def device_kind(device: str) -> str:
    """Return a device without the number of a GPU: "cuda" of "cuda:1"."""
    return device.partition(":")[0]


def settings() -> Iterator[tuple[dataclasses.Field, dataclasses.Field]]:
    """Yield every setting as (section's field of Config, setting's field), in the order of `sections`."""
    for section in dataclasses.fields(Config):
        for field in dataclasses.fields(section_type(section)):
            yield section, field


def settings_unused_by(backbone: str) -> set[str]:
    """Return the names of the settings that this backbone does not read."""
    return {field.name for _, field in settings() if backbone not in (field.metadata["backbones"] or (backbone,))}


def read_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Convert settings by name from JSON to values of `Config.override`. Raises UserError: when a schedule is bad."""
    known = {field.name: field for _, field in settings()}
    return {name: _from_json(known[name], value) if name in known else value for name, value in values.items()}


def _to_json(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_to_json, value))
    return str(value) if isinstance(value, LinearSchedule) else value


def _from_json(field: dataclasses.Field, value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_from_json(field, item) for item in value)
    takes_schedule = value_type(field) in (Scalar, ScalarRange)
    return LinearSchedule.parse(value) if takes_schedule and isinstance(value, str) else value


def _format_value(value: Any) -> Any:
    """Format a setting for a message: a range of schedules as it is typed."""
    has_schedule = isinstance(value, tuple) and any(isinstance(item, LinearSchedule) for item in value)
    return " ".join(map(str, value)) if has_schedule else value
