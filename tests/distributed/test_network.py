"""Two network namespaces with a cable between them: as far as TCP can tell, two hosts."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest
import torch.distributed as dist

if not dist.is_available():
    pytest.skip("this build of PyTorch has no torch.distributed", allow_module_level=True)

from processes import run_checks

PORT = 29477


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[list[tuple[str, str]]]:
    """(name, address) of each."""
    if shutil.which("ip") is None:
        pytest.skip("the ip command (iproute2) is not installed")
    names = [f"bnkit{os.getpid()}-{i}" for i in range(2)]
    addresses = ["10.237.0.1", "10.237.0.2"]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("-n", names[0], "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", names[1])
            for name, address in zip(names, addresses, strict=True):
                ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
                ip("-n", name, "link", "set", "cable", "up")
                ip("-n", name, "link", "set", "lo", "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"this machine permits no network namespaces: {error.stderr.decode().strip()}")
        yield list(zip(names, addresses, strict=True))
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def test_two_hosts(hosts, tmp_path):
    """The store on the first, one rank on each; gloo has no other way between them than the cable."""
    run_checks(
        ["ddp_vectors_down_to_one_on_each_rank", "skipped_forward"],
        2,
        tmp_path,
        init_method=f"tcp://{hosts[0][1]}:{PORT}",
        prefixes=[["ip", "netns", "exec", name] for name, _ in hosts],
        environment={"GLOO_SOCKET_IFNAME": "cable"},
    )
