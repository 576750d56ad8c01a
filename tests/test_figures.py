"""Figures in the documents are those of records and recipes."""

from __future__ import annotations

import json
import re
from statistics import median
from typing import Any

from benchmarks.accuracy import figures
from benchmarks.accuracy.tables import TABLES
from benchmarks.shared.record import show_spread
from tests.test_docs import README, ROOT, blocks


def record(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


TORTURE = "| `make torture`: kills end with the same bits; damage is refused or harmless | {} |"


def test_what_the_torture_counted_is_its_record():
    """README has its row, docs/security.md its table; until `make torture` has written one, both say so."""
    readme, page = (path.read_text(encoding="utf-8") for path in (README, ROOT / "docs" / "security.md"))
    shown = [line for line in page.splitlines() if re.search(r"\| [\d,]+ of [\d,]+ \|$", line)]
    if not (ROOT / "benchmarks" / "results" / "torture.json").exists():
        assert shown == []
        assert "**Not counted yet.**" in page
        assert TORTURE.format("**not counted yet**") in readme.splitlines()
        return
    claims = record("torture")["claims"]
    assert shown == [f"| {each['claim']} | {each['stood']:,} of {each['of']:,} |" for each in claims.values()]
    kills = [sum(claims[key][which] for key in ("killed", "killed_two_ranks")) for which in ("stood", "of")]
    damages = [claims["damaged"][which] for which in ("stood", "of")]
    counted = "; ".join(f"{stood:,} of {of:,}" for stood, of in (kills, damages))
    assert TORTURE.format(counted) in readme.splitlines()
    assert "Not counted yet" not in page


def test_the_evidence_page_has_the_figures_of_recipes_and_records():
    page = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    for path in (ROOT / "configs" / "imagenet").glob("*.yaml"):
        if found := re.search(r"Paper: +([\d.]+ %)", path.read_text(encoding="utf-8")):
            assert f"| `imagenet/{path.stem}` | {found[1]} |" in page
    for table in TABLES:
        found = figures.read(table, ROOT / "benchmarks" / "results" / "accuracy")
        if any(each.records for each in found if each.row.same_as is None):
            lines = figures.markdown(figures.lines(table, found))
            assert [line for line in lines if line not in page] == [], table


def test_the_readmes_accuracy_is_that_of_the_records():
    found = figures.read("main", ROOT / "benchmarks" / "results" / "accuracy")
    lines = dict(
        zip((each.row.name for each in found if each.records), figures.lines("main", found), strict=True)
    )
    shown = [lines[name] for name in ("dense", "acdc_90", "gmp_90", "one_shot_90", "set_90", "random_90")]
    readme = README.read_text(encoding="utf-8")
    for title, column in (("seeds", 1), ("test top-1, %", 3), ("against dense", 4)):
        assert f"| {title} | {' | '.join(line[column] for line in shown)} |".replace("|  |", "| |") in readme


def test_figures_are_those_of_the_records():
    readme, page = (path.read_text(encoding="utf-8") for path in (README, ROOT / "docs" / "benchmarks.md"))
    for claim in record("quickstart")["claims"]:
        assert f"| {claim['promise']} | {claim['bar']} | {claim['measured']} |" in page
    for network, measured in record("peers")["peers"].items():
        for ratio in ("ours_over_tuned", "ours_over_plain"):
            assert show_spread(measured[ratio], 2) in page
            if network == "resnet50":
                assert show_spread(measured[ratio], 2).replace(" (", " times (") in readme
    for network, measured in record("overhead")["overhead"].items():
        assert show_spread(measured["ratio"], 3) in page
        if network == "resnet50":
            assert show_spread(measured["ratio"], 3).replace(" (", " times (") in readme
    for measured in record("before")["peers"].values():
        assert show_spread(measured["ours_over_before"], 3) in page
    logging = record("logging")["logging"]["resnet20"]
    assert f"{show_spread(logging['ratio'], 3)} times as long as a silent one" in page
    assert f"take {logging['percent_of_step_recording']} % of a step" in page
    steps = {}
    names = [f"sparse_step{which}" for which in ("", "_small", "_wrn", "_wrn_bf16", "_run", "_avx2")]
    for name, result in [(each, result) for each in names for result in record(each)["sparse_step"]]:
        percent = f"{result['percent']:g}"
        gains = (show_spread(result[f"{who}_to_compressed"], 2) for who in ("dense", "stock"))
        whole = f"{result['whole_run']['of_dense']['median']:.2f}"
        network = result["network"] + ", AVX2" * name.endswith("avx2")
        network = "ResNet8, masks of a run" if name.endswith("_run") else network
        row = f"| {network} | {result['precision']} | {percent} | {' | '.join(gains)} | {whole} |"
        assert row in page
        if network == "resnet50":
            gain = show_spread(result["dense_to_compressed"], 2).replace(" (", " times (")
            steps[percent, result["precision"]] = gain
    for percent in ("90", "95"):
        assert f"| {percent} % | {steps[percent, 'fp32']} | {steps[percent, 'bf16']} |" in readme
    for precision, result in record("sparse_kernels")["sparse_kernels"]["resnet50"].items():
        kept = next(each["kept"] for each in result["shapes"] if each["layer"] == "all").values()
        gains = (f"{each['dense_to_sparse']:.2f} ({each['executed_gflops']:.0f})" for each in kept)
        assert f"| {precision} | {' | '.join(gains)} | {result['fma_fp32_gflops']:.0f} |" in page
    gains = {}
    for name in ("inference", "inference_avx2"):
        for result in record(name)["inference"]:
            ms, ratio = result["ms_per_batch"], result["ours_over_fastest_rival"][result["fastest_of_ours"]]
            shown = ("ours fp32", "ours bf16", "torch fp32", result["fastest_rival"])
            times = " | ".join(f"{ms[who]['median']:,.1f}" for who in shown if who in ms)
            percent, batch = f"{result['percent']:g}", result["batch"]
            assert f"| {percent} | {batch} | {times} | {show_spread(ratio, 2)} |" in page
            assert name == "inference" or result["fastest_rival"] == "ONNX Runtime fp32"
            gains[name, percent, batch] = show_spread(ratio, 2).replace(" (", " times (")
    for images, batch in (("one image", 1), ("32 images", 32)):
        gain = gains["inference_avx2", "90", batch]
        assert f"90 % sparse, {images}, AVX2, fp32, against ONNX Runtime | {gain} |" in readme
    variants = record("gpu/variants")["variants"]
    for found in variants.values():
        figures = f"{found['images_per_second']:,.0f} | {1000 * found['step_p50']:.1f}"
        assert f" | {found['batch']} | {figures} | {found['peak_memory_gb']:.1f} |" in page
    assert f"{variants['as_is']['images_per_second']:,.0f} images/s on noise" in readme
    files = record("gpu/files")
    decoders = {
        "engines 1.0": "engines, all images",
        "engines 0.65": "engines 65 %, kernels 35 %",
        "engines 0.3": "engines 30 %, kernels 70 %",
        "cpu": "CPU, 16 threads",
    }
    trained = {
        name: median(turn["images_per_second"] for turn in turns) for name, turns in files["training"].items()
    }
    for name, text in decoders.items():
        speeds = (
            files["alone"][name]["images_per_second"],
            trained[f"{name} | default"],
            trained[f"{name} | own"],
        )
        assert f"| {text} | {' | '.join(f'{speed:,.0f}' for speed in speeds)} |" in page
    assert f"| {trained['noise | default']:,.0f} | {trained['noise | own']:,.0f} |" in page
    assert f"{trained['engines 1.0 | own']:,.0f} from JPEG files" in readme
    for name, times in record("gpu/phase_switch")["seconds"].items():
        made = " | ".join(f"{1000 * times[what]['median']:.0f}" for what in ("compress", "decompress"))
        assert f"| {name} | {made} |" in page
    for row in record("gpu/kernels24")["kernels"]:
        for product in (row["forward"], row["gradient"]):
            assert product["sparse"] > 0.979 * product["dense"]  # "no more than 2 %"
    profiled = record("gpu/step_profile")
    for kind in ("convolution", "element-wise", "BatchNorm", "copies", "optimizer"):
        assert f" | {profiled['milliseconds'][kind]:.1f} |" in page
    assert (
        f"{profiled['copy_bandwidth_tb_s']:.2f} TB/s of a copy, {profiled['peak_bf16_tflop_s']:.0f}" in page
    )
    for line in blocks(README):
        if found := re.match(r"(dense twin|sparse model) +([\d.]+) +([\d.]+)", line):
            result = record("quickstart")["result"][
                {"dense twin": "dense_twin", "sparse model": "sparse"}[found[1]]
            ]
            assert (float(found[2]), float(found[3])) == (result["top1"], result["top5"])
