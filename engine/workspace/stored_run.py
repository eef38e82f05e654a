"""Settings stored by this or another version: read as settings of this version, and overridden by a command.

config.json and the header of a checkpoint name the version that wrote them since 0.2.0; without a name it is 0.1.0.
`RENAMED` and `WITHOUT` grow with each version that changes the settings; docs/compatibility.md has the rules and which
version reads what.

`python -m dream_fast.engine.workspace.stored_run` prints the settings of this version with their defaults, for
tests/fixtures/settings/VERSION.json. Imports nothing heavy.
"""

import json
import re
from collections.abc import Callable, Mapping
from itertools import product
from typing import Any, NamedTuple

from dream_fast import __version__
from dream_fast.engine.config.configure import configure
from dream_fast.engine.config.guidances import DREAM_MINI, STABLE_DIFFUSION
from dream_fast.engine.config.presets import OBJECTIVE_OVERRIDES, reference
from dream_fast.engine.config.schema import Config, settings, settings_unused_by
from dream_fast.engine.config.sections import RunConfig
from dream_fast.engine.config.validate import validate
from dream_fast.engine.errors import UserError

VERSION_KEY = "version"  # beside the sections of config.json
UNNAMED = "0.1.0"
# Settings that belong to one command and not to a run, with their values where a command does not name them.
PER_COMMAND: dict[str, Any] = {"six_views": False, "save_mesh": False, "ckpt": "latest", "output": None}


class Renamed(NamedTuple):
    """The name of a setting now, and a function of its old value and all stored settings; None: the value stays."""

    name: str
    value: Callable[[Any, Mapping[str, Any]], Any] | None = None


def _scale_schedule(end: Any, stored: Mapping[str, Any]) -> Any:
    """Return the schedule of a guidance scale from --guidance_scale to --guidance_scale_end, over the whole run."""
    scale = stored.get("guidance.guidance_scale")
    return scale if end is None else f"0.0:{scale}:{end}:1.0"


# Settings of earlier versions that have another name now, by "section.name".
RENAMED: dict[str, Renamed] = {
    "guidance.guidance_scale_end": Renamed("guidance.guidance_scale", _scale_schedule),
    **{
        f"{section.name}.{alias}": Renamed(f"{section.name}.{field.name}")
        for section, field in settings()
        for alias in field.metadata["aliases"]
    },
}

# Settings that a stored run may lack, each with the value that reproduces the version without it.
WITHOUT: dict[str, Any] = {
    # the prompt of a side was the prompt and the name of the side
    **dict.fromkeys(("run.text_front", "run.text_side", "run.text_back", "run.text_overhead")),
    "run.output": None,
    "run.exp_start_iter": None,
    "run.exp_end_iter": None,
    "run.attention": "auto",
    "run.compile": False,
    "run.deterministic": False,
    "run.cuda_graph": False,
    "run.rescue": False,
    "camera.progressive_view": False,
    "camera.progressive_view_init_ratio": 0.2,
    "camera.jitter_pose": False,
    "camera.jitter_center": 0.2,
    "camera.jitter_target": 0.2,
    "camera.jitter_up": 0.02,
    "camera.view_blend": 90.0,  # front turned into side from 0 to 90 degrees
    "camera.angle_front": None,
    "field.n_frequencies": 12,
    "render.num_steps": 64,
    "render.upsample_steps": 32,
    "guidance.if_key": None,
    "guidance.clip_key": None,
    "guidance.objective": "sds",
    "guidance.loss_space": "noise",
    "guidance.inversion_steps": 10,
    "guidance.clip_grad_latent": -1.0,
    "guidance.perpneg": False,
    "guidance.negative_w": -2.0,
    "guidance.front_decay_factor": 2.0,
    "guidance.side_decay_factor": 10.0,
    "loss.regularizers": "plain",
    "loss.lambda_mesh_normal": 0.5,
    "loss.lambda_mesh_laplacian": 0.5,
    "dmtet.dmtet": False,
    "dmtet.init_with": None,
    "dmtet.dmtet_reso_scale": 8.0,
    "dmtet.tet_grid_size": 128,
    "dmtet.lr_geo": None,
    "dmtet.lock_geo": False,
    "optim.lr_decay": 1.0,
    "optim.lr_finest": 1.0,
    "output.test_interval": 100,
    "output.save_guidance": False,
    "output.save_guidance_interval": 10,
    "output.tensorboard": False,
    "output.profile": False,
    "output.decimate_target": 50_000,
    "output.texture_resolution": 2048,
}


class StoredRun(NamedTuple):
    """A stored run: its configuration, the version that wrote it, and the settings, by "section.name", that this
    version ignores."""

    config: Config
    version: str
    ignored: dict[str, Any]

    @property
    def is_of_this_version(self) -> bool:
        """True if this version wrote the run, so its defaults were the present ones."""
        return self.version == __version__


