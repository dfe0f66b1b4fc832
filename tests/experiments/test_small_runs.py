"""The trained checks of masked, domain and frozen norms: they run, compare what they say, and repeat."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bnkit.experiments import domains, fine_tuning, padding
from bnkit.experiments._small_runs import accuracy, sentences, train
from bnkit.experiments._trials import Trial
from bnkit.nn import BatchNorm1d, DomainBatchNorm, MaskedBatchNorm

RUNS = {
    "domains": (
        domains.domains,
        domains.DomainsConfig(steps=4, batch_size=8, rates=(0.1,), seeds=1, test_images=50),
        domains,
    ),
    "padding": (
        padding.padding,
        padding.PaddingConfig(steps=4, batch_size=8, rates=(0.1,), seeds=1, test_images=50),
        padding,
    ),
    "fine-tuning": (
        fine_tuning.fine_tuning,
        fine_tuning.FineTuningConfig(first_steps=4, steps=4, rates=(0.01,), seeds=1, test_images=50),
        fine_tuning,
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_it_runs(name):
    function, config, module = RUNS[name]
    result = function(config)
    arms = [trial.arm for trial in result.trials]
    assert arms == list(module.NORMS if name == "domains" else module.ARMS)
    assert all(0 <= trial.accuracy <= 1 and trial.train_loss > 0 for trial in result.trials)
    page = module.page_of(result, "bnkit reproduce")
    assert [row[0] for row in page.tables[0].rows] == arms
    assert page.summary[0].startswith(f"With {arms[0]}: ")
    assert page.claim == module.CLAIM


@pytest.mark.parametrize(
    ("other", "word"), [((0.9, 0.9), "higher"), ((0.1, 0.1), "lower"), ((0.5, 0.52), "no different beyond the noise")]
)
def test_words_follow_the_numbers(other, word):
    runs = [
        Trial(arm, 0.1, i, 1.0, value, 1.0)
        for arm, vs in (("a", (0.5, 0.51)), ("b", other))
        for i, value in enumerate(vs)
    ]
    assert sentences(runs, "a")[0] == "With a: 50.50% ± 0.71% (rate 0.1)."
    assert sentences(runs, "a")[1].endswith(f"(rate 0.1), {word}.")


def test_training_learns_and_accuracy_counts():
    torch.manual_seed(0)
    x = torch.randn(64, 3)
    labels = (x[:, 0] > 0).long()
    model = nn.Linear(3, 2)
    before = accuracy(model, [((x,), 1 - labels)])
    loss, seconds = train(model, iter([((x,), labels)] * 50), 50, 0.5)
    assert loss < 0.2
    assert seconds > 0
    assert accuracy(model, [((x[:20],), labels[:20]), ((x[20:],), labels[20:])]) > 0.95 > before


def test_sequences_end_where_the_ink_ends():
    images = torch.zeros(3, 1, 28, 28, dtype=torch.uint8)
    images[0, 0, 5, 3:9] = 255  # six columns
    images[1, 0, 7, 20:24] = 51
    x, mask = padding._padded(images)  # the third has no ink: one column
    assert x.shape == (3, 28, 6)
    assert mask.sum(1).tolist() == [6, 4, 1]
    assert x[0, 5].tolist() == [1.0] * 6
    torch.testing.assert_close(x[1, 7], torch.tensor([0.2] * 4 + [0.0] * 2))


@pytest.mark.parametrize("masked", [True, False])
def test_only_the_counted_padding_changes_outputs(masked):
    torch.manual_seed(0)
    network = padding.SequenceNetwork(4, masked=masked)
    assert isinstance(network.norms[0], MaskedBatchNorm if masked else BatchNorm1d)
    x, mask = torch.rand(3, 28, 5), torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [True] * 4 + [False]])
    x = x * mask[:, None]
    longer = nn.functional.pad(x, (0, 7)), nn.functional.pad(mask, (0, 7))
    assert torch.allclose(network(x, mask), network(*longer), atol=1e-5) == masked


def test_the_network_uses_the_domain_it_is_told():
    model = domains.InDomain(domains.small_network(domains.NORMS["own statistics"]))
    layer = next(module for module in model.modules() if isinstance(module, DomainBatchNorm))
    model(torch.rand(2, 1, 28, 28), "negatives")
    assert layer.batches_tracked.tolist() == [0, 1]
    assert not domains.InDomain(domains.small_network(domains.NORMS["common statistics"])).distinguishes
    images = torch.tensor([0, 255], dtype=torch.uint8)
    assert [domains._images(images, domain).tolist() for domain in domains.DOMAINS] == [[0.0, 1.0], [1.0, 0.0]]


def test_mirrored_is_mirrored():
    image = torch.zeros(1, 1, 28, 28, dtype=torch.uint8)
    image[0, 0, 0, 0] = 255
    assert fine_tuning._images(image, mirrored=True)[0, 0, 0, 27] == 1
    assert fine_tuning._images(image, mirrored=False)[0, 0, 0, 0] == 1


def test_the_same_seed_gives_the_same_run():
    config = padding.PaddingConfig(steps=3, batch_size=8, rates=(0.1,), seeds=1, test_images=50)
    first, second = (padding.padding(config).trials for _ in range(2))
    assert [(t.train_loss, t.accuracy) for t in first] == [(t.train_loss, t.accuracy) for t in second]
