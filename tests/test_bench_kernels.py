"""`bnkit bench kernels`: what it counts, which bar it holds a problem to, and what it refuses. Nothing is timed."""

from __future__ import annotations

import importlib
import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bnkit import UserError

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("bench_kernels")


def problem_of(bench, shape, **options):
    return bench.Problem("some layer", shape, **options)


def test_bytes_and_passes(bench):
    assert problem_of(bench, (2, 3, 4, 5)).bytes == 2 * 3 * 4 * 5 * 4
    assert problem_of(bench, (2, 3, 4, 5), dtype=torch.bfloat16).bytes == 2 * 3 * 4 * 5 * 2
    assert problem_of(bench, (2, 3)).passes("cpu") == 5
    assert problem_of(bench, (2, 3), residual=True).passes("cpu") == 7


def test_passes_of_the_way_that_the_kernels_take_on_a_gpu(bench):
    pytest.importorskip("triton", reason="Triton is not installed")
    assert problem_of(bench, (60, 100)).passes("cuda") == 5
    assert problem_of(bench, (60, 100), residual=True).passes("cuda") == 8
    assert problem_of(bench, (32, 256, 32, 32)).passes("cuda") == 7  # x alone fits in registers, x and dy do not
    assert problem_of(bench, LARGE).passes("cuda") == 8
    assert problem_of(bench, LARGE, residual=True, channels_last=True).passes("cuda") == 12


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_each_type_is_measured(bench, device):
    half = {torch.float16} if device == "cuda" else set()
    assert {problem.dtype for problem in bench.problems(True, device)} == {torch.float32, torch.bfloat16} | half


LARGE, MIDDLE = (32, 256, 56, 56), (8, 64, 56, 56)


@pytest.mark.parametrize(
    ("shape", "options", "allocator", "expected"),
    [
        (LARGE, {}, "tuned", {"eager": 2.8, "compile": 10.0, "limit": 0.85}),
        (LARGE, {"channels_last": True}, "tuned", {"eager": 2.0, "compile": 10.0, "limit": 0.8}),
        (LARGE, {"channels_last": True, "residual": True}, "tuned", {"eager": 2.3, "compile": 10.0, "limit": 0.8}),
        (MIDDLE, {}, "tuned", {"eager": 2.5, "compile": 7.0, "limit": 0.7}),
        (MIDDLE, {"channels_last": True}, "tuned", {"eager": 1.3, "compile": 5.0, "limit": 0.6}),
        (LARGE, {"dtype": torch.bfloat16}, "tuned", {"eager": 2.4}),
        (LARGE, {}, "default", {"eager": 4.0, "compile": 8.0}),
        (LARGE, {"channels_last": True}, "default", {}),
        ((60, 100), {}, "tuned", {"eager": 1.1, "compile": 1.8}),
        ((60, 100), {}, "default", {}),
    ],
)
def test_bars(bench, monkeypatch, shape, options, allocator, expected):
    monkeypatch.setattr(bench, "last_level_cache", lambda: 32 << 20)
    assert bench.bars(problem_of(bench, shape, **options), allocator, "cpu") == expected


