"""Runs stored by other versions: their settings, and refusals."""

import json
import re
from pathlib import Path

import pytest

from dream_fast import __version__
from dream_fast.engine.config.presets import reference
from dream_fast.engine.config.schedule import LinearSchedule, value_at
from dream_fast.engine.errors import UserError
from dream_fast.engine.workspace.stored_run import (
    RENAMED,
    WITHOUT,
    complete_architecture,
    read_run,
    snapshot,
    unknown_settings,
)

FIXTURES = Path(__file__).parents[2] / "fixtures" / "settings"
PAGE = Path(__file__).parents[3] / "docs" / "compatibility.md"
FIRST = "0.1.0+fc609ff"
NEWER = "999.0.0"


def settings_of(version: str) -> dict[str, object]:
    """The settings of a version with their defaults, by "section.name"."""
    return json.loads((FIXTURES / f"{version}.json").read_text(encoding="utf-8"))["settings"]


def stored(values: dict[str, object], version: str | None = None) -> dict[str, object]:
    """`values` as config.json has them; 0.1.0 stored no version."""
    data: dict[str, object] = {} if version is None else {"version": version}
    for name, value in values.items():
        room, _, setting = name.partition(".")
        data.setdefault(room, {})[setting] = value
    return data


def test_snapshot_is_current():
    """No setting, default or preset changes without a new version."""
    path = FIXTURES / f"{__version__}.json"
    steps = "docs/compatibility.md has the steps for a change of settings"
    assert path.exists(), f"{path.name} is missing: {steps}"
    before, now = json.loads(path.read_text(encoding="utf-8")), json.loads(json.dumps(snapshot()))
    assert now["settings"] == before["settings"], f"settings are not those of {__version__}: {steps}"
    assert now["presets"] == before["presets"], f"presets are not those of {__version__}: {steps}"


def test_tables_cover_every_version():
    """Each newer setting has a value for older runs; removed ones are listed."""
    now = snapshot()["settings"].keys()
    assert WITHOUT.keys() == now - {RENAMED[name].name if name in RENAMED else name for name in settings_of(FIRST)}
    versions = [path.stem for path in FIXTURES.glob("*.json")]
    gone = {name for version in versions for name in settings_of(version)} - now - RENAMED.keys()
    assert {"shading.light_phi", "shading.light_theta"} <= gone
    assert {new.name for new in RENAMED.values()} <= now
    page = PAGE.read_text(encoding="utf-8")
    assert [name for name in gone if f"`--{name.partition('.')[2]}`" not in page] == []
    assert re.search(r"^\| (\d+(?:\.\d+)+) \|", page, re.MULTILINE)[1] == __version__


def test_read_run_first_version():
    """Settings of the first version are kept, newer ones reproduce it, and removed ones are listed."""
    values = settings_of(FIRST) | {"run.text": "a cat", "optim.lr": 0.25, "shading.light_phi": 12.0}
    run = read_run(json.loads(json.dumps(stored(values))))
    assert (run.version, run.is_of_this_version) == ("0.1.0", False)
    assert run.ignored == {"shading.light_phi": 12.0, "shading.light_theta": 60.0}
    assert run.config.run.text == "a cat" and run.config.optim.lr == 0.25
    assert run.config == reference().override({"text": "a cat", "lr": 0.25, "preset": "auto"})


def test_stored_missing_setting(monkeypatch):
    """A missing setting has the value of that version, even if its default changed."""
    monkeypatch.setitem(WITHOUT, "camera.view_blend", 45.0)
    assert read_run(stored(settings_of(FIRST))).config.camera.view_blend == 45.0
    assert read_run(stored(settings_of("0.1.0"))).config.camera.view_blend == 90.0


@pytest.mark.parametrize("end", [None, 2.0])
def test_read_run_guidance_scale_end(end):
    """--guidance_scale_end of 0.1.0 becomes a linear schedule over the run."""
    values = settings_of(FIRST) | {"guidance.guidance_scale": 8.0, "guidance.guidance_scale_end": end}
    run = read_run(stored(values))
    for progress in (0.0, 0.3, 1.0):
        expected = 8.0 if end is None else 8.0 + (end - 8.0) * progress
        assert value_at(run.config.guidance.guidance_scale, 3, progress) == expected
    assert isinstance(run.config.guidance.guidance_scale, LinearSchedule) == (end is not None)
    assert not [name for name in run.ignored if "guidance" in name]


def test_plain_rename(monkeypatch):
    """A renamed setting keeps its value, in config.json and in the architecture of a checkpoint."""
    from dream_fast.engine.workspace import stored_run as module

    monkeypatch.setitem(RENAMED, "field.grid_levels", module.Renamed("field.n_levels"))
    values = settings_of("0.1.0")
    values["field.grid_levels"] = values.pop("field.levels") - 7
    assert read_run(stored(values)).config.field.n_levels == 9
    saved = {"backbone": "grid", "grid_levels": 9, "bound": 1.0}
    assert complete_architecture(saved) == {"backbone": "grid", "n_levels": 9, "bound": 1.0}


@pytest.mark.parametrize(
    ("version", "name", "sentence"),
    [
        (NEWER, "optim.momentum", rf"optim\.momentum; dream-fast {NEWER} wrote it and this is .*: upgrade dream-fast"),
        (NEWER, "field.depth", rf"field\.depth; dream-fast {NEWER} wrote it and this is .*: upgrade dream-fast"),
        (None, "field.depth", r"field\.depth; dream-fast 0\.1\.0, which wrote it, reads it"),
        (__version__, "optim.lrr", r"does not know: optim\.lrr$"),
    ],
)
def test_read_run_unknown_setting(version, name, sentence):
    """Settings of a newer version, of the field, and misspelt ones are refused with the version that reads them."""
    with pytest.raises(UserError, match=sentence):
        read_run(stored(settings_of("0.1.0") | {name: 3}, version))


def test_read_run_newer_known_settings():
    """A newer version with only known settings is read."""
    run = read_run(stored(settings_of(__version__) | {"run.text": "a cat"}, NEWER))
    assert run.config.run.text == "a cat" and run.version == NEWER and not run.is_of_this_version


def test_stored_value_out_of_bounds():
    """A value out of the present bounds is refused with the version that accepts it."""
    with pytest.raises(UserError, match=r"--n_levels must be at most 32, not 99; dream-fast 0\.1\.0, which wrote it"):
        read_run(stored(settings_of("0.1.0") | {"field.levels": 99}))


@pytest.mark.parametrize("version", [3, "", "newest", "1", "1.2.x", "1" * 5000 + ".0", None, ["0.2.0"]])
def test_read_run_bad_version(version):
    """A bad version is refused without a traceback."""
    data = stored(settings_of("0.1.0")) | {"version": version}
    with pytest.raises(UserError, match="is not a version of dream-fast"):
        read_run(data)


@pytest.mark.parametrize("data", [{}, [], {"model_type": "bert"}, {"run": {"text": "a cat"}}, {"optim": {"lr": 1}}])
def test_read_run_of_another_program(data):
    """A config.json without the settings of every version is not a run."""
    with pytest.raises(UserError, match="settings of a run|settings that every version stores"):
        read_run(data)


def test_complete_architecture_earlier():
    """An old header gets the values of its version; settings of other backbones are left out."""
    assert complete_architecture({"backbone": "vanilla", "bound": 1.0})["n_frequencies"] == 12
    assert "n_frequencies" not in complete_architecture({"backbone": "grid", "bound": 1.0})
    assert unknown_settings({"backbone": "grid", "depth": 3, "bound": 1.0}) == ["depth"]
