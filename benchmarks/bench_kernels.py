"""Batch norm, residual and ReLU, forward and backward through autograd: bnkit's kernels against their peers.

Peers: PyTorch's eager operators, `torch.compile` of them, and timm's `BatchNormAct2d`; on a GPU also cuDNN, and apex
and In-Place ABN where they are installed. All take turns in one process, with a copy of one tensor, which tells what
the memory gives. A pass is one read or write of a whole tensor; the limit is 5 passes, 7 with a residual, at the copy's
speed, and on a GPU as many as the kernels' way takes. The C library's allocator is set for a whole process, so each
setting runs in one of its own. Nothing is reported unless the kernels are there and their quick tests pass first.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from _harness import in_fresh_process, quantiles, save_results, take_turns
from _kernel_peers import CUDNN_TYPES
from _kernel_peers import missing as not_installed
from _kernel_problems import Problem, last_level_cache, problems, sides
from rich.console import Console
from rich.progress import track

from bnkit._allocator import tune_allocator
from bnkit._checks import FailedCheck, UserError
from bnkit._environment import installed_version
from bnkit.ops import cpu, cuda
from bnkit.report import Table, print_table

ROOT = Path(__file__).parents[1]
TESTS = {
    "cpu": ["tests/ops/test_cpu.py", "tests/ops/test_cpu_threads.py", "tests/ops/test_cpu_masks.py"],
    "cuda": ["tests/ops/test_cuda.py", "tests/ops/test_cuda_streams.py"],
}
QUICK_TESTS = {
    "cpu": "test_shapes or test_activations or mean_far or by_value or same_bits_as_with_the_residual",
    "cuda": "not interpreted and (test_shapes or test_blocks_of_full_size or test_half_precision or mean_far)",
}
AVAILABLE = {"cpu": cpu.available, "cuda": cuda.available}
REMEDY = {
    "cpu": "install a C compiler, then bnkit again",
    "cuda": "it takes Triton, and an NVIDIA GPU of compute capability 8.0 or later",
}
RESULTS = {"cpu": "kernels", "cuda": "kernels_cuda"}
PEERS = ("eager", "compile", "timm")
PEERS_ON_GPUS = ("cudnn", "apex", "inplace_abn")
MORE_ROUNDS = 4  # times as many where tensors fit in the caches: those times spread most, and take least
ROUND_SECONDS = 0.004

Row = dict[str, Any]


def check_correctness(device: str) -> None:
    """Raise UserError unless the kernels are there, and FailedCheck unless their quick tests pass now."""
    if not AVAILABLE[device]():
        raise UserError(
            f"a speed is reported only of bnkit's own kernels, and there are none for {device} here: {REMEDY[device]}."
        )
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *TESTS[device]]
    command += ["-k", QUICK_TESTS[device]]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        print(done.stdout, file=sys.stderr)
        tests = " ".join(TESTS[device])
        raise FailedCheck(f"a speed is reported only of kernels whose tests pass, and some fail; see pytest {tests}.")


def bars(problem: Problem, allocator: str, device: str) -> dict[str, float]:
    """Least ratio to each peer, and least share of the limit; empty where none is set."""
    return _bars_on_gpus(problem) if device == "cuda" else _bars_on_cpus(problem, allocator)


def _bars_on_gpus(problem: Problem) -> dict[str, float]:
    """In every shape and type, as far as the peer takes it."""
    has_cudnn = problem.channels_last and problem.dtype in CUDNN_TYPES
    return {"limit": 0.9, "compile": 1.0, **({"cudnn": 1.0} if has_cudnn else {})}


def _bars_on_cpus(problem: Problem, allocator: str) -> dict[str, float]:
    """On two AVX-512 cores."""
    mib, is_float32 = problem.bytes / 2**20, problem.dtype is torch.float32
    if problem.shape == (60, 100):
        return {"eager": 1.1, "compile": 1.8} if is_float32 and allocator == "tuned" else {}
    is_large, is_middle = _is_large(problem), 2 <= mib <= 8
    if allocator == "default":
        return {"eager": 4.0, "compile": 8.0} if is_large and is_float32 and not problem.channels_last else {}
    if not is_float32:
        return {"eager": 2.4} if is_large else {}
    if is_large:
        eager = 2.8 if not problem.channels_last else 2.3 if problem.residual else 2.0
        return {"eager": eager, "compile": 10.0, "limit": 0.8 if problem.channels_last else 0.85}
    if is_middle:
        if problem.channels_last:
            return {"eager": 1.3, "compile": 5.0, "limit": 0.6}
        return {"eager": 2.5, "compile": 7.0, "limit": 0.7}
    return {}


def _is_large(problem: Problem) -> bool:
    """Whether a tensor of it does not fit in the processor's caches."""
    return problem.bytes > last_level_cache()


