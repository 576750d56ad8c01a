import numpy as np
import pytest

from data.image_files import DEVKIT, EXCLUSIONS, GROUND_TRUTH, load_image_files


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
        (lambda root: touch(root / "val" / "n99" / "a.JPEG"), "classes that training has not: n99"),
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


def test_the_digest_tells_listings_apart(root):
    before = load_image_files(root, "train").digest
    assert load_image_files(root, "train").digest == before
    touch(root / "train" / "n02" / "new.JPEG")
    assert load_image_files(root, "train").digest != before
