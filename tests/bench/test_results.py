"""Results of measurements: the commit that they state."""

from dream_fast.bench import results


def test_git_state_without_git(monkeypatch, tmp_path):
    """A copy without git takes its commit from GIT_STATE."""
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert results.git_state() == ("unknown", None)
    monkeypatch.setenv("GIT_STATE", "abc123-dirty")
    assert results.git_state() == ("abc123", True)
    monkeypatch.setenv("GIT_STATE", "abc123")
    assert results.git_state() == ("abc123", False)