def measure_problem(problem: Problem, allocator: str, rounds: int, device: str) -> list[Row]:
    """A row a side."""
    steps = _that_run(sides(problem, device))
    repeats = _repeats(steps["bnkit"], device)
    if not _is_large(problem):
        rounds *= MORE_ROUNDS
    times = take_turns(steps, rounds, device=device, repeats=repeats)
    copy, passes = quantiles(times["copy"])[1], problem.passes(device)
    shared: Row = {
        "network": problem.name,
        "shape": "x".join(map(str, problem.shape)),
        "dtype": str(problem.dtype).removeprefix("torch."),
        "layout": problem.layout,
        "residual": problem.residual,
        "allocator": allocator,
        "device": device,
        "mib": round(problem.bytes / 2**20, 2),
        "copy_gb_per_s": round(2 * problem.bytes / copy / 1e9, 2),
    }
    rows = []
    for side in ("bnkit", *PEERS, *PEERS_ON_GPUS):
        if side not in times:
            continue
        low, middle, high = quantiles(times[side])
        ratios = [theirs / ours for theirs, ours in zip(times[side], times["bnkit"], strict=True)]
        limits = [passes / 2 * c / t for c, t in zip(times["copy"], times[side], strict=True)]
        rows.append(
            shared
            | {
                "side": side,
                "us_p20": round(1e6 * low, 1),
                "us_p50": round(1e6 * middle, 1),
                "us_p80": round(1e6 * high, 1),
                "bnkit_is_faster_by": round(quantiles(ratios)[1], 3),
                "passes": passes,
                "gb_per_s": round(passes * problem.bytes / middle / 1e9, 2),
                "of_limit": round(quantiles(limits)[1], 3),
                "bar": bars(problem, allocator, device).get("limit" if side == "bnkit" else side),
                "rounds": rounds,
                "repeats": repeats,
                "timm": installed_version("timm"),
            }
        )
    return rows


def _that_run(steps: Mapping[str, Callable[[], object]]) -> dict[str, Callable[[], object]]:
    """Without peers that fail here: `torch.compile` where it finds no compiler, others where they do not take x."""
    kept = dict(steps)
    for peer in [side for side in steps if side not in ("bnkit", "eager", "copy")]:
        try:
            kept[peer]()
        except RuntimeError as error:
            print(f"{peer} is left out: {str(error).splitlines()[0]}", file=sys.stderr)
            del kept[peer]
    return kept


def _repeats(step: Callable[[], object], device: str) -> int:
    """How many steps a round takes, so that the clock's own time does not count."""
    for _ in range(3):
        step()
    _synchronize(device)
    start = time.perf_counter()
    step()
    _synchronize(device)
    return max(1, round(ROUND_SECONDS / (time.perf_counter() - start)))


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure(allocator: str, rounds: int, quick: bool, device: str) -> list[Row]:
    """All problems with one setting of the allocator."""
    if allocator == "tuned":
        tune_allocator()
    chosen = problems(quick, device)
    console = Console(stderr=True)
    rows = []
    for problem in track(chosen, f"{allocator} allocator", console=console):
        rows += measure_problem(problem, allocator, rounds, device)
    return rows


