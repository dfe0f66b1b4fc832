"""`bnkit reproduce`."""

from __future__ import annotations

import importlib
import json
import math

import pytest
import typer
from typer.testing import CliRunner

from bnkit._commands.reproduce import EXPERIMENTS, reproduce
from bnkit.experiments import small_batches
from bnkit.experiments._trials import Trial

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
    """Made-up runs, one of them diverged."""
    runs = [Trial(arm, 0.1, 0, 1.0, 0.5, 2.0) for arm in ("none", "batch", "renorm")]
    runs.append(Trial("group", 0.1, 0, math.nan, math.nan, math.nan))
    made = small_batches.SmallBatches(small_batches.SmallBatchesConfig(), runs)

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
