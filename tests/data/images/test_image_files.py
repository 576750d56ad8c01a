import numpy as np
import pytest

from data.images.files import DEVKIT, EXCLUSIONS, EXTENSIONS, GROUND_TRUTH, find_images, load_image_files
from data.torchvision_import import import_torchvision


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")


@pytest.fixture
def root(tmp_path):
    for wnid in ("n02", "n01"):
        for i in range(3):
            touch(tmp_path / "train" / wnid / f"{wnid}_{i}.JPEG")
    touch(tmp_path / "train" / "n01" / "notes.txt")
    return tmp_path


def flat(root, *names):
    for name in names or ("ILSVRC2012_val_00000001.JPEG", "ILSVRC2012_val_00000002.JPEG"):
        touch(root / "val" / name)
    return root


def test_class_folders(root):
    files = load_image_files(root, "train")
    assert files.files[:2] == ("train/n01/n01_0.JPEG", "train/n01/n01_1.JPEG")
    assert files.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert files.classes == ("n01", "n02")
    touch(root / "val" / "n02" / "a.JPEG")
    assert load_image_files(root, "test").labels.tolist() == [1]  # numbered as in training


def test_a_thousand_classes(tmp_path):
    for c in range(1000):
        touch(tmp_path / "train" / f"n{c:08}" / "a.JPEG")
    files = load_image_files(tmp_path, "train")
    assert files.num_classes == 1000
    assert np.array_equal(files.labels, np.arange(1000))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("val.txt", "ILSVRC2012_val_00000001.JPEG 1\nILSVRC2012_val_00000002.JPEG 0\n"),
        ("val_labels.txt", "ILSVRC2012_val_00000002.JPEG n01\nILSVRC2012_val_00000001.JPEG n02\n"),
        (
            "LOC_val_solution.csv",
            "ImageId,PredictionString\nILSVRC2012_val_00000001,n02 1 2 3 4 n02 5 6 7 8\n"
            "ILSVRC2012_val_00000002,n01 1 2 3 4\n",
        ),
    ],
)
def test_flat_val_with_a_label_file(root, name, content):
    (flat(root) / name).write_text(content)
    assert load_image_files(root, "test").labels.tolist() == [1, 0]


def test_flat_val_with_the_distributed_devkit(root):
    scipy_io = pytest.importorskip("scipy.io", reason="scipy is not installed")
    kit = flat(root) / DEVKIT
    kit.mkdir(parents=True)
    (kit / GROUND_TRUTH).write_text("7\n3\n")
    synsets = np.array([(3, "n01"), (7, "n02")], dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O")])
    scipy_io.savemat(kit / "meta.mat", {"synsets": synsets})
    assert load_image_files(root, "test").labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("prepare", "expected"),
    [
        (lambda root: None, "no folder"),
        (lambda root: flat(root), "no label file is beside it"),
        (
            lambda root: (flat(root) / "val.txt").write_text("ILSVRC2012_val_00000001.JPEG 0\n"),
            "1 of 2 files have no",
        ),
        (lambda root: (flat(root) / "val.txt").write_text("a b c\n"), "line 1: 'a b c' is not FILE CLASS"),
        (lambda root: (flat(root) / "val.txt").write_text("a.JPEG 9\n"), "class '9', which is none of"),
        (lambda root: touch(root / "val" / "n99" / "a.JPEG"), "classes that training does not have: n99"),
    ],
)
def test_what_is_wrong_is_said(root, prepare, expected):
    prepare(root)
    with pytest.raises((FileNotFoundError, ValueError), match=expected):
        load_image_files(root, "test")


def test_excluded_files_are_left_out_or_named(root):
    (root / EXCLUSIONS).write_text("# bad\ntrain/n01/n01_1.JPEG\tempty\ntrain/elsewhere.JPEG\n")
    files = load_image_files(root, "train")
    assert "train/n01/n01_1.JPEG" not in files.files
    assert (len(files), files.num_excluded, files.excluded) == (5, 1, frozenset())
    files = load_image_files(root, "train", keep_excluded=True)
    assert (len(files), files.num_excluded, files.excluded) == (6, 1, frozenset({1}))


