"""The comparison as a whole, on few images and steps."""

import csv
import dataclasses
import json
import math

import pytest
import torch

from bnkit import experiments
from bnkit._checks import UserError
from bnkit.data import ImageSet, load
from bnkit.experiments import CompareConfig, compare, page_of, save, to_dict


@pytest.fixture(scope="module")
def digits():
    """A thousandth of the work: 1,200 of the bundled digits."""
    full = load("digits")
    return ImageSet(
        "digits",
        full.train_images[:1000],
        full.train_labels[:1000],
        full.test_images[:200],
        full.test_labels[:200],
        full.classes,
    )


class Watch:
    """Remembers what it is told, and interrupts when asked to."""

    def __init__(self, interrupt_in=None, at=0):
        self.phases, self.updates, self.interrupt_in, self.at = [], [], interrupt_in, at

    def phase(self, title, steps):
        self.phases.append((title, steps))

    def update(self, step, accuracies):
        self.updates.append((step, dict(accuracies)))
        if self.interrupt_in and self.interrupt_in in self.phases[-1][0] and step >= self.at:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def full(digits):
    watch = Watch()
    return compare(CompareConfig(steps=60, seeds=2, grid_steps=20), digits, watch), watch


def test_default_job_has_protocol_own_best_and_grid(full):
    result, watch = full
    assert [record.label for record in result.records] == [
        "without BN",
        "with BN",
        "without BN, own best",
        "with BN, own best",
    ]
    assert [c.configuration for c in result.protocol] == [
        experiments.Configuration(norm, 0.5, 0.01) for norm in ("none", "batch")
    ]
    for norm, record in zip(("none", "batch"), result.tuned, strict=True):
        assert record.configuration == result.grid.best_configuration(norm)
    assert result.grid.complete
    assert [title for title, _ in watch.phases] == ["grid of learning rates and initial scales", "training"]
    assert watch.updates[-1][0] == 60
    assert set(watch.updates[-1][1]) == {record.label for record in result.records}
    for record in result.records:
        assert record.steps == list(range(61))
        assert all(len(row) == 2 for row in record.accuracy)
    assert result.partial is None


def test_bn_learns_where_small_weights_hold_the_plain_network_back(full):
    """At rate 0.5 and standard deviation 0.01 the network without BN sits at chance; the claim in small."""
    result, _ = full
    without, with_bn = result.protocol
    assert with_bn.latest() > 0.4 > 0.25 > without.latest()


def test_a_model_may_be_named_with_its_library():
    config = CompareConfig(model="bnkit:mlp")
    assert config == CompareConfig(model="mlp")
    assert config.stacked
    for other in ("torchvision:resnet18", "timm:resnet18", "net.py:made"):
        with pytest.raises(UserError, match="compare exchanges norms, which only bnkit's own models let it, got"):
            CompareConfig(model=other)


def test_same_configuration_same_numbers(digits):
    config = CompareConfig(steps=5, quick=True)
    first, second = (compare(config, digits) for _ in range(2))
    assert [r.accuracy for r in first.records] == [r.accuracy for r in second.records]
    assert [r.loss for r in first.records] == [r.loss for r in second.records]


def test_another_seed_is_another_run(digits):
    runs = [compare(CompareConfig(steps=5, quick=True, seed=seed), digits) for seed in (0, 1)]
    assert runs[0].records[1].loss != runs[1].records[1].loss


def test_runs_of_several_seeds_are_those_of_each_seed_alone(digits):
    together = compare(CompareConfig(steps=5, quick=True, seed=3, seeds=2), digits)
    alone = compare(CompareConfig(steps=5, quick=True, seed=4), digits)
    for record, single in zip(together.records, alone.records, strict=True):
        for row, single_row in zip(record.loss, single.loss, strict=True):
            assert row[1] == pytest.approx(single_row[0], rel=1e-5)


def test_quick_leaves_the_grid_out(digits):
    result = compare(CompareConfig(steps=3, quick=True), digits)
    assert result.grid is None
    assert result.tuned == []


def test_conv_nets_take_turns_in_the_ordinary_loop(digits):
    result = compare(CompareConfig(model="lenet5", steps=4, batch_size=20), digits)
    assert [record.label for record in result.records] == ["without BN", "with BN"]
    assert all(record.steps == [0, 1, 2, 3, 4] for record in result.records)
    assert all(len(record.percentiles) == 5 for record in result.records)
    assert result.records[0].seconds[-1] > 0


