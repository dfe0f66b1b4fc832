from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest

from bnkit._checks import UserError
from bnkit.data._source import IMAGE_SUFFIXES, open_directory, open_zip

KEPT = ("a/1.png", "a/b/2.JPEG", "c/3.webp")
LEFT_OUT = ("a/readme.txt", ".git/4.png", "c/.5.png", "__MACOSX/a/._1.png")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    for file in (*KEPT, *LEFT_OUT):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(file)
    (root / "empty").mkdir()
    return root


@pytest.fixture(params=[True, False], ids=["folders-listed", "folders-implied"])
def archive(request: pytest.FixtureRequest, tree: Path, tmp_path: Path) -> Path:
    path = tmp_path / "tree.zip"
    with zipfile.ZipFile(path, "w") as target:
        for inner in tree.rglob("*"):
            if inner.is_file() or request.param:
                target.write(inner, inner.relative_to(tree))
    return path


def test_a_folder_lists_images_and_folders(tree: Path):
    source = open_directory(tree)
    assert source.files == KEPT
    assert source.folders == {"a", "a/b", "c", "empty"}
    assert source.read("a/b/2.JPEG") == b"a/b/2.JPEG"


def test_a_zip_lists_the_same(archive: Path):
    source = open_zip(archive)
    assert source.files == KEPT
    assert source.folders - {"empty"} == {"a", "a/b", "c"}
    assert source.read("c/3.webp") == b"c/3.webp"


def test_an_empty_folder_in_a_zip_is_seen_where_listed(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as target:
        target.mkdir("empty")
    assert open_zip(tmp_path / "a.zip").folders == {"empty"}


def test_links_are_followed(tree: Path, tmp_path: Path):
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "class").symlink_to(tree / "a")
    assert open_directory(tmp_path / "linked").files == ("class/1.png", "class/b/2.JPEG")


def test_a_folder_that_can_not_be_read_is_not_taken_for_an_empty_one(tree: Path, monkeypatch: pytest.MonkeyPatch):
    folder, scandir = tree / "a" / "b", os.scandir

    def denied(path: str):
        if Path(path) in (folder, tree / ".git"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(UserError, match=rf"can't read the folder .*{folder.name} \(Permission denied\): allow it"):
        open_directory(tree)


def test_what_is_no_zip_is_refused(tmp_path: Path):
    (tmp_path / "a.zip").write_text("text")
    with pytest.raises(UserError, match=r"can't read .*a\.zip \(File is not a zip file\): give a zip archive"):
        open_zip(tmp_path / "a.zip")


def test_suffixes_are_torchvisions():
    from torchvision.datasets.folder import IMG_EXTENSIONS

    assert IMAGE_SUFFIXES == IMG_EXTENSIONS
