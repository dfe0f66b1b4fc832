"""The package's layers: who may import whom, and how. Reads the source, imports nothing of it."""

from __future__ import annotations

import ast
import dataclasses
import graphlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "bnkit"

# A module imports lower ranks, or files of its own folder. The package's own `__init__` stands above all.
RANKS = {
    "_allocator": 0,
    "_checks": 0,
    "_devices": 0,
    "_environment": 0,
    "_files": 0,
    "_modes": 0,
    "_processes": 0,
    "_weights": 0,
    "moments": 0,
    "ops": 1,
    "functional": 2,
    "nn": 3,
    "graph": 4,
    "surgery": 5,
    "population": 5,
    "models": 5,
    "diagnose": 6,
    "data": 6,
    "train": 7,
    "report": 7,
    "experiments": 8,
    "_commands": 9,
    "cli": 10,
    "__main__": 11,
    "__init__": 11,
}

# Extras that an installation may lack: imported where they are used, by anyone. A file `_<extra>_*.py` is written in
# that extra (kernels in Triton, say): it imports it at its top, and is itself imported where it is used.
OPTIONAL = {"onnx", "onnxruntime", "onnxscript", "tensorboard", "timm", "triton", "webdataset"}
# What the low ranks may load with themselves. The rest (plots, terminals, data) costs seconds at import.
LIGHT = {"numpy", "torch"} | set(sys.stdlib_module_names)
HEAVY_FROM_RANK = 6


@dataclasses.dataclass(frozen=True)
class Import:
    """`from <dots><target> import <names>`, or `import <target>` without dots."""

    line: int
    level: int
    target: tuple[str, ...]
    names: tuple[str, ...]
    at_top: bool


def sources(package: Path) -> dict[tuple[str, ...], ast.Module]:
    """Every file's syntax tree, by its dotted path below the package: ("nn", "_batch_norm")."""
    paths = sorted(package.rglob("*.py"))
    return {p.relative_to(package).with_suffix("").parts: ast.parse(p.read_text(encoding="utf-8")) for p in paths}


