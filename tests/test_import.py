"""`import bnkit` loads what all of it needs, and nothing that only parts of it need."""

import subprocess
import sys
from importlib.resources import files

PARTS_NEED = {"jinja2", "lightning_fabric", "matplotlib", "torchvision", "triton", "typer"}


def test_importing_bnkit_is_cheap():
    code = f"import sys, bnkit; print({PARTS_NEED} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"


def test_type_checkers_are_told_of_the_annotations():
    assert (files("bnkit") / "py.typed").is_file()
