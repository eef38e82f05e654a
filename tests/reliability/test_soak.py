"""The soak run: the faults it finds, and resuming between pieces."""

import gc
import json

import pytest

from dream_fast.bench.reliability import soak

FLAT = [{"in_piece": i, "host_bytes": 1e9, "device_bytes": 2e9, "files": 9, "it_per_s": 50.0} for i in range(1, 101)]


def test_faults_of_a_flat_run():
    """A flat run has no faults, its warm-up does not count, and too few rows are one."""
    slow = [row | {"it_per_s": 1.0, "host_bytes": 2e9} if row["in_piece"] <= 20 else row for row in FLAT]
    assert soak.find_faults(FLAT, 10) == soak.find_faults(slow, 20) == []
    assert "too few" in soak.find_faults(FLAT, 200)[0]


@pytest.mark.parametrize(
    ("name", "growth"), [("host_bytes", 0.03), ("device_bytes", 0.03), ("files", 0.5), ("it_per_s", -0.12)]
)
def test_faults_name_what_grows_or_slows(name, growth):
    """Growth of memory or files, and loss of speed, are one sentence each."""
    rows = [row | {name: row[name] * (1 + growth * row["in_piece"] / 100)} for row in FLAT]
    (fault,) = soak.find_faults(rows, 0)
    assert fault.startswith(name)


def test_main_resumes_pieces(tmp_path, monkeypatch, capsys):
    """A second call continues after the steps of the first; garbage collection skips imported modules."""
    from dream_fast.engine import run as run_module

    def run_fake(config, loop):
        row = {}
        loop.on_row(row)
        assert row.keys() == {"host_bytes", "device_bytes", "files"}
        frozen.append(gc.get_freeze_count())
        start = ends[-1] if ends else 0
        rows = [row | {"step": start + row["in_piece"]} for row in FLAT[: config.run.iters - start]]
        with (tmp_path / "metrics.jsonl").open("a") as out:
            out.writelines(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "manifest.json").write_text(json.dumps({"runs": [{"from_step": start}]}))
        ends.append(config.run.iters)

    ends: list[int] = []
    frozen: list[int] = []
    monkeypatch.setattr(run_module, "run", run_fake)
    words = ["--piece", "50", "--warm_up", "5", "--device", "cpu", "--workspace", str(tmp_path), "--steps"]
    assert soak.main([*words, "50"]) == 0
    assert soak.main([*words, "100"]) == 0 and ends == [50, 100]
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"steps": 100, "faults": []}
    assert min(frozen) > 10_000 and gc.get_freeze_count() == 0
