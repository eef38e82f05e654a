"""The timing of a commit against its base: turns, repeat, verdict and trees, with artificial clocks."""

import json
import subprocess
from itertools import count
from pathlib import Path

import pytest

from dream_fast.bench.regression import timing, timing_side
from dream_fast.engine.errors import UserError

CALL = 0.05  # seconds of a call on the base


class Machine:
    """Two sides that take `CALL` a call, times the factor `slower(samples taken, side)`."""

    def __init__(self, slower=lambda moment, side: 1.0, missing=()):
        self.slower, self.missing, self.moment, self.turns, self.started = slower, missing, 0, "", 0

    def start(self):
        self.started += 1
        return MadeUp(self, "base"), MadeUp(self, "new")


class MadeUp:
    def __init__(self, machine, side):
        self.machine, self.side = machine, side

    def prepare(self, name):
        return "ImportError: no" if (self.side, name) in self.machine.missing else None

    def seconds(self, calls):
        machine = self.machine
        machine.turns += self.side[0]
        machine.moment += 1
        return calls * CALL * machine.slower(machine.moment, self.side)


def compared(machine, names=("a",), **options):
    """Names of slow workloads, and the printed names and ratios, those of the repeat last."""
    shown = []
    slow = timing.compare(list(names), machine.start, lambda row: shown.append((row.name, row.ratio)), **options)
    return slow, shown