NESTED = (
    "a/z.JPEG",
    "a/sub/a.JPEG",
    "a/sub-b/a.jpg",  # a hyphen and a blank sort before the slash
    "a/sub b/deep/er/b.PNG",
    "a/sub/deep/a.webp",
    "a/folder.jpg/b.bmp",
    "a b/x.tif",
    "a.b/1/x.JPEG",
    "a.b/2/x.JPEG",
    "B/only/nested.ppm",
)


def nested(root):
    for name in NESTED:
        touch(root / "train" / name)
        touch(root / "val" / name)
    touch(root / "train" / "a" / "sub" / "notes.txt")
    touch(root / "elsewhere" / "linked" / "x.JPEG")
    (root / "train" / "a" / "link").symlink_to(root / "elsewhere")
    (root / "train" / "linked class").symlink_to(root / "elsewhere")
    (root / "train" / "a.b" / "file.jpg").symlink_to(root / "elsewhere" / "linked" / "x.JPEG")
    return root


def test_nested_folders_are_torchvisions_image_folder(tmp_path):
    nested(tmp_path)
    ours = load_image_files(tmp_path, "train")
    reference = import_torchvision().datasets.ImageFolder(
        tmp_path / "train", is_valid_file=lambda path: path.lower().endswith(EXTENSIONS)
    )
    assert [(str(tmp_path / f), n) for f, n in zip(ours.files, ours.labels, strict=True)] == reference.samples
    assert list(ours.classes) == reference.classes
    assert len(ours) == len(NESTED) + 3
    tested = load_image_files(tmp_path, "test")
    folders = [path for path in (tmp_path / "val").rglob("*") if path.is_dir()]
    assert [folder for folder, _ in find_images(tmp_path, "val")] == [
        "val",
        *sorted(path.relative_to(tmp_path).as_posix() for path in folders),
    ]
    labels = {file: ours.labels[ours.files.index(file.replace("val", "train", 1))] for file in tested.files}
    assert sorted(labels) == sorted(f"val/{name}" for name in NESTED)
    assert tested.labels.tolist() == list(labels.values())


def test_links_back_to_a_folder_above_are_not_followed(tmp_path):
    """Torchvision follows them until the system refuses, 40 times over."""
    touch(tmp_path / "train" / "a" / "sub" / "x.JPEG")
    touch(tmp_path / "train" / "b" / "y.JPEG")
    for link, target in (
        ("train/a/sub/here", "."),
        ("train/a/sub/above", ".."),
        ("train/a/sub/train", "../.."),
        ("train/a/root", "../.."),
        ("train/a/itself", "itself"),
        ("train/a/itself.jpeg", "itself.jpeg"),  # no folder, hence an image that cannot be read
        ("train/c", "."),
        ("train/b/to a", "../a"),
        ("train/a/to b", "../b"),  # and from there back
    ):
        (tmp_path / link).symlink_to(target)
    assert load_image_files(tmp_path, "train").files == (
        "train/a/itself.jpeg",
        "train/a/sub/x.JPEG",
        "train/a/to b/y.JPEG",
        "train/b/y.JPEG",
        "train/b/to a/itself.jpeg",
        "train/b/to a/sub/x.JPEG",
    )


def test_folders_that_cannot_be_listed_are_not_passed_over(tmp_path):
    with pytest.raises(FileNotFoundError):
        find_images(tmp_path, "lost")
    failures = []
    assert find_images(tmp_path, "lost", failures.append) == []
    assert [failure.filename for failure in failures] == [str(tmp_path / "lost")]


