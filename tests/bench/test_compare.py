"""The comparison of two results of the benchmark: limits, order, identity of rows and the printed table."""

import json

import pytest

from dream_fast.bench import compare

ROW = {"op": "field", "case": "rays_64", "impl": "triton", "mode": "forward", "dtype": "float16", "call": "eager"}


def row(median, spread=0.0, **changes):
    return ROW | {"median_ms": median, "p20_ms": median - spread / 2, "p80_ms": median + spread / 2} | changes


def result(*rows, **changes):
    return {"schema": 1, "gpu": "NVIDIA H200", "rows": list(rows)} | changes


def test_allowed_slowdown():
    """The limit is relative to the median of the base, and to the wider spread of the two runs."""
    assert compare.allowed_slowdown(row(8.0), row(16.0)) == 0.05 * 8.0
    assert compare.allowed_slowdown(row(8.0, 0.5), row(8.0, 0.25)) == 1.0
    assert compare.allowed_slowdown(row(8.0, 0.25), row(8.0, 0.5)) == 1.0


def test_compare_sorts_slower_rows():
    """A row at its limit is not slower; rows beyond it are sorted by their ratio."""
    before = [row(8.0, 0.5, case="at"), row(8.0, 0.5, case="a"), row(2.0, case="b"), row(4.0, case="c"), row(1.0)]
    after = [row(9.0, 0.5, case="at"), row(9.5, 0.5, case="a"), row(4.0, case="b"), row(6.0, case="c"), row(0.5)]
    slower, missing = compare.compare(result(*before), result(*reversed(after)))
    assert [(old["median_ms"], new["median_ms"]) for old, new in slower] == [(2.0, 4.0), (4.0, 6.0), (8.0, 9.5)]
    assert missing == []


def test_compare_missing_rows():
    """A row that only the base has is returned; one that only the new run has is not."""
    slower, missing = compare.compare(result(row(1.0), row(2.0, case="gone")), result(row(1.0), row(3.0, case="new")))
    assert slower == [] and missing == [row(2.0, case="gone")]


@pytest.mark.parametrize("name", sorted(compare.MEASURED))
def test_identity_without_measured_fields(name):
    """Measured fields are not part of a row's identity."""
    assert compare.identity(ROW | {name: 7}) == compare.identity(ROW) == tuple(sorted(ROW.items()))


@pytest.mark.parametrize("name", sorted(ROW))
def test_identity_with_other_fields(name):
    """A different operator, case, call or dtype is a different row."""
    assert compare.identity(ROW | {name: "other"}) != compare.identity(ROW)


@pytest.mark.parametrize(
    ("op", "impl", "call"),
    [
        ("field", "triton", "graph"),
        ("field", "reference", "eager"),
        ("field", "compiled", "eager"),
        ("bias_residual", "reference", "graph"),
        ("group_norm_silu", "compiled", "graph"),
    ],
)
def test_identity_of_rows_without_call(op, impl, call):
    """A row without the field is one of a graph if it was captured then, else an eager one."""
    old = {name: value for name, value in row(1.0, op=op, impl=impl).items() if name != "call"}
    others = {"graph": "eager", "eager": "graph"}
    slower, missing = compare.compare(result(old), result(row(2.0, op=op, impl=impl, call=call)))
    assert len(slower) == 1 and missing == []
    assert compare.identity(old) != compare.identity(row(1.0, op=op, impl=impl, call=others[call]))


def write(path, record):
    path.write_text(json.dumps(record), encoding="utf-8")
    return str(path)


def test_main_prints_slower_rows(tmp_path, capsys):
    """Columns of the printed table: row, median before and after in ms, change and limit in per cent of before."""
    base = write(tmp_path / "base", result(row(2.0, 0.16), row(3.0, case="gone")))
    new = write(tmp_path / "new", result(row(3.0)))
    assert compare.main([base, new]) == 1
    gone, head, line = capsys.readouterr().out.splitlines()
    assert gone == f"only in {base}: field gone forward float16 triton eager"
    assert head == f"{'slower on NVIDIA H200':70} {'before':>10} {'after':>10} {'change':>8} {'allowed':>8}"
    assert (
        line
        == f"{'field rays_64 forward float16 triton eager':70} {'2.0000':>10} {'3.0000':>10} {'+50.0%':>8} {'16.0%':>8}"
    )


def test_main_counts_common_rows(tmp_path, capsys):
    """Without a slower row the number of compared rows is printed, and the GPU."""
    base = write(tmp_path / "base", result(row(1.0), row(2.0, case="b"), row(3.0, case="gone")))
    assert compare.main([base, write(tmp_path / "new", result(row(1.0), row(2.0, case="b")))]) == 0
    assert capsys.readouterr().out.splitlines()[1] == "nothing slower among 2 rows (NVIDIA H200)"


@pytest.mark.parametrize("name", ["schema", "gpu", "rows"])
def test_load_run_missing_field(name, tmp_path):
    """A file without one of the fields is not a result."""
    record = {key: value for key, value in result(row(1.0)).items() if key != name}
    with pytest.raises(compare.CannotCompare, match=f"is not a result of `bench kernels`: KeyError\\('{name}'\\)"):
        compare.load_run(tmp_path / write(tmp_path / "run", record))


@pytest.mark.parametrize("name", ["median_ms", "p20_ms", "p80_ms"])
def test_load_run_row_without_times(name, tmp_path):
    """Every row has a median and both quantiles."""
    broken = {key: value for key, value in row(1.0).items() if key != name}
    with pytest.raises(compare.CannotCompare, match=f"KeyError\\('{name}'\\)"):
        compare.load_run(tmp_path / write(tmp_path / "run", result(broken)))


def test_load_run_round_trip(tmp_path):
    """A result is read back as it was written."""
    record = result(row(1.0), git_sha="a")
    assert compare.load_run(tmp_path / write(tmp_path / "run", record)) == record


@pytest.mark.parametrize(
    ("text", "complaint"), [("{", "{path}: Expecting property name"), ('{"schema": 1}', "{path} is not a result")]
)
def test_main_unreadable_file(text, complaint, tmp_path, capsys):
    """The exit status is 2, and standard output stays empty."""
    (tmp_path / "run").write_text(text)
    assert compare.main([str(tmp_path / "run")] * 2) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: " + complaint.format(path=tmp_path / "run"))


@pytest.mark.parametrize(
    ("other", "complaint"),
    [
        (result(row(1.0), schema=2), "schema differs: 1 and 2"),
        (result(row(1.0), gpu="A100"), "gpu differs: NVIDIA H200 and A100"),
        (result(), "the files have no row in common"),
    ],
)
def test_compare_other_kinds(other, complaint):
    """A different schema, a different GPU, or no common row: the message has both values."""
    with pytest.raises(compare.CannotCompare, match=complaint):
        compare.compare(result(row(1.0)), other)


def test_main_describes_itself(capsys):
    """--help prints the first line of the module's docstring."""
    with pytest.raises(SystemExit, match="0"):
        compare.main(["--help"])
    assert "Compare a run of the benchmark with an earlier one." in " ".join(capsys.readouterr().out.split())


def test_main_asks_for_two_files(capsys):
    """The usage has the command and both arguments."""
    with pytest.raises(SystemExit, match="2"):
        compare.main(["one"])
    printed = capsys.readouterr().err
    assert "usage: python -m dream_fast.bench compare [-h] base new" in printed
    assert "required: new" in printed
