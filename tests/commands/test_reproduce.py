"""`bnkit reproduce`."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from bnkit._commands.reproduce import EXPERIMENTS, reproduce
from bnkit.experiments import small_batches
from bnkit.experiments._trials import Trial

TRIALS = [Trial(arm, 0.1, 0, 1.0, 0.5, 2.0) for arm in ("none", "batch", "renorm")]
TRIALS.append(Trial("group", 0.1, 0, math.nan, math.nan, math.nan))
"""Made-up runs, one of them diverged."""

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(reproduce)


def run(*arguments):
    return CliRunner().invoke(app, arguments)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_has_its_function_page_and_claim(name):
    module = importlib.import_module(f"bnkit.experiments.{EXPERIMENTS[name][0]}")
    assert callable(getattr(module, EXPERIMENTS[name][0]))
    assert callable(module.page_of)
    assert module.__doc__.startswith("Claim: ")


def test_list():
    result = run("list")
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.output.splitlines()] == list(EXPERIMENTS)


def test_an_unknown_name_is_bad_use():
    with pytest.raises(ValueError, match=r"unknown experiment 'small': did you mean small-batches"):
        raise run("small").exception


@pytest.fixture
def quick(monkeypatch):
    made = small_batches.SmallBatches(small_batches.SmallBatchesConfig(), TRIALS)

    def small(*, progress):
        progress.phase("quick", 1)
        return made

    monkeypatch.setattr(small_batches, "small_batches", small)


@pytest.mark.usefixtures("quick")
def test_prints_claim_table_and_answer():
    output = run("small-batches").output
    assert "Batches of two images" in output
    assert "diverged" in output
    assert "Batch normalization reaches 50.00%" in output


@pytest.mark.usefixtures("quick")
def test_json_is_valid():
    result = run("small-batches", "--json")
    found = json.loads(result.stdout)
    assert found["config"]["batch_size"] == 2
    assert found["trials"][3]["accuracy"] is None
    assert found["claim"] == small_batches.CLAIM
    assert found["environment"]["torch"] == torch.__version__


@pytest.mark.usefixtures("quick")
def test_writes_report_and_runs(tmp_path):
    assert run("small-batches", "--out", str(tmp_path / "new")).exit_code == 0
    assert json.loads((tmp_path / "new" / "run.json").read_text())["trials"][1]["arm"] == "batch"
    assert "Batches of two images" in (tmp_path / "new" / "report.html").read_text()


@pytest.mark.usefixtures("quick")
def test_only_the_first_process_prints_and_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    result = run("small-batches", "--out", str(tmp_path / "new"), "--json")
    assert (result.exit_code, result.output) == (0, "")
    assert not (tmp_path / "new").exists()


@pytest.fixture
def with_options(monkeypatch):
    """An experiment that needs data and may have weights; what it was given."""
    given = {}

    def small(data, *, weights=None, progress):
        given.update(data=data, weights=weights)
        return small_batches.SmallBatches(small_batches.SmallBatchesConfig(), TRIALS)

    monkeypatch.setattr(small_batches, "small_batches", small)
    return given


def test_options_reach_an_experiment_that_takes_them(with_options):
    assert run("small-batches", "--data", "digits", "--weights", "w").exit_code == 0
    assert with_options == {"data": "digits", "weights": Path("w")}


@pytest.mark.usefixtures("with_options")
def test_an_option_that_is_needed():
    with pytest.raises(ValueError, match=r"small-batches needs --data"):
        raise run("small-batches").exception


@pytest.mark.parametrize("option", ["data", "weights"])
def test_an_option_that_is_not_taken(option):
    with pytest.raises(ValueError, match=f"large-batches takes no --{option}, got x: leave it out"):
        raise run("large-batches", f"--{option}", "x").exception
