"""The page of options is current and complete."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dream_fast
from dream_fast.cli import build_parser
from dream_fast.engine.config.compat import DIFFERENCES, REFERENCE_FLAGS, UNSUPPORTED_FLAGS, UNSUPPORTED_VALUES
from dream_fast.engine.config.configure import configure
from dream_fast.engine.config.options_page import MOST_USED, page
from dream_fast.engine.config.presets import dream_mini_cpu, dream_mini_gpu
from dream_fast.engine.config.schema import settings
from dream_fast.engine.config.sections import OptimConfig
from dream_fast.engine.training.optim import Optimizer

FOLDER = Path(dream_fast.__file__).parent
PAGE = FOLDER / "docs" / "options.md"


def rows(part: str) -> dict[str, list[str]]:
    """The other cells of each row of a table, by its flag."""
    lines = [line for line in part.splitlines() if line.startswith("| `-")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    table = {name.strip("`"): others for name, *others in cells}
    assert len(table) == len(lines), "a flag has two rows"
    return table


@pytest.fixture(scope="module")
def tables() -> dict[str, dict[str, list[str]]]:
    """The tables of flags on the page, by their heading."""
    return {part.partition("\n")[0]: rows(part) for part in page().split("\n## ")[1:]}


@pytest.mark.skipif(not PAGE.exists(), reason="an installed package carries no docs")
def test_page_is_current():
    again = "python -m dream_fast.engine.config.options_page > docs/options.md"
    assert PAGE.read_text(encoding="utf-8") == page(), f"write it anew: {again}"
    assert "(docs/options.md)" in (FOLDER / "README.md").read_text(encoding="utf-8")


def test_every_flag_of_the_command_has_a_row(tables):
    taken = set(build_parser()._option_string_actions) - {"-h", "--help"}
    flags = {flag for flag in taken if not (flag.startswith("--no-") and f"--{flag[5:]}" in taken)}
    assert set(tables["Flags"]) | set(tables["Earlier names"]) == flags
    assert not set(tables["Flags"]) & set(tables["Earlier names"])


def test_most_used_flags_come_first(tables):
    """The most used flags are first, with the meanings of their own rows."""
    first, used = next(iter(tables.items()))
    assert first == "The flags that people use" and list(used) == MOST_USED and 12 <= len(used) <= 15
    assert all(meaning == tables["Flags"][flag][-1] for flag, (meaning,) in used.items())


def test_learning_rates_on_page():
    """The table has the learning rates of each group, as the optimiser uses them."""
    table, other = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(3))
    lines = page().partition("## Learning rates")[2].splitlines()
    shown = [line.strip("| ").split(" | ")[1:] for line in lines if line.startswith(("| MLPs", "| hash", "| shape"))]
    for column, optim in enumerate(("adan", "adam")):
        rates = Optimizer(
            table, [other], OptimConfig(optim=optim), [torch.nn.Parameter(torch.zeros(1))]
        ).learning_rates()
        assert [row[column] for row in shown] == [f"{rates[name]:g}" for name in ("network", "table", "shape")]


def test_defaults_are_shown_where_they_differ(tables):
    shown, cpu, cuda = tables["Flags"], dream_mini_cpu(), dream_mini_gpu()
    assert shown["--iters"][:3] == ["10000", str(cpu.run.iters), str(cuda.run.iters)]
    assert shown["--theta_range"][:3] == ["45 105", "50 95", "50 95"]
    assert shown["--cuda_graph"][:3] == ["off", "", "on"]
    assert shown["--device"][:3] == ["auto", "", ""]
    assert shown["--seed"][:3] == ["none", "", ""]
    assert shown["--negative"][0] == '""'
    for _, field in settings():
        assert shown[f"--{field.name}"][3].startswith(field.metadata["help"])


def test_reference_flags_on_page(tables):
    """Every flag of the reference works or is refused with the reason."""
    rows_of_reference = tables["The flags of stable-dreamfusion"]
    assert list(rows_of_reference) == REFERENCE_FLAGS
    for flag, (here, remark) in rows_of_reference.items():
        assert here == ("refused" if flag in UNSUPPORTED_FLAGS else "works")
        assert remark == UNSUPPORTED_FLAGS.get(flag, remark)
    assert set(DIFFERENCES) <= set(REFERENCE_FLAGS) - set(UNSUPPORTED_FLAGS)
    for (flag, value), why in UNSUPPORTED_VALUES.items():
        assert f"`{value}` is refused: {why}" in rows_of_reference[flag][1]


def test_vanilla_defaults_on_page(tables):
    """The defaults of the vanilla backbone are shown."""
    shown = tables["Defaults of the vanilla backbone"]
    assert shown["--lr_decay"] == ["0.1", "0.1", "0.1"] and shown["--hidden_layers"][0] == "4"
    for place, (typed, device) in enumerate([({"preset": "reference"}, "cpu"), ({}, "cpu"), ({}, "cuda")]):
        grid, vanilla = (configure(typed | {"backbone": name}, device) for name in ("grid", "vanilla"))
        for section, field in settings():
            before, after = (getattr(getattr(config, section.name), field.name) for config in (grid, vanilla))
            if field.name != "backbone":
                assert bool(shown.get(f"--{field.name}", [""] * 3)[place]) == (before != after)
    assert "`--n_levels`, " in page() and "`--lambda_wd`, `--lr_finest`.\n" in page()


def test_page_imports_nothing_heavy():
    """Printing the page imports nothing heavy."""
    code = "import runpy, sys; runpy.run_module('dream_fast.engine.config.options_page', run_name='__main__')"
    code += "; print([name for name in ('torch', 'numpy') if name in sys.modules], file=sys.stderr)"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert (process.stdout, process.stderr) == (page(), "[]\n")


def test_no_cell_breaks_its_table():
    columns = [len(re.findall(r"\|", line)) for line in page().splitlines() if line.startswith("| ")]
    assert set(columns) == {3, 4, 5, 6}
