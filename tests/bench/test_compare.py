"""The comparison of two results of the benchmark: limits, order, identity of rows and the printed table."""

import json

import pytest

from dream_fast.bench import compare

ROW = {"op": "field", "case": "rays_64", "impl": "triton", "mode": "forward", "dtype": "float16", "call": "eager"}


def row(median, spread=0.0, **changes):
    return ROW | {"median_ms": median, "p20_ms": median - spread / 2, "p80_ms": median + spread / 2} | changes


def result(*rows, **changes):
    return {"schema": 1, "gpu": "NVIDIA H200", "rows": list(rows)} | changes


def test_allowed_is_a_twentieth_of_the_base_or_twice_the_wider_spread():
    """The limit belongs to the median of the base, and to the spread of whichever run is noisier."""
    assert compare.allowed_slowdown(row(8.0), row(16.0)) == 0.05 * 8.0
    assert compare.allowed_slowdown(row(8.0, 0.5), row(8.0, 0.25)) == 1.0
    assert compare.allowed_slowdown(row(8.0, 0.25), row(8.0, 0.5)) == 1.0


def test_compare_finds_what_exceeds_the_limit_itself_worst_first():
    """A row at its limit is not slower; of those beyond, the one with the greatest ratio comes first."""
    before = [row(8.0, 0.5, case="at"), row(8.0, 0.5, case="a"), row(2.0, case="b"), row(4.0, case="c"), row(1.0)]
    after = [row(9.0, 0.5, case="at"), row(9.5, 0.5, case="a"), row(4.0, case="b"), row(6.0, case="c"), row(0.5)]
    slower, missing = compare.compare(result(*before), result(*reversed(after)))
    assert [(old["median_ms"], new["median_ms"]) for old, new in slower] == [(2.0, 4.0), (4.0, 6.0), (8.0, 9.5)]
    assert missing == []


def test_compare_returns_the_rows_that_are_gone():
    """A row of the base alone is returned; a row of the new run alone is not."""
    slower, missing = compare.compare(result(row(1.0), row(2.0, case="gone")), result(row(1.0), row(3.0, case="new")))
    assert slower == [] and missing == [row(2.0, case="gone")]


@pytest.mark.parametrize("name", sorted(compare.MEASURED))
def test_identity_leaves_out_what_is_measured(name):
    """Measurements make no other row."""
    assert compare.identity(ROW | {name: 7}) == compare.identity(ROW) == tuple(sorted(ROW.items()))


@pytest.mark.parametrize("name", sorted(ROW))
def test_identity_takes_every_other_field(name):
    """Another operator, case, way of calling or dtype is another row."""
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
def test_rows_of_earlier_files_have_the_call_of_their_time(op, impl, call):
    """Without the field, a row is the one that was replayed where it could be, and no other."""
    old = {name: value for name, value in row(1.0, op=op, impl=impl).items() if name != "call"}
    others = {"graph": "eager", "eager": "graph"}
    slower, missing = compare.compare(result(old), result(row(2.0, op=op, impl=impl, call=call)))
    assert len(slower) == 1 and missing == []
    assert compare.identity(old) != compare.identity(row(1.0, op=op, impl=impl, call=others[call]))


def write(path, record):
    path.write_text(json.dumps(record), encoding="utf-8")
    return str(path)


def test_table_of_slower_rows(tmp_path, capsys):
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


def test_summary_counts_the_rows_that_both_have(tmp_path, capsys):
    """Without a slower row the number of compared rows is printed, and the GPU."""
    base = write(tmp_path / "base", result(row(1.0), row(2.0, case="b"), row(3.0, case="gone")))
    assert compare.main([base, write(tmp_path / "new", result(row(1.0), row(2.0, case="b")))]) == 0
    assert capsys.readouterr().out.splitlines()[1] == "nothing slower among 2 rows (NVIDIA H200)"


@pytest.mark.parametrize("name", ["schema", "gpu", "rows"])
def test_load_names_the_field_that_a_result_lacks(name, tmp_path):
    """A file without one of the fields is no result."""
    record = {key: value for key, value in result(row(1.0)).items() if key != name}
    with pytest.raises(compare.CannotCompare, match=f"is not a result of `bench kernels`: KeyError\\('{name}'\\)"):
        compare.load_run(tmp_path / write(tmp_path / "run", record))


@pytest.mark.parametrize("name", ["median_ms", "p20_ms", "p80_ms"])
def test_load_refuses_a_row_without_its_times(name, tmp_path):
    """Every row has a median and both quantiles."""
    broken = {key: value for key, value in row(1.0).items() if key != name}
    with pytest.raises(compare.CannotCompare, match=f"KeyError\\('{name}'\\)"):
        compare.load_run(tmp_path / write(tmp_path / "run", result(broken)))


def test_load_keeps_the_whole_result(tmp_path):
    """What is read back is what was written."""
    record = result(row(1.0), git_sha="a")
    assert compare.load_run(tmp_path / write(tmp_path / "run", record)) == record


@pytest.mark.parametrize(
    ("text", "complaint"), [("{", "{path}: Expecting property name"), ('{"schema": 1}', "{path} is not a result")]
)
def test_what_cannot_be_read_is_named_on_the_error_stream(text, complaint, tmp_path, capsys):
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
def test_results_of_other_kinds_are_not_compared(other, complaint):
    """Another schema, another GPU, or no common row: the sentence has both values."""
    with pytest.raises(compare.CannotCompare, match=complaint):
        compare.compare(result(row(1.0)), other)


def test_main_describes_itself(capsys):
    """--help prints the first line of the module's docstring."""
    with pytest.raises(SystemExit, match="0"):
        compare.main(["--help"])
    assert "Compare a run of the benchmark with an earlier one." in " ".join(capsys.readouterr().out.split())


def test_main_asks_for_two_files(capsys):
    """The usage names the command and both arguments."""
    with pytest.raises(SystemExit, match="2"):
        compare.main(["one"])
    printed = capsys.readouterr().err
    assert "usage: python -m dream_fast.bench compare [-h] base new" in printed
    assert "required: new" in printed