def test_nested_files_are_excluded_by_their_paths(tmp_path):
    nested(tmp_path)
    whole = load_image_files(tmp_path, "train")
    (tmp_path / EXCLUSIONS).write_text("train/a.b/1/x.JPEG\tempty\n")
    files = load_image_files(tmp_path, "train")
    assert set(whole.files) - set(files.files) == {"train/a.b/1/x.JPEG"}
    files = load_image_files(tmp_path, "train", keep_excluded=True)
    assert [files.files[i] for i in files.excluded] == ["train/a.b/1/x.JPEG"]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ("x.JPEG 1\ny.JPEG 0\nz.JPEG 1\n", [0, 1, 1]),  # by name, wherever the file lies
        ("ILSVRC/val/x.JPEG 1\n/y.png 0\nz 1\n", [0, 1, 1]),
        ("val/p/x.JPEG 1\n./y.JPEG 0\nq/r/z.JPEG n02\n", [0, 1, 1]),
        ("p/x.JPEG 1\nq/x.JPEG 0\ny.JPEG 0\nz.JPEG 1\n", [0, 1, 1]),  # one row too many
    ],
)
def test_nested_val_with_a_label_file(root, rows, expected):
    for name in ("y.JPEG", "p/x.JPEG", "q/r/z.JPEG"):
        touch(root / "val" / name)
    (root / "val.txt").write_text(rows)
    files = load_image_files(root, "test")
    assert files.files == ("val/y.JPEG", "val/p/x.JPEG", "val/q/r/z.JPEG")
    assert files.labels.tolist() == expected
    assert files.classes == ("n01", "n02")
    (root / "val.txt").rename(root / "elsewhere.txt")
    with pytest.raises(ValueError, match="training does not have: p, q; if these are not classes"):
        load_image_files(root, "test")
    assert load_image_files(root, "test", root / "elsewhere.txt").labels.tolist() == expected


def test_files_of_one_name_need_labels_by_their_paths(root):
    for name in ("p/x.JPEG", "q/x.JPEG"):
        touch(root / "val" / name)
    for rows in ("x.JPEG 1\n", "r/x.JPEG 1\ns/x.JPEG 0\n"):
        (root / "val.txt").write_text(rows)
        with pytest.raises(ValueError, match=r"does not tell apart p/x\.JPEG, q/x\.JPEG, .* their paths"):
            load_image_files(root, "test")
    (root / "val.txt").write_text("p/x.JPEG 1\n")
    with pytest.raises(ValueError, match=r"1 of 2 files have no label: q/x\.JPEG"):
        load_image_files(root, "test")
    for rows in ("p/x.JPEG 1\nq/x.JPEG 0\n", "val/p/x.JPEG 1\n./q/x 0\n", "/p/x 1\n/q/x 0\n"):
        (root / "val.txt").write_text(rows)
        assert load_image_files(root, "test").labels.tolist() == [1, 0]
    (root / "val.txt").write_text("p/x.JPEG 1\np/x.png 0\n")
    with pytest.raises(ValueError, match=r"p/x\.png is named twice, with two classes"):
        load_image_files(root, "test")


def test_one_file_whose_name_has_several_labels(root):
    touch(root / "val" / "x.JPEG")
    (root / "val.txt").write_text("p/x.JPEG 1\nq/x.JPEG 0\n")
    with pytest.raises(ValueError, match=r"does not tell apart x\.JPEG"):
        load_image_files(root, "test")


def test_class_folders_of_val_need_no_label_file(root):
    touch(root / "val" / "n02" / "deep" / "a.JPEG")
    (root / "val.txt").write_text("a.JPEG 0\n")
    assert load_image_files(root, "test").labels.tolist() == [1]
    touch(root / "val" / "n99" / "a.JPEG")
    with pytest.raises(ValueError, match="classes that training does not have: n99"):
        load_image_files(root, "test")


def test_the_digest_tells_listings_apart(root):
    before = load_image_files(root, "train").digest
    # what checkpoints hold that were saved before nested folders were looked into
    assert before == "c0c9c7815943b7323e629f95f5475c3e0eab67cb8bd650048c1098e155b80ea8"
    assert load_image_files(root, "train").digest == before
    touch(root / "train" / "n02" / "new.JPEG")
    assert load_image_files(root, "train").digest != before
