import hashlib
import io
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import types
from collections import Counter
from itertools import pairwise, product

import numpy as np
import pytest
from PIL import Image, ImageFile

from data.checks import verify as module
from data.checks.damage import FORMATS, diagnose
from data.checks.verify import (
    Problem,
    make_manifest,
    read_manifest,
    verify,
    write_exclusions,
    write_manifest,
)
from data.images.files import EXTENSIONS, load_image_files, read_exclusions

SOS = b"\xff\xda"
EXAMINE = module._examine


def picture(seed, width=0, height=0):
    """Smooth patches of colour with a little noise, of odd sizes where none is given."""
    random = np.random.default_rng(seed)
    width, height = width or int(random.integers(70, 200)), height or int(random.integers(70, 200))
    patches = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    smooth = np.asarray(patches.resize((width, height), Image.Resampling.BICUBIC))
    return Image.fromarray(np.clip(smooth + random.normal(0, 5, smooth.shape), 0, 255).astype(np.uint8))


def on_white(seed):
    """A small picture on a large white ground, which optimised codes write as hundreds of zero bytes."""
    white = Image.new("RGB", (700, 500), "white")
    white.paste(picture(seed, 100, 80), (300, 200))
    return white


def encode(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, **{"format": "JPEG", "quality": 90, **options})
    return buffer.getvalue()


