"""A run does not go on from a checkpoint that is not as it was written."""

from __future__ import annotations

from pathlib import Path

import pytest
from toys import toy_net, toy_set

from bnkit import UserError
from bnkit.train import FitConfig, fit


@pytest.mark.parametrize("part", [0.2, 0.5, 0.8])
def test_a_changed_byte_is_noticed(tmp_path: Path, part: float) -> None:
    config, path = FitConfig(steps=2, eval_every=1, device="cpu"), tmp_path / "c.pt"
    fit(toy_net(), toy_set(), config, checkpoint=path)
    content = bytearray(path.read_bytes())
    content[int(part * len(content))] ^= 0x55
    path.write_bytes(content)
    net = toy_net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(UserError, match=r"c\.pt is damaged, the checksum of .* differs: name another"):
        fit(net, toy_set(), config, resume=path)
    assert all(value.equal(before[name]) for name, value in net.state_dict().items())