def test_the_mlp_with_other_norms_agrees_with_the_stack(digits):
    """`group` forces the ordinary loop; its networks without and with BN are those of the stack."""
    stacked = compare(CompareConfig(steps=5, quick=True), digits)
    separate = compare(CompareConfig(steps=5, norms=("none", "batch", "group")), digits)
    for record, other in zip(stacked.records, separate.records, strict=False):
        assert [row[0] for row in other.loss] == pytest.approx([row[0] for row in record.loss], rel=1e-3)


def test_a_diverging_network_stops_and_the_other_goes_on(digits):
    result = compare(CompareConfig(model="lenet5", norms=("none", "batch"), learning_rate=300.0, steps=6), digits)
    without, with_bn = result.records
    assert without.diverged[0] >= 1
    assert math.isnan(without.latest())
    assert not with_bn.diverged
    note = page_of(result, "").tables[0].note
    assert f"stopped at step {without.diverged[0]}, where the loss was no longer finite at rate 300" in note


@pytest.mark.parametrize(
    ("phase", "at", "reason"),
    [
        ("training", 20, "interrupted after 20 of 60 steps"),
        ("grid", 8, "interrupted in the grid after 8 steps"),
    ],
)
def test_an_interrupt_keeps_what_was_measured(digits, tmp_path, phase, at, reason):
    result = compare(CompareConfig(steps=60, grid_steps=20), digits, Watch(phase, at))
    assert reason in result.partial
    save(result, tmp_path, "bnkit compare")
    assert reason in (tmp_path / "report.html").read_text()
    assert json.loads((tmp_path / "run.json").read_text())["partial"] == result.partial
    figures = {path.name for path in tmp_path.glob("*.svg")}
    assert "grid.svg" in figures
    assert ("accuracy.svg" in figures) == (phase == "training")


def test_an_interrupted_conv_net_keeps_what_was_measured(digits):
    result = compare(CompareConfig(model="lenet5", steps=8), digits, Watch("training", 2))
    assert result.partial == "interrupted after 2 of 8 steps"
    assert result.records[1].steps == [0, 1, 2]


def test_files_hold_everything(full, tmp_path):
    result, _ = full
    save(result, tmp_path, "bnkit compare --steps 60")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"report.html", "metrics.csv", "run.json", "accuracy.svg", "activations.svg", "grid.svg"}
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["command"] == "bnkit compare --steps 60"
    config = {**run["config"], "norms": tuple(run["config"]["norms"])}
    assert CompareConfig(**config) == dataclasses.replace(result.config, learning_rate=0.5)
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert len(rows) == 4 * 61 * 2
    row = next(r for r in rows if r["network"] == "with BN" and r["step"] == "7" and r["seed"] == "1")
    assert float(row["test_accuracy"]) == pytest.approx(result.protocol[1].accuracy[7][1], abs=1e-6)


def test_json_has_no_nan(full):
    result, _ = full
    json.dumps(to_dict(result, ""), allow_nan=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "mpl"}, "unknown model 'mpl': did you mean mlp"),
        ({"norms": ("bath",)}, "unknown norm 'bath': did you mean batch"),
        ({"norms": ("none", "none")}, "each norm once, got none, none"),
        ({"norms": ()}, "each norm once"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"seed": -1}, "must not be negative, got -1"),
        ({"seed": 10**20}, r"must be less than 2\^63, got 100000000000000000000"),
        ({"learning_rate": 0.0}, "learning rate must be positive and finite, got 0"),
        ({"learning_rate": math.nan}, "learning rate must be positive and finite, got nan"),
        ({"learning_rate": math.inf}, "learning rate must be positive and finite, got inf"),
        ({"batch_size": 1}, "more than one image a batch, got batch size 1: use --batch-size 2"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(UserError, match=message):
        CompareConfig(**settings)


def test_batch_size_1_is_fine_without_bn(digits):
    assert compare(CompareConfig(batch_size=1, norms=("none",), steps=2, quick=True), digits).records[0].steps[-1] == 2


def test_unknown_data():
    with pytest.raises(UserError, match="did you mean digits"):
        compare(CompareConfig(data="digit"))


def test_batch_larger_than_the_data(digits):
    with pytest.raises(UserError, match="must not exceed the 1000 training images, got 2000"):
        compare(CompareConfig(batch_size=2000), digits)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_absent_device(digits):
    with pytest.raises(UserError, match="no cuda device"):
        compare(CompareConfig(device="cuda"), digits)
