"""The configuration of a run that continues a stored one."""

import pytest

from dream_fast.engine.config.configure import RESCUED, finalize
from dream_fast.engine.config.presets import dream_mini_cpu
from dream_fast.engine.errors import UserError

NEW = dream_mini_cpu()
STORED = NEW.override({"seed": 5, "lr": 0.25, "blob_density": 3.0, "lambda_opacity": 7.0, "w": 40})


@pytest.mark.parametrize(
    ("typed", "stored", "seed"),
    [({}, None, 9), ({}, STORED, 5), ({"seed": 3}, STORED, 3), ({"seed": 3}, None, 3), ({"seed": 0}, STORED, 0)],
)
def test_finalize_seed(typed, stored, seed):
    """A typed seed wins over that of the stored run; a new run gets the drawn one."""
    assert finalize(NEW.override(typed), stored, 9).run.seed == seed


def test_finalize_rescued_settings():
    """With --rescue only the rescued settings of the stored run are kept; without it none."""
    rescued = finalize(NEW.override({"rescue": True}), STORED, 9)
    assert {name: rescued.get(name) for name in RESCUED} == {name: STORED.get(name) for name in RESCUED}
    assert rescued.camera == NEW.camera and rescued.optim.lr == 0.25
    assert finalize(NEW, STORED, 9) == NEW.override({"seed": 5})
    assert finalize(NEW.override({"rescue": True}), None, 9) == NEW.override({"rescue": True, "seed": 9})


def test_finalize_validates():
    """A configuration made in Python is checked before it runs."""
    with pytest.raises(UserError, match="--latent_iter_ratio 0.5 cannot be combined with --guidance clip"):
        finalize(NEW.override({"guidance": ("clip",), "latent_iter_ratio": 0.5}), None, 9)
