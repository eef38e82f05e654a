"""The table of guidances is complete and the only place with their names."""

import ast
from pathlib import Path

import pytest

import dream_fast
from dream_fast.engine.config.guidances import DIFFUSION_SETTINGS, GUIDANCES, GuidanceSpec, accept_latents
from dream_fast.engine.config.schema import settings
from dream_fast.engine.guidance.registry import BUILDERS

ROOT = Path(dream_fast.__file__).parent
# Files that name the kinds of pipelines, which are called as the guidances are, and answers to other programs' words.
OTHERS = {"engine/config/guidances.py", "engine/config/model_names.py", "engine/guidance/registry.py"}


def test_guidances_have_builders():
    """Every guidance of the table has a builder, and no other has."""
    assert BUILDERS.keys() == GUIDANCES.keys()


@pytest.mark.parametrize("spec", GUIDANCES.values(), ids=lambda spec: spec.name)
def test_guidance_settings_exist(spec: GuidanceSpec):
    """Settings of a guidance and its model are fields of the configuration."""
    names = {field.name for _, field in settings()}
    assert spec.settings_read | set(spec.model_settings) | spec.default_model.keys() <= names
    assert spec.is_diffusion == (spec.settings_read == DIFFUSION_SETTINGS)
    assert spec.is_diffusion or spec.objective, "the start line of a run needs a phrase"


def test_guidance_names_in_table():
    """No other module of the engine or the command compares with the name of a guidance."""
    for path in [ROOT / "cli.py", *(ROOT / "engine").rglob("*.py")]:
        name = path.relative_to(ROOT).as_posix()
        if name in OTHERS or name.startswith("engine/guidance/model/"):
            continue
        literals = {node.value for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                    if isinstance(node, ast.Constant) and isinstance(node.value, str)}  # fmt: skip
        names = literals & (GUIDANCES.keys() - {"dream-mini", "IF"}) | literals & {"dream-mini"}
        assert not names, f"{name} has {names}"


@pytest.mark.parametrize(
    ("names", "accepts"),
    [(["SD"], True), (["SD", "clip"], True), (["clip"], False), (["IF"], False), (["IF", "SD"], False), ([], False)],
)
def test_accept_latents_combinations(names, accepts):
    """A guidance without a diffusion model is left out of a latent phase; a pixel-space model forbids it."""
    assert accept_latents([GUIDANCES[name] for name in names]) is accepts
