"""Which image file is of which class, and which are for testing: decided from paths alone."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from .._checks import UserError, require
from ._source import IMAGE_SUFFIXES, Source

_TEST_FOLDERS = ("test", "val")
_TEST_SHARE = 0.2


@dataclass(frozen=True)
class Arrangement:
    """The image files of a source as training and test examples: (path, label), ordered by label, then path."""

    classes: tuple[str, ...]
    train: tuple[tuple[str, int], ...]
    test: tuple[tuple[str, int], ...]


def arrange(source: Source, *, labels: bool = True) -> Arrangement:
    """Sort the files of `source` into classes and into training and test examples.

    A class is a folder, its images all those below it, its label its place in the sorted names, as in torchvision's
    `ImageFolder`. Folders `train` and `test` (or else `val`) hold one set of class folders each. Without them each
    class gives a fifth of its images to the test: those whose paths within it have the smallest SHA-256, so that the
    choice changes neither from run to run nor from machine to machine, and doesn't follow the order of the names.
    A lone folder around all of this is entered.

    Without `labels`, images that are in no class folders are of one class, for training and for testing alike.

    Raises:
        UserError: there are no images, no class folders, only one, an empty one, or train and test differ in classes,
            or have other names.
    """
    require(
        bool(source.files),
        f"no images in {source.path}: give a folder with one folder of images ({' '.join(IMAGE_SUFFIXES)}) per class.",
    )
    root = _enter(source)
    parts = _subfolders(source, root)
    if not labels and not parts:
        every = _labelled({"images": list(source.files)})
        return Arrangement(("images",), every, every)
    test_folder = next((name for name in _TEST_FOLDERS if name in parts), None)
    if "train" not in parts or test_folder is None:
        _refuse_other_splits(source, root, parts)
        return _split(_class_files(source, root), root)
    train = _class_files(source, f"{root}train/")
    test = _class_files(source, f"{root}{test_folder}/")
    if unmatched := sorted(train.keys() ^ test.keys()):
        present, absent = ("train", test_folder) if unmatched[0] in train else (test_folder, "train")
        raise UserError(
            f"train/ and {test_folder}/ must have the same class folders, but {unmatched[0]!r} is only in {present}/ "
            f"of {source.path}: add it to {absent}/ or remove it."
        )
    return Arrangement(tuple(train), _labelled(train), _labelled(test))


def _refuse_other_splits(source: Source, root: str, parts: list[str]) -> None:
    """Raise where folders such as `train` and `valid`, or `Training` and `Testing`, would be taken for classes."""
    inner = {name: _subfolders(source, f"{root}{name}/") for name in parts}
    training = next((name for name in parts if name.lower().startswith("train")), None)
    if training is None or len(parts) == 1 or len(inner[training]) < 2:
        return
    require(
        any(names != inner[training] for names in inner.values()),
        f"{' and '.join(parts)} in {Path(source.path, root)} hold folders of the same names, such as "
        f"{inner[training][0]!r}, so they don't look like classes: call them train and test (or val).",
    )


def _enter(source: Source) -> str:
    """The prefix of the folder that holds the class folders or train/ and test/: "" or "wrapper/"."""
    root = ""
    while True:
        inner = _subfolders(source, root)
        if len(inner) != 1 or not _subfolders(source, f"{root}{inner[0]}/"):
            return root
        root = f"{root}{inner[0]}/"


def _subfolders(source: Source, prefix: str) -> list[str]:
    inside = (folder.removeprefix(prefix) for folder in source.folders if folder.startswith(prefix))
    return sorted(name for name in inside if name and "/" not in name)


def _class_files(source: Source, prefix: str) -> dict[str, list[str]]:
    """The image files in each class folder under `prefix`; at least two classes, each with an image."""
    where = Path(source.path, prefix)
    classes: dict[str, list[str]] = {name: [] for name in _subfolders(source, prefix)}
    require(bool(classes), f"no class folders in {where}: put the images of each class into a folder of their own.")
    require(
        len(classes) > 1,
        f"only one class folder, {next(iter(classes))!r}, in {where}: classification needs two or more.",
    )
    for file in source.files:
        name, slash, _ = file.removeprefix(prefix).partition("/")
        if slash and file.startswith(prefix):
            classes[name].append(file)
    for name, files in classes.items():
        require(bool(files), f"no images in the class folder {where / name}: add some or remove the folder.")
    return classes


def _split(classes: dict[str, list[str]], root: str) -> Arrangement:
    test = {name: _test_share(files, f"{root}{name}/") for name, files in classes.items()}
    train = {name: sorted(set(files) - set(test[name])) for name, files in classes.items()}
    return Arrangement(tuple(classes), _labelled(train), _labelled(test))


def _test_share(files: list[str], folder: str) -> list[str]:
    """A fifth of the `files` in `folder`, rounded, at least one where two or more are there."""
    count = max(round(_TEST_SHARE * len(files)), 1) if len(files) > 1 else 0
    by_hash = sorted(files, key=lambda file: hashlib.sha256(file.removeprefix(folder).encode()).digest())
    return sorted(by_hash[:count])


def _labelled(classes: dict[str, list[str]]) -> tuple[tuple[str, int], ...]:
    return tuple((file, label) for label, files in enumerate(classes.values()) for file in files)
