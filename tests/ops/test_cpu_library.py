"""Which library of C kernels is taken, and which is not."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from _cases import needs_kernels

from bnkit import UserError
from bnkit.ops import _cpu_library, cpu

STALE = 'const char *bnkit_interface(void) { return "0 3q"; }'
OLDER = "int bnkit_batch_norm_forward(const void *packed) { return packed != 0; }"


@pytest.fixture(autouse=True)
def _loaded_anew():
    _cpu_library.library.cache_clear()
    yield
    _cpu_library.library.cache_clear()


@pytest.fixture(params=[STALE, OLDER], ids=["other arguments", "from before there was a check"])
def stale(request, tmp_path):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    source, built = tmp_path / "stale.c", tmp_path / "_bnkit_cpu.so"
    source.write_text(request.param)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", built, source], check=True)
    return built


def test_a_stale_library_is_left_out(stale, monkeypatch):
    monkeypatch.delenv("BNKIT_CPU_LIBRARY", raising=False)
    monkeypatch.setattr(_cpu_library, "_installed", lambda: [stale])
    with pytest.warns(UserWarning, match="left out, .*built from other sources: install bnkit again"):
        assert not cpu.available()
    assert cpu.instruction_set() is None


@needs_kernels
def test_the_next_one_is_taken(stale, monkeypatch):
    """An editable install looks into two folders."""
    monkeypatch.delenv("BNKIT_CPU_LIBRARY", raising=False)
    (good,) = [path for path in _cpu_library._installed() if path.exists()]
    monkeypatch.setattr(_cpu_library, "_installed", lambda: [stale, good])
    with pytest.warns(UserWarning, match="built from other sources"):
        assert cpu.available()


def test_no_library_is_no_warning(monkeypatch, tmp_path):
    """Without a compiler at installation."""
    monkeypatch.delenv("BNKIT_CPU_LIBRARY", raising=False)
    monkeypatch.setattr(_cpu_library, "_installed", lambda: [tmp_path / "_bnkit_cpu.so"])
    assert not cpu.available()


def test_a_stale_library_that_was_asked_for(stale, monkeypatch):
    monkeypatch.setenv("BNKIT_CPU_LIBRARY", str(stale))
    with pytest.raises(UserError, match=r"must name a library of this bnkit, got .*: unset it"):
        cpu.available()


def test_a_missing_library_that_was_asked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("BNKIT_CPU_LIBRARY", str(tmp_path / "none.so"))
    with pytest.raises(UserError, match=r"must name a library of this bnkit, got .*none\.so"):
        cpu.available()
