from __future__ import annotations

from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnkit._checks import UserError
from bnkit.data._source import Source
from bnkit.data._tree import Arrangement, arrange


def source(*files: str, empty: tuple[str, ...] = ()) -> Source:
    parents = {str(parent) for file in files for parent in PurePosixPath(file).parents} - {"."}
    return Source(Path("root"), tuple(sorted(files)), frozenset(parents | set(empty)), lambda file: b"")


def numbered(prefix: str, count: int) -> list[str]:
    return [f"{prefix}/{i:03}.png" for i in range(count)]


def test_train_and_test_folders_are_taken_as_they_are():
    arrangement = arrange(source("train/b/1.png", "train/a/1.png", "train/a/x/2.png", "test/a/1.png", "test/b/9.png"))
    assert arrangement == Arrangement(
        classes=("a", "b"),
        train=(("train/a/1.png", 0), ("train/a/x/2.png", 0), ("train/b/1.png", 1)),
        test=(("test/a/1.png", 0), ("test/b/9.png", 1)),
    )


def test_val_serves_as_test_unless_there_is_test():
    files = [f"{part}/{name}/1.png" for part in ("train", "val") for name in "ab"]
    assert arrange(source(*files)).test == (("val/a/1.png", 0), ("val/b/1.png", 1))
    with_test = arrange(source(*files, "test/a/1.png", "test/b/1.png"))
    assert with_test.test == (("test/a/1.png", 0), ("test/b/1.png", 1))


def test_a_lone_outer_folder_is_entered():
    inner = ["train/a/1.png", "train/b/1.png", "test/a/1.png", "test/b/1.png"]
    assert arrange(source(*(f"x/y/{file}" for file in inner))).train == (
        ("x/y/train/a/1.png", 0),
        ("x/y/train/b/1.png", 1),
    )


def test_train_alone_is_split():
    arrangement = arrange(source(*numbered("train/a", 5), *numbered("train/b", 5)))
    assert arrangement.classes == ("a", "b")
    assert (len(arrangement.train), len(arrangement.test)) == (8, 2)


def test_train_and_test_may_be_classes_among_others():
    assert arrange(source("train/1.png", "bus/1.png", "plane/1.png")).classes == ("bus", "plane", "train")


@pytest.mark.parametrize("parts", [("train", "valid"), ("Training", "Testing"), ("Train", "Val", "extra")])
def test_a_split_by_other_names_is_not_taken_for_classes(parts: tuple[str, ...]):
    files = [f"{part}/{name}/1.png" for part in parts for name in ("cat", "dog")]
    with pytest.raises(UserError, match=r"hold folders of the same names, such as 'cat', .*: call them train and test"):
        arrange(source(*files))
    # Not so if they differ in their folders, or none is for training.
    assert arrange(source(*files, f"{parts[1]}/cow/1.png")).classes == tuple(sorted(parts))
    assert arrange(source(*(file.lower().replace("train", "m") for file in files))).classes[-1] != "train"


@given(st.lists(st.integers(1, 60), min_size=2, max_size=4))
def test_the_split_gives_a_fifth_of_each_class_to_the_test(counts):
    files = [file for i, count in enumerate(counts) for file in numbered(f"class{i}", count)]
    arrangement = arrange(source(*files))
    assert sorted(file for file, _ in arrangement.train + arrangement.test) == sorted(files)
    for label, count in enumerate(counts):
        test = sum(1 for _, other in arrangement.test if other == label)
        assert test == 0 if count == 1 else test >= 1
        assert count == 1 or test == 1 or abs(test - count / 5) <= 0.5
    for file, label in arrangement.train + arrangement.test:
        assert file.startswith(f"class{label}/")


def test_the_split_is_the_same_everywhere():
    # By the names' SHA-256; written down, so that a change of the rule, and with it of everyone's results, shows.
    arrangement = arrange(source(*numbered("a", 10), *numbered("b", 10)))
    assert [file for file, _ in arrangement.test] == ["a/003.png", "a/004.png", "b/003.png", "b/004.png"]


def test_the_split_depends_on_names_within_the_class_only():
    plain = arrange(source(*numbered("a", 30), *numbered("b", 30))).test
    moved = arrange(source(*numbered("outer/train/a", 30), *numbered("outer/train/b", 30))).test
    assert [(f"outer/train/{file}", label) for file, label in plain] == list(moved)


@pytest.mark.parametrize(
    ("files", "empty", "message"),
    [
        ((), (), r"no images in root: give a folder with one folder of images \(\.jpg .* per class"),
        ((), ("a", "b"), "no images in root: give a folder"),
        (("1.png", "2.png"), (), "no class folders in root: put the images of each class into a folder"),
        (("a/1.png", "a/2.png"), (), "only one class folder, 'a', in root: classification needs two or more"),
        (("x/train/a/1.png",), (), "only one class folder, 'a', in root/x/train"),
        (("a/1.png", "b/1.png"), ("c",), "no images in the class folder root/c: add some or remove the folder"),
        (
            ("train/a/1.png", "train/b/1.png", "test/a/1.png", "test/b/1.png"),
            ("test/c",),
            "no images in the class folder root/test/c",
        ),
        (
            ("train/a/1.png", "train/b/1.png", "train/c/1.png", "test/a/1.png", "test/b/1.png"),
            (),
            r"'c' is only in train/ of root: add it to test/ or remove it",
        ),
        (
            ("train/a/1.png", "train/b/1.png", "val/a/1.png", "val/b/1.png", "val/c/1.png"),
            (),
            r"train/ and val/ must have the same class folders, but 'c' is only in val/ of root: add it to train/",
        ),
    ],
)
def test_trees_without_a_meaning_are_refused(files, empty, message):
    with pytest.raises(UserError, match=message):
        arrange(source(*files, empty=empty))