def imports(tree: ast.Module) -> Iterator[Import]:
    top = set(_run_at_import(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, 0, tuple(alias.name.split(".")), (), node in top)
        elif isinstance(node, ast.ImportFrom):
            target = tuple((node.module or "").split(".")) if node.module else ()
            yield Import(node.lineno, node.level, target, tuple(a.name for a in node.names), node in top)


def _run_at_import(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        only_for_types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        if not only_for_types and not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield child
            yield from _run_at_import(child)


def resolve(importer: tuple[str, ...], found: Import, modules: set[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The files of the package that a relative import names."""
    base = importer[: len(importer) - found.level] + found.target
    files = []
    for name in found.names:
        for candidate in ((*base, name), (*base, name, "__init__"), base, (*base, "__init__")):
            if candidate in modules:
                files.append(candidate)
                break
    return files


def folder(module: tuple[str, ...]) -> tuple[str, ...]:
    return module[:-1]


def rank(module: tuple[str, ...]) -> int:
    return RANKS[module[0]]


def written_in(module: tuple[str, ...]) -> str | None:
    """The extra that a file is written in: "triton" for ("ops", "_triton_tiles")."""
    return next((extra for extra in OPTIONAL if module[-1].startswith(f"_{extra}_")), None)


def problems(package: Path) -> list[str]:
    trees = sources(package)
    found = [f"{'/'.join(m)}.py: {m[0]} has no rank; add it to RANKS and to the design" for m in unknown_units(trees)]
    if found:
        return found
    for module, tree in trees.items():
        for item in imports(tree):
            where = f"{'/'.join(module)}.py:{item.line}"
            check = _problems_of_relative if item.level else _problems_of_absolute
            found += [f"{where}: {problem}" for problem in check(module, item, set(trees))]
        if module[-1] == "__init__":
            found += [f"{'/'.join(module)}.py: {problem}" for problem in _problems_of_init(tree)]
    return found + _cycles(trees)


def unknown_units(trees: dict[tuple[str, ...], ast.Module]) -> list[tuple[str, ...]]:
    return [module for module in trees if module[0] not in RANKS]


def _problems_of_absolute(module: tuple[str, ...], item: Import, _: set[tuple[str, ...]]) -> Iterator[str]:
    name = item.target[0]
    if name == "bnkit":
        yield "imports bnkit by name; use a relative import"
    elif name == written_in(module):
        return
    elif item.at_top and name in OPTIONAL:
        yield f"imports the optional {name} at import time; import it where it is used"
    elif item.at_top and rank(module) < HEAVY_FROM_RANK and name not in LIGHT:
        yield f"imports {name} at import time, too heavy for rank {rank(module)}; import it where it is used"


def _problems_of_relative(module: tuple[str, ...], item: Import, modules: set[tuple[str, ...]]) -> Iterator[str]:
    targets = resolve(module, item, modules)
    if not targets:
        yield f"imports {'.' * item.level}{'.'.join(item.target)}, which is no file of the package"
    for target in targets:
        extra = written_in(target)
        if item.at_top and extra and extra != written_in(module):
            yield f"imports {'/'.join(target)} at import time, and with it {extra}; import it where it is used"
        elif target == ("__init__",):
            yield "imports the package itself; import the file that defines the name"
        elif folder(target) == folder(module) and len(module) > 1:
            continue
        elif target[0] == module[0] and len(module) > 1:
            continue  # a folder within the same folder
        elif rank(target) > rank(module) or (rank(target) == rank(module) and len(module) > 1):
            yield f"rank {rank(module)} imports {'/'.join(target)}, of rank {rank(target)}"
        elif len(target) > 1 and target[-1].startswith("_") and target[-1] != "__init__":
            yield f"imports the private {'/'.join(target)}; import the name from {target[0]}"


def _problems_of_init(tree: ast.Module) -> Iterator[str]:
    exported: list[str] | None = None
    names: list[str] = []
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.level or node.module == "__future__"):
            names += [alias.asname or alias.name for alias in node.names if node.level]
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            exported = ast.literal_eval(node.value)
        elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            yield f"line {node.lineno}: an __init__ only re-exports"
    if sorted(names) != sorted(exported or []):
        yield f"__all__ and the imported names differ by {sorted(set(names) ^ set(exported or []))}"


def _cycles(trees: dict[tuple[str, ...], ast.Module]) -> list[str]:
    modules = set(trees)
    graph = {
        module: {t for item in imports(tree) if item.level and item.at_top for t in resolve(module, item, modules)}
        for module, tree in trees.items()
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return ["import cycle: " + " -> ".join("/".join(module) for module in error.args[1])]
    return []


def test_the_package_keeps_its_layers():
    assert problems(PACKAGE) == []


GOOD = {
    "_checks.py": "import torch",
    "_files.py": "from ._checks import UserError",
    "moments.py": "from ._checks import UserError\ndef f():\n    import timm",
    "ops/__init__.py": "'''Doc.'''\nfrom .reference import f\n__all__ = ['f']",
    "ops/reference.py": "from ..moments import f\nfrom . import _c",
    "ops/_c.py": "",
    "ops/_triton_b.py": "import triton\nfrom ._triton_a import f",
    "ops/_triton_a.py": "import triton.language",
    "ops/cuda.py": "def f():\n    from ._triton_b import f",
    "functional.py": "from . import ops\nfrom .ops import f",
    "report/_svg.py": "import matplotlib",
}

BAD = {
    "an unknown folder": ({"extra/_a.py": ""}, "extra has no rank"),
    "an unknown file": ({"extra.py": ""}, "extra has no rank"),
    "a higher rank": (
        {"moments.py": "from .nn import f", "nn/__init__.py": ""},
        "rank 0 imports nn/__init__, of rank 3",
    ),
    "a higher rank, inside a function": (
        {"ops/reference.py": "def f():\n    from ..functional import g"},
        "rank 1 imports functional, of rank 2",
    ),
    "a neighbour of its rank": ({"surgery/_a.py": "from ..models import b", "models/__init__.py": ""}, "of rank 5"),
    "itself by name": ({"functional.py": "from bnkit.ops import f"}, "imports bnkit by name"),
    "itself by relative name": ({"__init__.py": "", "functional.py": "from . import f"}, "the package itself"),
    "another folder's private file": ({"functional.py": "from .ops._c import f"}, "private ops/_c"),
    "a file that is not there": ({"functional.py": "from .oops import f"}, "no file of the package"),
    "an optional package": ({"report/_svg.py": "import onnx.helper"}, "optional onnx"),
    "an optional package in a try": (
        {"cli.py": "try:\n    import timm\nexcept ImportError:\n    pass"},
        "optional timm",
    ),
    "a file of an optional package": (
        {"ops/cuda.py": "from ._triton_a import f", "ops/_triton_a.py": "import triton"},
        "and with it triton",
    ),
    "another optional package in such a file": ({"ops/_triton_a.py": "import timm"}, "optional timm"),
    "a heavy package in a low rank": ({"nn/_a.py": "from torchvision import ops"}, "too heavy for rank 3"),
    "a cycle": ({"nn/_a.py": "from . import _b", "nn/_b.py": "from ._a import f"}, "import cycle"),
    "code in an __init__": ({"nn/__init__.py": "x = 1"}, "only re-exports"),
    "a name missing in __all__": ({"nn/__init__.py": "from ._a import f", "nn/_a.py": ""}, "differ by ['f']"),
}


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return folder


def test_what_is_allowed(tmp_path):
    assert problems(write(tmp_path, GOOD)) == []


@pytest.mark.parametrize("case", BAD)
def test_what_is_not(case, tmp_path):
    files, message = BAD[case]
    found = problems(write(tmp_path, GOOD | files))
    assert len(found) == 1, found
    assert message in found[0]


def test_names_of_test_files_are_unique():
    """pytest imports a test file by its bare name, so two of one name fail, but only when both are collected."""
    names = sorted(path.name for path in Path(__file__).parent.rglob("*.py"))
    doubled = {name for name in names if names.count(name) > 1} - {"conftest.py"}
    assert not doubled