def verdict(rows: Mapping[str, Row]) -> str:
    """Of one problem's rows by side: which bars are missed, and which peers win."""
    missed, has_bar = [], False
    for side, row in rows.items():
        reached = row["of_limit"] if side == "bnkit" else row["bnkit_is_faster_by"]
        name = "limit" if side == "bnkit" else side
        if row["bar"] is not None:
            has_bar = True
            if reached < row["bar"]:
                missed.append(f"{name} {reached:.2f} < {row['bar']:g}")
        elif side != "bnkit" and reached < 1:
            missed.append(f"loses to {name}")
    return "; ".join(missed) or ("met" if has_bar else "no bar")


def tables(rows: Sequence[Row]) -> list[Table]:
    """One for each allocator, type and layout; a line a problem."""
    keys = ("allocator", "dtype", "layout")
    by_problem: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        key = tuple(row[k] for k in (*keys, "network", "shape", "residual"))
        by_problem.setdefault(key, {})[row["side"]] = row
    peers = [*PEERS, *(peer for peer in PEERS_ON_GPUS if any(row["side"] == peer for row in rows))]
    columns = ["shape", "ms (p20 to p80)", "GB/s", "copy", "of limit", *(f"x {peer}" for peer in peers), "bars"]
    found: dict[tuple[Any, ...], list[list[str]]] = {}
    for key, of_side in by_problem.items():
        found.setdefault(key[:3], []).append(_line(of_side, peers))
    return [
        Table(f"Forward and backward: {dtype}, {layout}, {allocator} allocator", columns, lines)
        for (allocator, dtype, layout), lines in found.items()
    ]


def _line(of_side: Mapping[str, Row], peers: Sequence[str]) -> list[str]:
    ours = of_side["bnkit"]
    low, middle, high = (f"{ours[f'us_p{p}'] / 1000:.3g}" for p in (20, 50, 80))
    ratios = [f"{of_side[peer]['bnkit_is_faster_by']:.2f}" if peer in of_side else "-" for peer in peers]
    return [
        f"{ours['shape']}{' + residual' if ours['residual'] else ''}",
        f"{middle} ({low} to {high})",
        f"{ours['gb_per_s']:.1f}",
        f"{ours['copy_gb_per_s']:.1f}",
        f"{ours['of_limit']:.2f}",
        *ratios,
        verdict(of_side),
    ]


def main(rounds: int = 15, quick: bool = False, save: bool = False, device: str | None = None) -> None:
    """Test, measure with both allocators, print the tables, and keep the rows if asked."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    console = Console()
    check_correctness(device)
    console.print("The quick tests of correctness pass.")
    if missing := not_installed(device):
        console.print(f"Not installed, and not measured: {', '.join(missing)}.")
    options = ["--rounds", str(rounds), "--device", device, *(["--quick"] if quick else [])]
    settings = ("tuned", "default") if device == "cpu" else ("default",)
    rows = [row for setting in settings for row in in_fresh_process(__file__, "--measure", setting, *options)]
    for table in tables(rows):
        print_table(table, console)
    console.print(
        f"Median of {rounds} rounds taking turns, {MORE_ROUNDS * rounds} where tensors fit in the caches. 'x eager' is "
        "eager's time over bnkit's. The limit is 5 passes over memory, 7 with a residual, at the speed of a copy "
        "(copy: its GB/s); on a GPU 5 to 8, and 8 to 12, by the way that the kernels take."
    )
    if save:
        console.print(f"Saved {save_results(RESULTS[device], rows)}.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", choices=("default", "tuned"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="a few shapes")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/kernels.csv")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.rounds, arguments.quick, arguments.device or "cpu")))
        sys.exit()
    main(arguments.rounds, arguments.quick, arguments.save, arguments.device)