def test_measure_row_alternates():
    """The first call sets the length of a sample; then each round is base, new, new, base."""
    machine = Machine()
    assert compared(machine) == ([], [("a", 1.0)])
    rounds = machine.turns[1:]
    assert machine.turns[0] == "b" and rounds == "bnnb" * (len(rounds) // 4) and len(rounds) >= 4 * timing.FEWEST_ROUNDS


@pytest.mark.parametrize(("factor", "slow"), [(1.2, False), (1.3, True), (0.5, False)])
def test_compare_confirms_slow_rows(factor, slow):
    """Only ratios above 1.25 are measured again, in fresh processes."""
    machine = Machine(lambda _, side: factor if side == "new" else 1.0)
    names, shown = compared(machine)
    assert (names == ["a"]) == slow and machine.started == 1 + slow
    assert shown == [("a", pytest.approx(factor))] * (1 + slow)


def test_compare_passes_unconfirmed_rows():
    """A ratio that the repeat does not confirm passes."""
    machine = Machine(lambda _, side: 2.0 if side == "new" and machine.started == 1 else 1.0)
    assert compared(machine) == ([], [("a", 2.0), ("a", 1.0)])


def test_measure_row_on_a_slowing_machine():
    """Every sample takes 1 % longer than the one before, so that the last takes several times as long as the first."""
    _, ((_, ratio),) = compared(Machine(lambda moment, _: 1.01**moment))
    assert ratio == pytest.approx(1, abs=1e-3)  # a sample is 1 % longer than the one before


@pytest.mark.parametrize("side", ["base", "new"])
def test_measure_row_under_load(side):
    """A third of one side's samples take five times as long; the verdict is that of the others."""
    turn = count()
    machine = Machine(lambda _, now: 5.0 if now == side and next(turn) % 3 == 2 else 1.0)
    assert compared(machine)[0] == []
    turn = count()
    machine = Machine(
        lambda _, now: (5.0 if now == side and next(turn) % 3 == 2 else 1.0) * (1.5 if now == "new" else 1.0)
    )
    assert compared(machine)[0] == ["a"]


@pytest.mark.parametrize("call", [1e-6, 1e-3, 0.3, 20.0])
def test_measure_row_plants_work(monkeypatch, call):
    """Half of the work is done once more, however long a call takes."""
    monkeypatch.setitem(globals(), "CALL", call)
    assert compared(Machine(), plant=1.5) == (["a"], [("a", pytest.approx(1.5))] * 2)


def test_compare_lists_missing_workloads(capsys):
    """A new operator has no base; when no workload has one, the command fails."""
    machine = Machine(missing={("base", "b")})
    assert compared(machine, ["a", "b"])[0] == []
    with pytest.raises(UserError, match="nothing could be compared with the base: b: ImportError"):
        compared(machine, ["b"])
    assert timing.format_row(timing.Row("b", missing="ImportError: no")).split()[1:5] == ["not", "in", "the", "base:"]


def test_measure_row_raises_in_this_tree():
    """A workload that the base can run must run on the new side."""
    with pytest.raises(timing.CannotRun, match="a: ImportError: no"):
        compared(Machine(missing={("new", "a")}))


def test_answer_requests_times_calls():
    """Preparation and warm-up are not timed, and a failure is answered with its reason."""
    now = [0.0]

    def prepare():
        now[0] += 100
        return lambda: now.__setitem__(0, now[0] + 3)

    def broken():
        raise OSError("no\nfile")

    requests = [{"prepare": "good"}, {"calls": 2}, {"prepare": "bad"}]
    replies = timing_side.answer_requests(map(json.dumps, requests), {"good": prepare, "bad": broken}, lambda: now[0])
    assert list(replies) == [{"missing": None}, {"seconds": 6.0}, {"missing": "OSError: no file"}]


def test_list_workloads():
    """The workloads are those of the registry of the benchmark, then the step."""
    names = list(timing_side.list_workloads())
    assert {name.split()[0] for name in names[:-1]} == {case.op for case in timing_side.SMALL}
    assert names[-1] == timing_side.STEP


def commit(root: Path, **files: str) -> None:
    """Commit packages with these texts."""
    for name, text in files.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name / "__init__.py").write_text(text)
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", root, "add", "-A"], check=True)
    subprocess.run(["git", "-C", root, *who, "commit", "-qm", "packages"], check=True)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with two commits: the first without bench/, the second, main, with another kernels/."""
    root = tmp_path / "repository"
    subprocess.run(["git", "init", "-q", "-b", "main", root], check=True)
    commit(root, kernels="WORK = 1.0")
    commit(root, kernels="WORK = 1.5", bench="# main's")
    monkeypatch.setattr(timing, "ROOT", root)
    return root


def test_two_trees(repository):
    """Both folders have a `dream_fast` with its own kernels and the same bench, and are removed at the end."""
    with timing.two_trees("HEAD~1") as trees:
        texts = [
            [(tree / "dream_fast" / name / "__init__.py").read_text() for name in ("kernels", "bench")]
            for tree in trees
        ]
        folder = trees[0].parent
    assert texts == [["WORK = 1.0", "# main's"], ["WORK = 1.5", "# main's"]]
    assert not folder.exists() and len(timing.git("worktree", "list").splitlines()) == 1
    assert timing.git("status", "--porcelain") == ""


def test_default_base(repository):
    """On main itself it is the commit before."""
    assert timing.default_base() == timing.git("rev-parse", "HEAD~1")
    subprocess.run(["git", "-C", repository, "checkout", "-qb", "branch"], check=True)
    commit(repository, engine="")
    assert timing.default_base() == timing.git("rev-parse", "main")


def test_main_refuses_unknown_names(repository, capsys):
    """An unknown commit and an unknown workload: status 2 and a line each."""
    assert timing.main(["--base", "nowhere"]) == 2
    assert timing.main(["--only", "nothing"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert "nowhere" in errors[0] and "no such workload" in errors[1] and len(errors) == 2


SIDE = """
import json, sys
from dream_fast.kernels import WORK
for line in sys.stdin:
    request = json.loads(line)
    print(json.dumps({"missing": None} if "prepare" in request else {"seconds": WORK * request["calls"]}), flush=True)
"""


def test_main_compares_two_commits(repository, capsys):
    """Real processes on both trees print the times of their own kernels."""
    (repository / "__init__.py").write_text("")
    (repository / "bench" / "regression").mkdir()
    (repository / "bench" / "regression" / "timing_side.py").write_text(SIDE)
    assert timing.main(["--base", "HEAD~1", "--only", "composite"]) == 1
    out = capsys.readouterr().out
    assert out.count("1.50  over 1.25") == 2 and "too slow, twice: composite rays_8" in out
    assert timing.main(["--base", "HEAD", "--only", "composite"]) == 0
    assert "nothing takes 1.25 times" in capsys.readouterr().out


def test_main_reports_dead_process(repository, capfd):
    """Status 1 and a sentence, with the message of the process above it."""
    (repository / "__init__.py").write_text("")
    (repository / "bench" / "regression").mkdir()
    (repository / "bench" / "regression" / "timing_side.py").write_text("raise SystemExit('no memory')")
    assert timing.main(["--base", "HEAD", "--only", "composite"]) == 1
    error = capfd.readouterr().err
    assert "no memory" in error and "error: a process ended with status 1" in error
