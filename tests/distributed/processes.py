"""Real processes, one a rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

WORKER = Path(__file__).with_name("worker.py")


def run_checks(
    checks: Sequence[str],
    world: int,
    folder: Path,
    *,
    init_method: str | None = None,
    prefixes: Sequence[Sequence[str]] | None = None,
    environment: dict[str, str] | None = None,
    dead: Sequence[int] = (),
) -> None:
    """Run checks of `worker.py`, one after the other, on `world` processes, and raise what failed on any of them.

    `prefixes` are the commands that start each process, `dead` the ranks that are not to reach the end.
    """
    init_method = init_method or f"file://{folder}/init"
    files = [folder / f"rank{rank}.json" for rank in range(world)]
    processes = [
        subprocess.Popen(
            [
                *(prefixes[rank] if prefixes else ()),
                *(sys.executable, WORKER, ",".join(checks), init_method, str(rank), str(world), files[rank]),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {}),
        )
        for rank in range(world)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, file in enumerate(files):
        assert file.exists() == (rank not in dead), (
            f"rank {rank} ended with {processes[rank].returncode}:\n{outputs[rank]}"
        )
        if file.exists():
            for check, text in json.loads(file.read_text()).items():
                raise AssertionError(f"{check} failed on rank {rank}:\n{text}")