def read_run(data: Any) -> StoredRun:
    """Read settings as config.json holds them, of this version or another one.

    Raises UserError: when they are not those of a run, have bad values, or this version cannot ignore an unknown one.
    """
    if not isinstance(data, Mapping):
        raise UserError("it holds no settings of a run")
    version = data.get(VERSION_KEY, UNNAMED)
    _parse_version(version)
    sections = {section: values for section, values in data.items() if section != VERSION_KEY}
    if not all(isinstance(values, Mapping) for values in sections.values()):
        raise UserError("it holds no settings of a run")
    values = _rename(
        {f"{section}.{name}": value for section, group in sections.items() for name, value in group.items()}
    )
    known = [f"{section.name}.{field.name}" for section, field in settings()]
    ignored = {name: values.pop(name) for name in sorted(values.keys() - set(known))}
    _check_ignored(ignored, version)
    values = WITHOUT | values
    if missing := [name for name in known if name not in values]:
        raise UserError(f"it lacks settings that every version stores: {', '.join(missing)}")
    whole: dict[str, dict[str, Any]] = {}
    for name in known:
        section, _, setting = name.partition(".")
        whole.setdefault(section, {})[setting] = values[name]
    try:
        config = Config.from_dict(whole)
        validate(config)
    except UserError as error:
        if version == __version__:
            raise
        raise UserError(f"{error}; {way_to_read(version)}") from error
    return StoredRun(config, version, ignored)


def override_stored(stored: Config, typed: Mapping[str, Any], workspace: str, device: str) -> Config:
    """Return the configuration of a stored run overridden by the typed settings, in `workspace` and on `device`.

    `PER_COMMAND` settings come from the command alone. With `--test` the precision is that of the run. Raises
    UserError: when settings contradict each other.
    """
    typed = {name: value for name, value in typed.items() if not (name == "fp16" and typed.get("test"))}
    here = {"test": bool(typed.get("test")), "workspace": workspace, "device": device}
    config = stored.override({**PER_COMMAND, **typed, **here})
    validate(config)
    return config


def complete_architecture(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the architecture of a checkpoint's header with the names of this version, and with settings it lacks."""
    names = {_bare_name(old): _bare_name(new.name) for old, new in RENAMED.items() if new.value is None}
    values = {names.get(name, name): value for name, value in saved.items()}
    unread = settings_unused_by(str(values.get("backbone")))
    missing = {_bare_name(name): value for name, value in WITHOUT.items() if name.startswith("field.")}
    return {name: value for name, value in missing.items() if name not in unread} | values


def unknown_settings(saved: Mapping[str, Any]) -> list[str]:
    """Return the settings in the architecture of a checkpoint's header that this version does not have."""
    return sorted(complete_architecture(saved).keys() - {field.name for _, field in settings()})


def way_to_read(version: Any) -> str:
    """Return the end of the message about a file that `version` wrote and this one cannot read."""
    if _parse_version(version) > _parse_version(__version__):
        return f"dream-fast {version} wrote it and this is {__version__}: upgrade dream-fast"
    return f"dream-fast {version}, which wrote it, reads it; this is {__version__}"


def _parse_version(version: Any) -> tuple[int, ...]:
    """Return the numbers of a version, for comparing. Raises UserError: when it is not a version."""
    if not isinstance(version, str) or not re.fullmatch(r"\d{1,6}(\.\d{1,6}){1,3}", version, re.ASCII):
        raise UserError(f"{version!r} is not a version of dream-fast")
    return tuple(map(int, version.split(".")))


def _bare_name(name: str) -> str:
    """Return the name of a setting without its section."""
    return name.partition(".")[2]


def _rename(values: dict[str, Any]) -> dict[str, Any]:
    """Return `values` under the names of this version."""
    renamed = {}
    for old, new in RENAMED.items():
        if old in values:
            renamed[new.name] = values[old] if new.value is None else new.value(values[old], values)
    return {name: value for name, value in values.items() if name not in RENAMED} | renamed


def _check_ignored(ignored: Mapping[str, Any], version: str) -> None:
    """Raise UserError for unknown settings of this version, of a newer one, or of the field."""
    if not ignored:
        return
    unknown = f"it has settings that this version of dream-fast does not know: {', '.join(ignored)}"
    if version == __version__:
        raise UserError(unknown)
    newer = _parse_version(version) > _parse_version(__version__)
    if newer or any(name.startswith("field.") for name in ignored):
        raise UserError(f"{unknown}; {way_to_read(version)}")


def snapshot() -> dict[str, Any]:
    """Return every setting with its default, and the differences of each preset, for JSON."""
    defaults = _flatten(reference().override({"preset": RunConfig().preset}))
    kinds: dict[str, dict[str, Any]] = {"grid": {}, "vanilla": {"backbone": "vanilla"}, "dmtet": {"dmtet": True}}
    kinds |= {name: {"objective": name} for name in OBJECTIVE_OVERRIDES} | {"reference": {"preset": "reference"}}
    models: dict[str, dict[str, Any]] = {DREAM_MINI.name: {}, "sd": {"guidance": (STABLE_DIFFUSION.name,)}}
    presets = {}
    for model, device, (kind, typed) in product(models, ("cpu", "cuda"), kinds.items()):
        values = _flatten(configure(models[model] | typed, device))
        presets[f"{model} {device} {kind}"] = {name: v for name, v in values.items() if v != defaults[name]}
    return {"settings": defaults, "presets": presets}


def _flatten(config: Config) -> dict[str, Any]:
    sections = json.loads(json.dumps(config.to_dict()))
    return {f"{section}.{name}": value for section, values in sections.items() for name, value in values.items()}


if __name__ == "__main__":
    print(json.dumps(snapshot(), indent=1))
