"""A realistic page, and small ones, for the report's tests."""

from __future__ import annotations

import numpy as np

from bnkit.report import Curve, HeatMap, LinePlot, Page, Panels, Table

_STEPS = np.linspace(0, 50_000, 251)


def accuracy_figure() -> Panels:
    """Two nets' test accuracy over 50,000 steps, with a band over seeds."""
    rng = np.random.default_rng(0)
    with_bn = 0.976 - 0.87 * np.exp(-_STEPS / 900) + rng.normal(0, 0.0015, len(_STEPS))
    without = 0.965 - 0.85 / (1 + np.exp((_STEPS - 9000) / 1800)) + rng.normal(0, 0.002, len(_STEPS))
    curves = [
        Curve("without BN", _STEPS, without, low=without - 0.02, high=without + 0.01, color=0),
        Curve("with BN", _STEPS, with_bn, low=with_bn - 0.004, high=with_bn + 0.004, color=1),
    ]
    plot = LinePlot(
        "Test accuracy, the paper's protocol",
        "training step",
        "test accuracy",
        curves,
        note="Line: mean over 5 seeds; band: lowest and highest.",
        ylim=(0.0, 1.0),
        percent=True,
    )
    return Panels(
        "accuracy",
        "Accuracy over training",
        [plot],
        caption="The paper's Figure 1a. Both nets start from the same weights and see the same batches in the same "
        "order; only the normalization differs. The net without it spends its first 5,000 steps at chance.",
        alt="The net with BN reaches 97% within 5,000 steps, the net without needs about 20,000.",
    )


def activations_figure() -> Panels:
    """Percentiles of a unit's input for two nets, and the drift of all units."""
    rng = np.random.default_rng(1)
    wander = np.cumsum(rng.normal(0, 0.12, len(_STEPS)))

    def percentiles(center: np.ndarray, width: float, color: int) -> list[Curve]:
        return [
            Curve("85%", _STEPS, center + width, color=color, dashed=True),
            Curve("50%", _STEPS, center, color=color),
            Curve("15%", _STEPS, center - width, color=color, dashed=True),
        ]

    plots = [
        LinePlot("Without BN", "training step", "input to the sigmoid", percentiles(wander, 2.2, 0), ylim=(-7.0, 7.0)),
        LinePlot(
            "With BN",
            "training step",
            "input to the sigmoid",
            percentiles(0.25 + 0.05 * wander, 1.1, 1),
            ylim=(-7.0, 7.0),
        ),
        LinePlot(
            "Drift, median over all units",
            "training step",
            "drift in standard deviations",
            [
                Curve("without BN", _STEPS[1:], 0.02 + np.abs(wander[1:]) / 3, color=0),
                Curve("with BN", _STEPS[1:], 0.02 + np.abs(wander[1:]) / 40, color=1),
            ],
            note="How far the median moved from its first value, in units of the first spread.",
            ylog=True,
        ),
    ]
    return Panels(
        "activations",
        "Inputs to the last hidden layer's sigmoids",
        plots,
        caption="The paper's Figures 1b and 1c: the 15th, 50th and 85th percentile for one typical unit, "
        "and the drift of all units, so that the claim does not rest on one.",
        alt="Without BN the percentiles wander by several units; with BN they stay in place.",
    )


def grid_figure() -> Panels:
    """Two heat maps, learning rate by initial scale, with failed runs in one."""
    rates, scales = ["0.03", "0.1", "0.3", "1", "3", "10"], ["0.001", "0.01", "0.03", "0.1", "0.3", "1"]
    rate, scale = np.meshgrid(np.arange(6), np.arange(6))
    without = 0.95 * np.exp(-(((rate - 3.5) / 1.3) ** 2) - ((scale - 3.2) / 1.1) ** 2)
    with_bn = 0.972 * np.exp(-(((rate - 3) / 9) ** 2) - ((scale - 2.5) / 12) ** 2)
    without = np.maximum(without, 0.098)
    without[4:, 5] = np.nan

    def heat(title: str, values: np.ndarray) -> HeatMap:
        row, column = np.unravel_index(np.nanargmax(values), values.shape)
        return HeatMap(
            title,
            "learning rate",
            "initial scale",
            rates,
            scales,
            values.tolist(),
            low=0.1,
            high=1.0,
            best=(int(row), int(column)),
        )

    return Panels(
        "grid",
        "Accuracy in percent after 3,000 steps",
        [heat("Without BN", without), heat("With BN", with_bn)],
        caption="One short run per cell. Without normalization the net needs both settings right at once; with it, "
        "almost any will do.",
        alt="With BN nearly every cell is above 85%; without BN only a few are.",
    )


def speed_table() -> Table:
    """The ten columns of the comparison."""
    columns = [
        "net",
        "best accuracy",
        "final accuracy",
        "steps to 95%",
        "steps to 96%",
        "steps to 97%",
        "steps to 98%",
        "steps to the other's best",
        "seconds to 95%",
        "seconds to the other's best",
    ]
    rows = [
        ["without BN", "96.81 ± 0.12%", "96.70 ± 0.15%", "14,200", "19,800", "never", "never", "never", "3.1", "never"],
        ["with BN", "98.02 ± 0.06%", "97.95 ± 0.08%", "2,100", "2,900", "5,600", "41,000", "4,600", "0.9", "2.0"],
        ["speed-up", "", "", "6.8×", "6.8×", "–", "–", "–", "3.4×", "–"],
    ]
    return Table("Accuracy and speed", columns, rows, note="Mean ± standard deviation over 5 seeds.")


def sample_page(partial: str | None = None) -> Page:
    """Everything a comparison's page holds."""
    tuned = Table(
        "Each net at its own best setting",
        ["net", "learning rate", "initial scale", "best accuracy"],
        [["without BN", "2", "0.1", "97.9%"], ["with BN", "1", "0.03", "98.1%"]],
    )
    return Page(
        title="What batch normalization buys",
        claim="A network with batch normalization reaches the same accuracy in a fraction of the training steps "
        "(Ioffe and Szegedy 2015, section 4.1).",
        summary=[
            "With the paper's settings the net with BN reaches the other's best accuracy (96.8%) in 4,600 steps "
            "instead of 33,000: 7.2 times fewer, and 4.3 times less time.",
            "With both nets tuned the gain shrinks to 1.3 times fewer steps; what BN buys here is above all freedom "
            "from tuning.",
            "Of 36 settings, 34 bring the net with BN above 90% within 3,000 steps, and 5 the net without.",
        ],
        tables=[speed_table(), tuned],
        figures=[accuracy_figure(), activations_figure(), grid_figure()],
        configuration={
            "model": "mlp",
            "data": "digits",
            "norms": ["none", "batch"],
            "hidden": [100, 100, 100],
            "activation": "sigmoid",
            "steps": 50_000,
            "batch_size": 60,
            "lr": 0.5,
            "scale": 0.01,
            "momentum": 0.0,
            "weight_decay": 0.0,
            "seed": 0,
            "seeds": 5,
            "evaluations": 250,
            "grid_rates": [0.03, 0.1, 0.3, 1, 3, 10],
            "grid_scales": [0.001, 0.01, 0.03, 0.1, 0.3, 1],
            "threads": 2,
            "device": "cpu",
            "compile": True,
            "out": "runs/compare-2031-01-01T12-00-00/with-a-long-folder-name-that-has-no-space-to-break-at",
        },
        environment={"processor": "Imaginary CPU @ 2.40GHz", "cores": 2, "gpu": None, "torch": "2.15.0"},
        partial=partial,
        command="uv run bnkit compare --seeds 5 --out runs/compare",
    )
