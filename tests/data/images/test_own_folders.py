"""Folders of images as people have them: without val, without train, one level off, with other formats."""

import numpy as np
import pytest

from data.checks.verify import verify
from data.images.files import EXCLUSIONS, load_image_files
from data.images.share import load_share
from tests.data.images.test_image_files import touch


def make(root, classes=("cat", "dog", "horse"), count=10, suffix=".jpg"):
    for name in classes:
        for i in range(count):
            touch(root / name / f"{i}{suffix}")
    return root


def parts(root, share=0.2, seed=0):
    return load_share(root, "train", share, seed), load_share(root, "test", share, seed)


@pytest.mark.parametrize("place", [".", "train"])
def test_a_share_of_each_class_is_split_off(tmp_path, place):
    train, val = parts(make(tmp_path / place) and tmp_path)
    assert train.classes == val.classes == ("cat", "dog", "horse")
    assert np.bincount(train.labels).tolist() == [8] * 3
    assert np.bincount(val.labels).tolist() == [2] * 3
    assert not set(train.files) & set(val.files)
    assert sorted([*train.files, *val.files]) == sorted(
        path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.jpg")
    )
    for part in (train, val):
        assert all(part.path(i).is_file() for i in range(len(part)))
        assert [part.classes[label] for label in part.labels] == [f.split("/")[-2] for f in part.files]


def test_the_split_follows_from_its_seed(tmp_path):
    make(tmp_path / "a", count=40)
    make(tmp_path / "b", count=40)
    assert parts(tmp_path / "a")[1].files == parts(tmp_path / "b")[1].files
    assert parts(tmp_path / "a", seed=1)[1].files != parts(tmp_path / "a")[1].files
    before = parts(tmp_path / "a", 0.1)[1].files
    assert set(before) < set(parts(tmp_path / "a", 0.3)[1].files)  # a larger share holds the smaller


def test_excluding_a_file_moves_no_other(tmp_path):
    train, val = parts(make(tmp_path))
    (tmp_path / EXCLUSIONS).write_text(f"{val.files[0]}\tbad\n{train.files[3]}\tbad\n")
    fewer, fewer_val = parts(tmp_path)
    assert fewer_val.files == val.files[1:]
    assert fewer.files == train.files[:3] + train.files[4:]
    kept = load_share(tmp_path, "train", 0.2, 0, keep_excluded=True)
    assert (kept.files, kept.excluded, kept.num_excluded) == (train.files, {3}, 1)


def test_small_classes(tmp_path):
    make(tmp_path, ("one",), 1)
    make(tmp_path, ("two",), 2)
    train, val = parts(tmp_path, 0.9)
    assert np.bincount(train.labels).tolist() == [1, 1]
    assert val.labels.tolist() == [1]
    assert parts(tmp_path, 0.01)[1].labels.tolist() == [1]
    make(tmp_path / "few" / "train", count=1)
    with pytest.raises(ValueError, match="no class has two images"):
        load_share(tmp_path / "few", "test", 0.5, 0)


def test_what_else_lies_in_the_folder_is_no_class(tmp_path):
    make(tmp_path)
    touch(tmp_path / "runs" / "finetune" / "notes.txt")
    touch(tmp_path / ".thumbnails" / "a.jpg")
    touch(tmp_path / "__MACOSX" / "cat" / "._0.jpg")
    touch(tmp_path / "logo.jpg")
    assert parts(tmp_path)[0].classes == ("cat", "dog", "horse")
    assert parts(make(tmp_path / "bottles", ("invalid", "valid")))[0].classes == ("invalid", "valid")
    make(tmp_path / "train")
    (tmp_path / "train" / "zebra").mkdir()
    with pytest.raises(ValueError, match="no images in zebra, which would count as a class"):
        parts(tmp_path)


@pytest.mark.parametrize(
    ("prepare", "given", "expected"),
    [
        (lambda root: make(root / "images"), "", r"one level off: did you mean data\.root=.*/images\?"),
        (
            lambda root: make(root / "images" / "train"),
            "",
            r"one level off: did you mean data\.root=.*/images\?",
        ),
        (lambda root: make(root / "train"), "train", r"one level off: did you mean data\.root=.*/flowers\?"),
        (lambda root: make(root), "cat", r"one class's folder: did you mean data\.root=.*/flowers\?"),
        (lambda root: make(root / "Training"), "", r"has to be named train: mv .*/Training .*/train"),
        (
            lambda root: (make(root / "train"), make(root / "valid")),
            "",
            r"has to be named val: mv .*/valid .*/val",
        ),
        (lambda root: make(root / "val"), "", "has val, but no train"),
        (lambda root: make(root, ("cat",)), "", "of folders with images there is one, cat"),
        (lambda root: root.mkdir(), "", "of folders with images there is none"),
    ],
)
def test_a_folder_one_level_off_is_recognised(tmp_path, prepare, given, expected):
    root = tmp_path / "flowers"
    prepare(root)
    with pytest.raises(FileNotFoundError, match=expected):
        load_share(root / given, "train", 0.2, 0)


def test_the_usual_layout_says_what_was_meant(tmp_path):
    make(tmp_path / "images" / "train")
    for off_by_one in (tmp_path, tmp_path / "images" / "train"):
        with pytest.raises(FileNotFoundError, match=rf"did you mean data\.root={tmp_path / 'images'}\?"):
            load_image_files(off_by_one, "train")
    with pytest.raises(FileNotFoundError, match=r"data\.val_share=0\.2 splits validation images off"):
        load_image_files(tmp_path / "images", "test")


def test_formats_that_are_not_read_are_counted(tmp_path):
    make(tmp_path)
    for name in ("a.gif", "b.GIF", "c.jp2", "notes.txt"):
        touch(tmp_path / "cat" / name)
    train, val = parts(tmp_path)
    assert train.left_out == val.left_out == {".gif": 2, ".jp2": 1}
    assert len(train) + len(val) == 30
    make(tmp_path / "all" / "train", suffix=".heic")
    with pytest.raises(FileNotFoundError, match=r"holds no images.*there are 30 \.heic, which are not read"):
        load_image_files(tmp_path / "all", "train")


def test_folders_without_train_are_verified(tmp_path):
    make(tmp_path)
    found = verify(tmp_path, manifest=None, workers=1, on_progress=lambda done, total: None)
    assert [problem.file for problem in found][:2] == ["cat/0.jpg", "cat/1.jpg"]
    assert {problem.kind for problem in found} == {"empty"}
