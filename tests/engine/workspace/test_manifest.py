"""The manifest of a run: what it was made with."""

import torch

from dream_fast.engine.workspace import manifest


def test_versions_torch_build(monkeypatch):
    """Torch's version has its build, as +cu130, also where the installed package's version lacks it."""
    monkeypatch.setattr(manifest.metadata, "version", lambda package: "1.2.3")
    monkeypatch.setattr(torch, "__version__", "1.2.3+cu130")
    versions = manifest._versions()
    assert (versions["torch"], versions["numpy"]) == ("1.2.3+cu130", "1.2.3")
