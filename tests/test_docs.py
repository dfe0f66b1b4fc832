"""The documentation is true: its Python runs, its command lines exist, its links lead somewhere."""

import pkgutil
import re
import shlex
from pathlib import Path

import pytest
import torch
import typer.main

from bnkit.cli import app

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
WITH_PYTHON = [page for page in PAGES if "```python\n" in page.read_text(encoding="utf-8")]

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE_CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
PUBLIC_NAME = re.compile(r"(?<![\w.])bnkit(?:\.[A-Za-z]\w*)+")


def blocks(page, *languages):
    """(line before the first, code) of each fenced block in one of `languages`."""
    text = page.read_text(encoding="utf-8")
    found = [match for match in FENCE.finditer(text) if match[1] in languages]
    return [(text.count("\n", 0, match.start(2)), match[2]) for match in found]


def prose(page):
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def shell_lines(page):
    """What the reader is told to type: lines of shell blocks, those after `$` of consoles, code within sentences."""
    for _, code in blocks(page, "sh"):
        yield from code.splitlines()
    for _, code in blocks(page, "console"):
        yield from (line[2:] for line in code.splitlines() if line.startswith("$ "))
    yield from INLINE_CODE.findall(prose(page))


def bnkit_calls(line):
    """The arguments of each call of the command `bnkit` in a line of shell."""
    for part in re.split(r"&&|\||;", line.split(" #")[0]):
        words = shlex.split(part) if part.count("'") % 2 == 0 and part.count('"') % 2 == 0 else []
        if words[:2] == ["uv", "run"]:
            words = words[2:]
        if words[:1] == ["bnkit"]:
            yield words[1:]


def subcommands(command):
    return getattr(command, "commands", {})


def complaint(arguments):
    """What is wrong with a call: a command or an option that does not exist; None if nothing."""
    command, words = typer.main.get_command(app), list(arguments)
    while words and subcommands(command) and not words[0].startswith("-"):
        if words[0] not in subcommands(command):
            return f"no command {words[0]!r}"
        command = subcommands(command)[words.pop(0)]
    known = {"--help"}.union(*([*parameter.opts, *parameter.secondary_opts] for parameter in command.params))
    unknown = [word for word in words if word.startswith("-") and word.split("=")[0] not in known]
    return f"no option {', '.join(unknown)}" if unknown else None


def anchors(page):
    """The fragments that GitHub makes of a page's headings, and the page's own."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r'<a id="([^"]+)">', prose(page)))


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.name)
def test_python_runs(page, tmp_path, monkeypatch):
    """All blocks of a page in order, in one namespace; a traceback has the page's own line numbers."""
    monkeypatch.chdir(tmp_path)
    assert torch.get_num_threads() == 1  # conftest.py sets it
    found = blocks(page, "python")
    assert len(found) == page.read_text(encoding="utf-8").count("```python")
    namespace = {"__name__": "example"}
    for line, code in found:
        exec(compile("\n" * line + code, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_command_lines_exist(page):
    calls = [arguments for line in shell_lines(page) for arguments in bnkit_calls(line)]
    wrong = [f"bnkit {shlex.join(arguments)}: {complaint(arguments)}" for arguments in calls if complaint(arguments)]
    assert not wrong


def test_complaints():
    """The check above can fail."""
    assert list(bnkit_calls("pip install uv && uv run bnkit compare --quick  # short")) == [["compare", "--quick"]]
    assert complaint(["compare", "--steps", "5", "--lr=0.1"]) is None
    assert complaint(["bench", "compare", "--rounds", "3"]) is None
    assert complaint(["bench", "fold", "--no-compiled"]) is None
    assert complaint(["compair"]) == "no command 'compair'"
    assert complaint(["compare", "--step", "5"]) == "no option --step"


def test_compare_page_names_every_option_and_no_other():
    command = subcommands(typer.main.get_command(app))["compare"]
    options = {name for parameter in command.params for name in parameter.opts}
    tables = re.findall(r"^\| `(--[\w-]+)` \|", prose(ROOT / "docs" / "compare.md"), re.MULTILINE)
    assert sorted(tables) == sorted(options - {"--help"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_within_sentences_exist(page):
    for code in INLINE_CODE.findall(prose(page)):
        for name in PUBLIC_NAME.findall(code):
            pkgutil.resolve_name(name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in LINK.findall(prose(page)):
        if "://" in target:
            continue
        path, _, fragment = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), target
        if fragment and other.suffix == ".md":
            assert fragment in anchors(other), target
