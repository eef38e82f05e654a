"""The tables of PROFILING.md: their content, and that the page is current."""

import json

import pytest

from dream_fast.bench import report


def make_result(*rows: dict) -> dict:
    """A file of results with these rows."""
    head = {"gpu": "NVIDIA H9", "git_sha": "abcdef0123", "utc": "2026-11-29T00:00:00+00:00", "torch": "2.11.0+cu130"}
    head |= {"triton": "3.6.0", "driver": "580", "copy_rate": 3e12, "matmul_rate": 8e14}
    return head | {"steps": {"default": {"git_sha": "fedcba9876"}}, "rows": list(rows)}


def make_row(**changes) -> dict:
    row = {"op": "field", "case": "rays_64", "impl": "triton", "mode": "forward", "dtype": "float16"}
    return row | {"median_ms": 0.12345, "floor_ms": 0.01, "peak_bytes": 1 << 29} | changes


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A folder of results to write into."""
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    return tmp_path


@pytest.mark.skipif(not report.PAGE.exists(), reason="an installed package carries no documents")
def test_page_is_current() -> None:
    """PROFILING.md has the values of bench/results."""
    text = report.PAGE.read_text(encoding="utf-8")
    assert report.fill_page(text) == text, "write it anew: python -m dream_fast.bench report --write"


def test_format_number_keeps_three_digits() -> None:
    """Large numbers keep all digits before the point, and a missing one is an empty cell."""
    numbers = (0.012345, 1.2345, 12.345, 123.45, 1234.5, None)
    assert [report.format_number(n) for n in numbers] == ["0.0123", "1.23", "12.3", "123", "1234", ""]


def test_kernels_table_shows_both_gpus(results) -> None:
    """A row has the times of both GPUs and the target; one without target and peer, and a norm, are left out."""
    peer = make_row(impl="reference", median_ms=9.0)
    other = make_row(case="rays_8"), make_row(op="group_norm_silu", case="vae_8x8x8")
    (results / report.H100).write_text(json.dumps(make_result(make_row(), *other)))
    (results / report.H200).write_text(json.dumps(make_result(make_row(median_ms=0.1), peer)))
    *_, line = report.kernels_table().splitlines()
    assert line == "| field | rays_64 | fwd | 0.123 | 0.01 | 0.19 | 0.12 | 0.192 | 0.1 | | 9 |"
    assert "rays_8" not in report.kernels_table() and "vae" not in report.kernels_table()
    assert "NVIDIA H9: commit abcdef0, 2026-11-29, torch 2.11.0" in report.kernels_table()


@pytest.mark.parametrize("order", [1, -1])
def test_index_rows_prefers_the_graph(order):
    """If an implementation has rows of both calls, that of the graph is used, in any order."""
    both = [make_row(call="graph", median_ms=1.0), make_row(call="eager", median_ms=2.0)][::order]
    only = make_row(case="rays_8", call="eager", median_ms=3.0)
    index = report.index_rows({"rows": [*both, only]})
    assert index["field", "rays_64", "forward"]["triton"]["median_ms"] == 1.0
    assert index["field", "rays_8", "forward"]["triton"]["median_ms"] == 3.0


def test_norms_table_has_both_modes_in_a_row(results) -> None:
    """Forward is on the left, forward and backward on the right; cells without a backward are empty."""
    norm = {"op": "group_norm_silu", "case": "vae_8x8x8"}
    rows = make_row(**norm), make_row(**norm, mode="forward_backward", median_ms=0.5), make_row(op="bias_residual")
    (results / report.H100).write_text(json.dumps(make_result(*rows)))
    lines = report.norms_table().splitlines()[2:]
    assert lines[0] == "| vae_8x8x8 | 0.123 | 0.01 | | | | 0.5 | 0.01 | | | |"
    assert lines[1] == "| bias_residual rays_64 | 0.123 | 0.01 | | | | | | | | |"


def test_step_table_names_commit_and_target(results) -> None:
    """The commit is that of the case, and only our step has a target."""
    step = {"op": report.STEP, "case": "default", "mode": "train", "modules_ms": {"unet": 8.0, "vae_encoder": 7.0}}
    rows = make_row(**step, median_ms=22.0), make_row(**step, impl="reference", median_ms=300.0)
    (results / report.H100).write_text(json.dumps(make_result(*rows)))
    lines = report.step_table().splitlines()[2:]
    assert lines[0] == "| default | H9 | 22 | 26 | 0.5 | 5 | 8 | 7 | fedcba9 |"
    assert lines[1] == "| default, plain diffusers and references | H9 | 300 | | 0.5 | | 8 | 7 | fedcba9 |"


def test_end_to_end_table_reads_old_records(results) -> None:
    """A record without the parts of its time has empty cells."""
    machine = {"cores": 2, "processor": "CPU"}
    record = {"seconds": 57.84, "host_peak_bytes": 1 << 30, "peak_bytes": {"device": 1 << 29}, "gpu": "NVIDIA H9"}
    (results / "main_job-cuda.json").write_text(json.dumps(record | {"machine": machine}))
    assert report.end_to_end_table().splitlines()[2] == "| NVIDIA H9, CPU, 2 cores | 57.8 | | | | 1.00 | 0.50 |"


def test_fill_page_refuses_wrong_markers(results) -> None:
    """Every table has one marker, and every marker an end."""
    page = "".join(f"<!-- table: {name} -->\nold\n{report.END}\nrest\n" for name in report.TABLES)
    filled = report.fill_page(page)
    assert "old" not in filled and filled.count("rest") == len(report.TABLES)
    assert report.fill_page(filled) == filled
    with pytest.raises(ValueError, match="one marker for each"):
        report.fill_page(page.replace("table: norms", "table: other"))
    with pytest.raises(ValueError, match="after the table norms"):
        report.fill_page(page.removesuffix(f"{report.END}\nrest\n"))


def test_main_writes_the_page(results, monkeypatch, capsys) -> None:
    """Without --write the tables are printed and the page stays."""
    page = results / "PROFILING.md"
    page.write_text("".join(f"<!-- table: {name} -->\nold\n{report.END}\n" for name in report.TABLES))
    monkeypatch.setattr(report, "PAGE", page)
    assert report.main([]) == 0 and "old" in page.read_text() and "| operator |" in capsys.readouterr().out
    assert report.main(["--write"]) == 0 and "old" not in page.read_text()