def exif_with_thumbnail():
    """EXIF data with a JPEG inside, end-of-image marker and all."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return b"Exif\0\0" + exif.tobytes() + encode(picture(0, 32, 32))


def good_images():
    """File name -> content, all of which decode."""
    images = {
        "plain.JPEG": encode(picture(1)),
        "odd.jpg": encode(picture(2, 97, 61)),
        "one.JPEG": encode(picture(3, 1, 1)),
        "progressive.JPEG": encode(picture(4), progressive=True),
        "grey.JPEG": encode(picture(5).convert("L")),
        "optimised.JPEG": encode(picture(6), optimize=True, quality=98),
        "restarts.JPEG": encode(picture(7), restart_marker_blocks=3),
        "full-colour.JPEG": encode(picture(8), subsampling=0),
        "exif.JPEG": encode(picture(9), exif=exif_with_thumbnail()),
        "white.JPEG": encode(on_white(10), optimize=True),
        "white-full.JPEG": encode(on_white(11), optimize=True, subsampling=0),
        "white-grey.JPEG": encode(on_white(12).convert("L"), optimize=True),
        "white-restarts.JPEG": encode(on_white(13), optimize=True, restart_marker_blocks=500),
        "white-progressive.JPEG": encode(Image.new("RGB", (3000, 2000), "white"), progressive=True),
        "padded.JPEG": encode(picture(14)) + bytes(5000),
        "two.JPEG": encode(picture(15)) + encode(picture(16)),
        "a.png": encode(picture(17), format="PNG"),
        "b.bmp": encode(picture(18), format="BMP"),
        "c.webp": encode(picture(19), format="WEBP"),
        "d.tif": encode(picture(20), format="TIFF"),
        "e.ppm": encode(picture(21), format="PPM"),
    }
    zeros = [name for name, content in images.items() if bytes(64) in content[content.find(SOS) :]]
    assert {"white.JPEG", "white-grey.JPEG", "white-full.JPEG", "white-restarts.JPEG"} <= set(zeros)
    return images


def truncated(content, random):
    return content[: int(random.integers(1, len(content)))]


def zeroed(content, random):
    """A block of 64 bytes or more within the image data becomes zeros."""
    begin = content.index(SOS) + 14
    size = int(random.integers(64, 1 + min(1024, len(content) - begin)))
    at = int(random.integers(begin, len(content) - size + 1))
    return content[:at] + bytes(size) + content[at + size :]


def garbage(content, random):
    """Noise, in half of the cases after the header of the JPEG."""
    kept = content.index(SOS) + 14 if random.random() < 0.5 else 0
    return content[:kept] + random.bytes(len(content) - kept)


def one_bit_flipped(content, random):
    at, bit = int(random.integers(len(content))), int(random.integers(8))
    return content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]


def write_tree(root, files):
    for file, content in files.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(content)
    return root


@pytest.fixture
def tree(tmp_path):
    """Two classes of three training images each, three flat validation images."""
    files = {f"train/n0{c}/{i}.JPEG": encode(picture(3 * c + i)) for c in range(2) for i in range(3)}
    files |= {f"val/{i}.JPEG": encode(picture(6 + i)) for i in range(3)}
    return write_tree(tmp_path / "tree", files)


def quiet(done, total):
    pass


def run(root, manifest=None, workers=2, on_progress=quiet):
    return verify(root, manifest=manifest, workers=workers, on_progress=on_progress)


def test_four_hundred_damaged_files_are_found(tmp_path):
    """With a manifest all of them; without one all but 77 of the 100 single flipped bits."""
    random = np.random.default_rng(0)
    good = {f"val/{name}": content for name, content in good_images().items()}
    options = [{}, {"optimize": True}, {"subsampling": 0}, {"restart_marker_blocks": 5}]
    originals, files = {}, {}
    for damage in (truncated, zeroed, garbage, one_bit_flipped):
        for i in range(100):
            file = f"train/{damage.__name__}/{i}.JPEG"
            originals[file] = encode(picture(1000 + len(originals)), **options[i % 4])
            files[file] = damage(originals[file], random)
    manifest = {file: hashlib.sha256(data).hexdigest() for file, data in (good | originals).items()}
    root = write_tree(tmp_path, good | files)

    with_manifest = run(root, manifest)
    assert {problem.file for problem in with_manifest if problem.bad} == files.keys()
    assert len(with_manifest) == 400

    without = run(root)
    assert {problem.file for problem in without} <= files.keys()
    found = Counter(problem.file.split("/")[1] for problem in without if problem.bad)
    assert (found["truncated"], found["garbage"], found["zeroed"]) == (100, 100, 100)
    assert found["one_bit_flipped"] >= 23
    kinds = Counter(problem.kind for problem in without if problem.file.startswith("train/truncated"))
    assert kinds["truncated"] >= 95  # of the rest, not even two bytes are left


@pytest.mark.parametrize(
    "name", ["plain.JPEG", "progressive.JPEG", "exif.JPEG", "grey.JPEG", "a.png", "c.webp"]
)
def test_truncation_is_found_at_any_byte(name):
    content = good_images()[name]
    lengths = [*range(1, 700, 7), *range(700, len(content), 997), *range(len(content) - 20, len(content))]
    for length in lengths:
        finding = diagnose(content[:length], name)
        assert finding is not None, length
        assert finding[0] in ("truncated", "garbage"), length


def test_zeros_up_to_the_end_are_named():
    content = encode(picture(1))
    kind, detail = diagnose(content[:-500] + bytes(500), "a.JPEG")
    assert (kind, detail) == (
        "truncated",
        f"it ends after {len(content)} bytes, the last 500 of them zero, without an end-of-image marker",
    )


def with_zeros(content, at):
    return content[:at] + bytes(64) + content[at + 64 :]


def test_zeros_on_a_white_ground_are_told_from_damage():
    """Both hold long runs of zeros, but only one has as many blocks as its picture: 316 of 335 are
    found. The codes of the zeros may stand for as many blocks as those that they replace."""
    num_damaged = num_found = 0
    for seed in range(8):
        content = encode(on_white(seed), optimize=True, subsampling=seed % 3)
        assert diagnose(content, "a.JPEG") is None
        begin = content.index(SOS) + 14
        for at in range(begin, len(content) - 64, 97):
            if (damaged := with_zeros(content, at)) != content:
                num_damaged += 1
                num_found += diagnose(damaged, "a.JPEG") is not None
    assert num_damaged == 335
    assert num_found >= 316


def test_zeros_are_found_in_progressive_scans():
    """300 of 316, wherever a scan begins to describe coefficients; one that refines them bit by bit hides
    zeros."""
    num_damaged = num_found = 0
    for seed in range(8):
        content = encode(on_white(seed), progressive=True, subsampling=seed % 3)
        begins = [match.start() for match in re.finditer(SOS, content)]
        for begin, end in pairwise([*begins, len(content)]):
            after_header = begin + 2 + content[begin + 3]
            if content[after_header - 1] >> 4:
                continue
            for at in range(after_header, end - 64, 48):
                if (damaged := with_zeros(content, at)) != content:
                    num_damaged += 1
                    num_found += diagnose(damaged, "a.JPEG") is not None
    assert num_damaged == 316
    assert num_found >= 300


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"restart_marker_blocks": 5}])
def test_zeros_that_the_usual_codes_cannot_mean_are_found(options):
    """Wherever they begin, as many blocks as they may stand for."""
    content = encode(picture(2), **options)
    for at in range(content.index(SOS) + 14, len(content) - 66, 53):
        assert diagnose(with_zeros(content, at), "a.JPEG")[0] == "garbage", at


def test_zeros_beside_the_usual_codes_of_a_thumbnail_are_let_pass():
    """The codes of the picture are others, with which its white is zeros."""
    content = encode(on_white(0), optimize=True, exif=exif_with_thumbnail())
    assert bytes(64) in content[content.rindex(SOS) :]
    assert diagnose(content, "a.JPEG") is None


def test_a_chance_end_marker_does_not_hide_what_follows():
    content = encode(picture(1))
    middle = content.index(SOS) + (len(content) - content.index(SOS)) // 2
    kind, detail = diagnose(content[:middle] + b"\xff\xd9" + content[middle:], "a.JPEG")
    assert kind == "garbage"
    assert detail.endswith("premature end of data segment")


def replaced(content, marker, offset, value):
    at = content.index(marker) + offset
    return content[:at] + value + content[at + len(value) :]


@pytest.mark.parametrize(
    "content",
    [
        replaced(encode(picture(1)), b"JFIF", 5, b"\5"),  # a version that nobody knows
        replaced(encode(picture(1), subsampling=0), b"\xff\xc0", 14, b"\x13"),  # of chroma
        encode(picture(1))[:2] + b"\xff" * 5 + encode(picture(1))[2:],  # fill bytes before a marker
        encode(picture(1))[:-2] + bytes(3) + encode(picture(1))[-2:],
        encode(picture(1)) + encode(picture(2))[:-500],
        encode(picture(1), icc_profile=b"none" * 9),
        encode(picture(1), format="MPO", save_all=True, append_images=[picture(2)]),
    ],
)
def test_unusual_pictures_are_let_pass(content):
    assert diagnose(content, "a.JPEG") is None


@pytest.mark.parametrize("count", [2, 40])
def test_a_few_stray_bytes_in_the_header_are_let_pass(count):
    """As data sets in the wild have them before a quantisation table, marker DB."""
    content = encode(picture(1), format="JPEG")
    at = content.index(b"\xff\xdb")
    assert diagnose(content[:at] + bytes(count) + content[at:], "a.jpg") is None


def test_all_variants_of_photographs_are_let_pass():
    photographs = pytest.importorskip("tests.data.photographs", reason="scikit-image is not installed")
    for number, (quality, subsampling, progressive, optimize, interval) in enumerate(
        product((30, 95), (0, 1, 2), (False, True), (False, True), (0, 3))
    ):
        image = photographs.photograph(number, *photographs.odd_size(number, 120))
        content = encode(
            image,
            quality=quality,
            subsampling=subsampling,
            progressive=progressive,
            optimize=optimize,
            restart_marker_blocks=interval,
        )
        assert diagnose(content, "a.JPEG") is None
        inks = encode(image.convert("CMYK"), progressive=progressive)
        assert diagnose(inks, "a.JPEG")[0] == "cmyk"
        assert diagnose(replaced(inks, b"Adobe", 11, b"\2"), "a.JPEG")[0] == "cmyk"  # YCCK


def zero_table(content, marker):
    return replaced(content, marker, 5, bytes(64))


def test_what_decodes_all_the_same_only_a_manifest_finds(tree):
    """Steps of quantisation of zero: the data are well-formed, the picture is grey."""
    manifest = make_manifest(tree, 1, quiet)
    file = tree / "val/0.JPEG"
    file.write_bytes(zero_table(file.read_bytes(), b"\xff\xdb"))
    assert run(tree) == []
    assert [(problem.file, problem.kind) for problem in run(tree, manifest)] == [("val/0.JPEG", "changed")]


@pytest.mark.parametrize(
    ("content", "name", "kind", "detail"),
    [
        (b"", "a.JPEG", "empty", "0 bytes"),
        (bytes(4096), "a.JPEG", "garbage", "all 4096 bytes are zero"),
        (
            b"<html>404</html>",
            "a.JPEG",
            "garbage",
            "not an image of a known format: it begins with b'<html>40'",
        ),
        (encode(picture(1), format="GIF"), "a.JPEG", "garbage", "it begins with b'GIF"),
        (encode(picture(1), format="PNG"), "a.JPEG", "wrong name", "the content is PNG, the name says .JPEG"),
        (encode(picture(1)), "a.png", "wrong name", "the content is JPEG"),
        (encode(picture(1).convert("CMYK")), "a.jpg", "cmyk", "four inks"),
        (encode(picture(1).convert("CMYK"))[:-9], "a.jpg", "truncated", "end-of-image marker"),
        (
            zero_table(encode(picture(1), optimize=True), b"\xff\xc4"),
            "a.JPEG",
            "garbage",
            "cannot be decoded",
        ),
        (encode(picture(1), format="PNG")[:-100] + bytes(100), "a.png", "garbage", "cannot be decoded"),
    ],
)
def test_findings_say_what_is_wrong(content, name, kind, detail):
    found = diagnose(content, name)
    assert found[0] == kind
    assert detail in found[1]


def test_a_decompression_bomb_is_refused():
    content = encode(picture(1))
    at = content.index(b"\xff\xc0") + 5
    kind, detail = diagnose(content[:at] + b"\xff\x00\xff\x00" + content[at + 4 :], "a.JPEG")
    assert kind == "garbage"
    assert "decompression bomb" in detail


def test_warnings_and_settings_stay_as_they_were(monkeypatch):
    image = picture(1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", image.width * image.height - 1)  # worth a warning
    assert diagnose(encode(image), "a.JPEG") is None
    with pytest.warns(Image.DecompressionBombWarning):
        Image.open(io.BytesIO(encode(image)))
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_all_extensions_have_a_format():
    assert sorted(EXTENSIONS) == sorted(suffix for suffixes in FORMATS.values() for suffix in suffixes)


def test_one_problem_a_file_and_the_worst(tree):
    manifest = make_manifest(tree, 2, quiet)
    (tree / "train/n00/0.JPEG").unlink()
    (tree / "train/n00/1.JPEG").write_bytes(encode(picture(50)))
    (tree / "train/n00/2.JPEG").write_bytes(encode(picture(51).convert("CMYK")))
    (tree / "train/n01/0.JPEG").write_bytes(b"")
    (tree / "train/n01/new.JPEG").symlink_to("nowhere")
    (tree / "train/n01/pipe.JPEG").mkdir()
    os.mkfifo(tree / "val/pipe.JPEG")
    (tree / "val/labels.txt").write_text("not an image, not in the manifest")
    problems = run(tree, manifest)
    assert [(problem.file, problem.kind) for problem in problems] == [
        ("train/n00/0.JPEG", "missing"),
        ("train/n00/1.JPEG", "changed"),
        ("train/n00/2.JPEG", "changed"),
        ("train/n01/0.JPEG", "empty"),
        ("train/n01/new.JPEG", "unreadable"),
        ("val/pipe.JPEG", "unreadable"),
    ]
    assert [problem.bad for problem in problems] == [False, True, True, True, True, True]
    assert not any(problem.warning for problem in problems)
    assert "four inks" in problems[2].detail
    assert [p.kind for p in run(tree) if p.warning] == ["cmyk"]


def test_nested_and_linked_folders_are_looked_at(tree):
    (tree / "train/n00/deeper").mkdir()
    (tree / "train/n00/deeper/bad.JPEG").write_bytes(b"x")
    (tree / "elsewhere").mkdir()
    (tree / "elsewhere/bad.jpg").write_bytes(b"x")
    (tree / "train/n02").symlink_to(tree / "elsewhere")
    (tree / "train/n00/loop").symlink_to(tree / "train")
    assert [p.file for p in run(tree)] == ["train/n00/deeper/bad.JPEG", "train/n02/bad.jpg"]
    loaded = [*load_image_files(tree, "train").files, *(f"val/{i}.JPEG" for i in range(3))]
    assert list(make_manifest(tree, 1, quiet)) == sorted(loaded)
    write_exclusions(tree / "excluded.txt", run(tree))
    assert load_image_files(tree, "train").num_excluded == 2
    assert len(load_image_files(tree, "train")) == 6


def test_links_that_lead_to_each_other_end(tree):
    """Two folders of 25 links to each other are 25 ^ 40 folders until the system refuses."""
    for i in range(25):
        (tree / f"train/n00/{i}").symlink_to(tree / "train/n01")
        (tree / f"train/n01/{i}").symlink_to(tree / "train/n00")
    (tree / "train/n01/2.JPEG").write_bytes(b"x")
    assert [p.file for p in run(tree)] == sorted(
        ["train/n01/2.JPEG", *(f"train/n00/{i}/2.JPEG" for i in range(25))]
    )


def test_progress_counts_every_file(tree):
    calls = []
    run(tree, on_progress=lambda done, total: calls.append((done, total)))
    assert calls == [(done, 9) for done in range(10)]


def test_nothing_goes_on_after_an_interruption(tree):
    def interrupt(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tree, on_progress=interrupt)
    assert not multiprocessing.active_children()


def examine_or_die(root, item):
    """What EXAMINE does, except that some files end the process, as a fault in a decoder would."""
    file, _ = item
    if file.startswith("train/n00"):
        os.kill(os.getpid(), signal.SIGKILL)
    if file == "val/0.JPEG":
        os._exit(7)
    if (
        file == "val/1.JPEG" and not (root / "seen").exists()
    ):  # what is killed for lack of memory is not to blame
        (root / "seen").touch()
        os._exit(8)
    return EXAMINE(root, item)


@pytest.mark.parametrize("workers", [1, 2])
def test_files_that_end_the_process_do_not_end_the_pass(tree, monkeypatch, workers):
    (tree / "val/2.JPEG").write_bytes(b"x")
    monkeypatch.setattr(module, "_examine", examine_or_die)
    calls = []
    problems = run(tree, workers=workers, on_progress=lambda done, total: calls.append(done))
    died = "the process that decodes it ends with"
    assert [(p.file, p.kind) for p in problems] == [
        *((f"train/n00/{i}.JPEG", "garbage") for i in range(3)),
        ("val/0.JPEG", "garbage"),
        ("val/2.JPEG", "garbage"),
    ]
    assert [p.detail for p in problems[:4]] == [*[f"{died} SIGKILL"] * 3, f"{died} exit status 7"]
    assert calls == list(range(10))
    assert (tree / "seen").exists()


def test_processes_that_cannot_start_end_the_pass(tree, monkeypatch):
    absent = types.ModuleType("absent_in_processes")
    exec("def examine(root, item): pass", absent.__dict__)
    monkeypatch.setitem(sys.modules, absent.__name__, absent)
    monkeypatch.setattr(module, "_examine", absent.examine)
    with pytest.raises(
        RuntimeError, match="a worker process ended before its first item, with exit status 1"
    ):
        run(tree)
    assert not multiprocessing.active_children()


def test_a_manifest_comes_back_and_sha256sum_reads_it(tree):
    manifest = make_manifest(tree, 2, quiet)
    path = tree / "manifest.sha256"
    write_manifest(path, manifest)
    assert read_manifest(path) == manifest
    assert list(manifest) == sorted(manifest)
    assert manifest["val/0.JPEG"] == hashlib.sha256((tree / "val/0.JPEG").read_bytes()).hexdigest()
    assert sorted(entry.name for entry in tree.iterdir()) == ["manifest.sha256", "train", "val"]
    assert run(tree, read_manifest(path)) == []
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--strict", "--quiet", path.name], cwd=tree, check=True)
        output = subprocess.run(
            "find . -name '*.JPEG' | xargs sha256sum --binary", shell=True, cwd=tree, capture_output=True
        ).stdout
        path.write_bytes(output)
        assert read_manifest(path) == manifest


DIGEST = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"line 1: a manifest without lines"),
        (f"{DIGEST}  a.JPEG\n{DIGEST} b.JPEG\n".encode(), r"line 2: '.* b.JPEG' is not SHA256 and PATH"),
        (f"{DIGEST[1:]}  a.JPEG\n".encode(), r"line 1: .* is not SHA256 and PATH"),
        (f"{DIGEST}  a.JPEG\n\n".encode(), r"line 2: '' is not SHA256 and PATH"),
        (f"{DIGEST}  ".encode() + b"\xff.JPEG\n", r"line 1: .* is not SHA256 and PATH"),
        (f"\\{DIGEST}  a\\nb.JPEG\n".encode(), r"line 1: .* is not SHA256 and PATH"),
        (f"{DIGEST}  /data/a.JPEG\n".encode(), r"line 1: /data/a.JPEG is not relative to ROOT"),
        (f"{DIGEST}  train/../../a.JPEG\n".encode(), r"line 1: .* is not relative to ROOT"),
        (f"{DIGEST}  a.JPEG\n{'0' * 64}  a.JPEG\n".encode(), r"line 2: a.JPEG is named before"),
    ],
)
def test_bad_lines_of_a_manifest_are_named(tmp_path, content, message):
    path = tmp_path / "manifest"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path}, {message}"):
        read_manifest(path)


def test_a_manifest_needs_every_file(tree):
    (tree / "val/0.JPEG").unlink()
    (tree / "val/0.JPEG").symlink_to("nowhere")
    with pytest.raises(OSError, match=r"val/0\.JPEG: no file.* 1 such in all"):
        make_manifest(tree, 2, quiet)


def test_the_exclusion_list_is_honoured_by_loading(tree):
    (tree / "train/n00/1.JPEG").write_bytes(b"\n\t#")
    (tree / "train/n01/2.JPEG").write_bytes(encode(picture(1).convert("CMYK")))
    problems = run(tree)
    write_exclusions(tree / "excluded.txt", problems)
    loaded = load_image_files(tree, "train")
    assert (len(loaded), loaded.num_excluded) == (5, 1)
    assert "train/n00/1.JPEG" not in loaded.files
    assert run(tree) == problems  # what is excluded is looked at all the same


def test_exclusion_lists_are_merged(tmp_path):
    path = tmp_path / "excluded.txt"
    path.write_text("# ours\nval/z.JPEG\twrong label\n\nval/b.JPEG\nval/a.JPEG\tempty: 0 bytes\n")
    problems = [
        Problem("val/b.JPEG", "truncated", "it ends\nsoon"),
        Problem("train/n0/c.JPEG", "garbage", "x"),
        Problem("val/d.JPEG", "cmyk", "x"),
        Problem("val/e.JPEG", "missing", "x"),
    ]
    for _ in range(2):  # a second time changes nothing
        write_exclusions(path, problems)
        header, *lines = path.read_text().splitlines()
        assert header.startswith("#")
        assert lines == [
            "# ours",
            "train/n0/c.JPEG\tgarbage: x",
            "val/a.JPEG\tempty: 0 bytes",
            "val/b.JPEG\ttruncated: it ends soon",
            "val/z.JPEG\twrong label",
        ]
    assert read_exclusions(path) == {"train/n0/c.JPEG", "val/a.JPEG", "val/b.JPEG", "val/z.JPEG"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["excluded.txt"]


def test_no_exclusion_list_where_nothing_is_bad(tmp_path):
    write_exclusions(tmp_path / "excluded.txt", [Problem("val/a.JPEG", "cmyk", "x")])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a\nb.JPEG", "a\tb.JPEG", "#a.JPEG", "\udcff.JPEG"])
def test_names_that_no_line_can_hold_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="cannot be written into a list of files: rename it"):
        write_exclusions(tmp_path / "excluded.txt", [Problem(name, "empty", "0 bytes")])
    with pytest.raises(ValueError, match="cannot be written into a list of files: rename it"):
        write_manifest(tmp_path / "manifest", {name: DIGEST})


def test_mistakes_are_explained(tree, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"holds neither train nor val: expected are .*CLASS/\*\.JPEG"
    ):
        run(tmp_path / "nowhere")
    (tmp_path / "empty/train").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"no images \(\.jpeg, .*\) below"):
        run(tmp_path / "empty")
    with pytest.raises(ValueError, match="names none of the 9 images"):
        run(tree, {"imagenet/train/n00/0.JPEG": DIGEST})
    with pytest.raises(ValueError, match="workers is 0, must be at least 1"):
        run(tree, workers=0)