@pytest.mark.parametrize("shape", [LARGE, MIDDLE, (60, 100)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bars_on_gpus(bench, shape, dtype):
    problem = problem_of(bench, shape, dtype=dtype)
    assert bench.bars(problem, "default", "cuda") == {"limit": 0.9, "compile": 1.0}
    problem = problem_of(bench, shape, dtype=dtype, channels_last=True)
    cudnn = {} if dtype is torch.bfloat16 else {"cudnn": 1.0}
    assert bench.bars(problem, "default", "cuda") == {"limit": 0.9, "compile": 1.0, **cudnn}


def test_peers_that_are_not_installed(bench, monkeypatch):
    peers = importlib.import_module("_kernel_peers")
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert peers.missing("cpu") == ["timm"]
    assert peers.missing("cuda") == ["timm", "apex", "inplace_abn"]
    problem = problem_of(bench, MIDDLE, dtype=torch.float16, channels_last=True)
    assert {name for name, make in peers.OTHERS.items() if make(problem, "cuda") is not None} == {"cudnn"}
    assert not any(make(problem, "cpu") for make in peers.OTHERS.values())


def test_peers_that_fail_are_left_out(bench, capsys):
    def refuse():
        raise RuntimeError("no such type\nat length")

    steps = {"bnkit": int, "eager": int, "cudnn": refuse, "timm": int, "copy": int}
    assert list(bench._that_run(steps)) == ["bnkit", "eager", "timm", "copy"]
    assert capsys.readouterr().err == "cudnn is left out: no such type\n"


def row(reached: float, bar: float | None) -> dict:
    return {"of_limit": reached, "bnkit_is_faster_by": reached, "bar": bar}


def test_verdicts(bench):
    assert bench.verdict({"bnkit": row(0.9, 0.85), "eager": row(3.0, 2.8)}) == "met"
    assert bench.verdict({"bnkit": row(0.8, 0.85), "eager": row(3.0, 2.8)}) == "limit 0.80 < 0.85"
    assert bench.verdict({"bnkit": row(0.9, 0.85), "eager": row(2.0, 2.8), "timm": row(0.9, None)}) == (
        "eager 2.00 < 2.8; loses to timm"
    )
    assert bench.verdict({"bnkit": row(0.1, None), "eager": row(1.5, None)}) == "no bar"


@pytest.mark.parametrize(("shape", "residual"), [((6, 4, 5, 5), False), ((6, 4, 5, 5), True), ((6, 4), False)])
def test_sides_compute_the_same(bench, monkeypatch, shape, residual):
    """All but the compiled one, which takes its time."""
    problems = importlib.import_module("_kernel_problems")
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    steps = problems.sides(problem_of(bench, shape, residual=residual), "cpu")
    assert ("timm" in steps) == (len(shape) == 4 and not residual)
    steps.pop("copy")()
    expected = steps.pop("eager")()
    for name, step in steps.items():
        for ours, theirs in zip(step(), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_each_case_follows_all_others_and_itself(bench):
    """Or one would find the caches as it left them, and another never."""
    calls = []
    cases = {name: lambda name=name: calls.append(name) for name in ("bnkit", "eager", "compile", "copy")}
    times = bench.take_turns(cases, 60, warm_up=2)
    assert all(len(seconds) == 60 for seconds in times.values())
    rounds = [calls[i : i + 4] for i in range(0, len(calls), 4)]
    assert all(set(order) == set(cases) for order in rounds)
    assert all(second == first[::-1] for first, second in zip(rounds[::2], rounds[1::2], strict=True))
    assert set(itertools.pairwise(calls)) == set(itertools.product(cases, repeat=2))


def test_rows_become_a_line_with_the_losers(bench, monkeypatch):
    def fixed_times(steps, rounds, **_):
        seconds = {"bnkit": 2e-3, "eager": 1e-3, "timm": 8e-3, "copy": 1e-3}
        return {name: [seconds[name]] * rounds for name in steps}

    steps = {name: lambda: None for name in ("bnkit", "eager", "timm", "copy")}
    monkeypatch.setattr(bench, "_that_run", lambda steps: steps)
    monkeypatch.setattr(bench, "sides", lambda problem, device: steps)
    monkeypatch.setattr(bench, "take_turns", fixed_times)
    rows = bench.measure_problem(problem_of(bench, (10, 5, 2, 2)), "tuned", 3, "cpu")
    assert [r["side"] for r in rows] == ["bnkit", "eager", "timm"]
    assert [r["bnkit_is_faster_by"] for r in rows] == [1.0, 0.5, 4.0]
    assert rows[0]["of_limit"] == pytest.approx(5 / 2 * 1e-3 / 2e-3)
    (table,) = bench.tables(rows)
    assert table.rows[0][-1] == "loses to eager"
    assert table.rows[0][5:8] == ["0.50", "-", "4.00"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_no_kernels_allow_no_report(bench, monkeypatch, device):
    """Their tests would be skipped, and plain PyTorch be timed under their name."""
    monkeypatch.setitem(bench.AVAILABLE, device, lambda: False)
    monkeypatch.setattr(bench.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=0, stdout="1 skipped"))
    with pytest.raises(UserError, match=rf"only of bnkit's own kernels, and there are none for {device} here: "):
        bench.check_correctness(device)


def test_red_tests_allow_no_report(bench, monkeypatch, capsys):
    monkeypatch.setitem(bench.AVAILABLE, "cpu", lambda: True)
    monkeypatch.setattr(bench.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1, stdout="1 failed"))
    measured = []
    monkeypatch.setattr(bench, "in_fresh_process", lambda *_: measured.append(1))
    with pytest.raises(UserError, match="a speed is reported only of kernels whose tests pass"):
        bench.main(device="cpu")
    assert not measured
    assert "1 failed" in capsys.readouterr().err


def test_the_quick_tests_exist(bench):
    for file in itertools.chain(*bench.TESTS.values()):
        assert (BENCHMARKS.parent / file).exists()
    sources = "".join((BENCHMARKS.parent / file).read_text() for file in bench.TESTS["cpu"])
    for words in bench.QUICK_TESTS["cpu"].split(" or "):
        assert words in sources
