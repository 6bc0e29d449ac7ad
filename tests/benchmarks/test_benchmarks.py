"""The benchmark scripts run from the command line and end with the JSON line that others read."""

import importlib
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from tests.conftest import QUICK_COMPILES

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


def last_line(script: str, *arguments: str) -> dict:
    """Runs benchmarks/`script` --quick on one CPU device; returns the JSON of its last line."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK_COMPILES}
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--quick", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_loader_delivers_the_shares_asked_for():
    result = last_line("loader.py")
    assert result["tokens_per_s"] > 0 and result["tokens_per_s_4096"] > 0
    assert result["share_error_sequences"] < 3


@pytest.mark.slow
def test_train_step_alone_leaves_the_fields_of_the_peer_empty():
    result = last_line("train_step.py")
    ours = ("ours_tokens_per_s", "ours_first_step_s", "ours_cpu_s_per_step", "ours_peak_rss_gb", "peak_fraction")
    assert all(result[name] > 0 for name in ours)
    assert [result[name] for name in ("peer_tokens_per_s", "peer_first_step_s", "peer_cpu_s_per_step", "ratio")] == [
        None
    ] * 4
    assert result["ours_losses"][-1] < result["ours_losses"][0]


@pytest.mark.slow
def test_variants_of_the_gpu_step_are_sorted_and_a_failing_one_stops_nothing():
    result = last_line("train_gpu.py")
    assert result["paper_tokens_per_s"] == 43_400
    assert result["ratio"] is None  # a toy is not compared with the paper
    speeds = [variant["tokens_per_s"] for variant in result["variants"] if variant["error"] is None]
    assert len(speeds) == 2 and speeds == sorted(speeds, reverse=True)
    assert (result["tokens_per_s"], result["variant"]) == (speeds[0], result["variants"][0]["variant"])
    assert result["mfu"] == pytest.approx(result["variants"][0]["mfu"])
    assert result["variants"][-1]["variant"] == "none-cudnn" and "cudnn" in result["variants"][-1]["error"]


@pytest.mark.slow
def test_solver_reaches_optimality():
    result = last_line("climb_solver.py", "--languages", "12")
    assert result["languages"] == 12 and result["kkt"] < 1e-6 and 0 <= result["joint_gap"] < 0.1


@pytest.mark.slow
def test_every_law_is_scored_on_a_table_in_the_regmix_layout():
    result = last_line("climb_table.py")
    assert set(result["laws"]) == {"structured_gp", "ridge"}
    for law in result["laws"].values():
        assert law["runs"] == result["runs"] and -1 <= law["spearman"] <= 1 and law["mae"] > 0 and law["r2"] <= 1


@pytest.mark.slow
def test_proxies_are_timed_alone_and_side_by_side():
    assert all(speed > 0 for speed in last_line("climb_proxies.py")["tokens_per_s"].values())


@pytest.mark.slow
def test_bulk_inference_alone_has_its_speed_and_padding():
    result = last_line("rater_throughput.py")
    assert 0.93 < result["padding_efficiency"] < 1 and "ratio_f32" not in result
    assert len(result["documents_per_s"]) == 4 and all(cell["ours"] > 0 for cell in result["documents_per_s"].values())


@pytest.mark.slow
def test_evidence_on_raters_runs_on_the_sample(tmp_path):
    result = last_line("rater_evidence.py", "--corpus", str(ROOT / "samples/text/train"), "--work", str(tmp_path))
    assert set(result["raters"]) == {"full", "no cross-lingual pairs", "no parallel pairs", "pointwise"}
    for (judged,) in result["raters"].values():
        assert {"seen/ocr", "unseen/ocr", "unseen/across languages, all corruptions", "parallel_mse"} <= set(judged)
    kept = {arm: values["corrupted"] for arm, values in result["pretraining"].items()}
    assert set(kept) == {"best half", "best half of each source", "random half", "worst half"}
    assert kept["worst half"] + kept["best half"] == pytest.approx(2 * kept["random half"], abs=0.2)
    assert all(len(values["loss"]) == 1 for values in result["pretraining"].values())


@pytest.fixture
def parallel_corpus(monkeypatch):
    """The module benchmarks/parallel_corpus.py."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("parallel_corpus")


def test_no_text_of_the_study_is_on_two_sides(parallel_corpus):
    documents = parallel_corpus.read_corpus(ROOT / "samples/text/train")
    divided = parallel_corpus.divide(documents)
    keys = {(part, language): {(document.source, document.id) for document in texts}
            for part, by_language in divided.items() for language, texts in by_language.items()}
    assert all(len(part) > 3 for part in keys.values())
    assert keys["heldout", "en"] == keys["heldout", "zh"] and keys["parallel", "en"] == keys["parallel", "zh"]
    # Neither a held-out document nor the translation of one, and no pair but in the parallel text.
    parts = [keys["heldout", "en"], keys["parallel", "en"], keys["train", "en"], keys["train", "zh"]]
    assert sum(map(len, parts)) == len(set().union(*parts))
    long = {language: {line for document in divided["heldout"][language] for line in document.text.split("\n")
                       if len(line.strip().encode()) >= 80} for language in ("en", "zh")}
    assert all(long.values())
    for part in ("parallel", "train"):
        for language in ("en", "zh"):
            assert not [line for document in divided[part][language] for line in document.text.split("\n")
                        if line in long[language]]


def test_differences_are_paired_by_seed_and_item(parallel_corpus):
    def run(gain, noise):
        rows = [[10.0 - gain + noise, 10.0 + noise, 11.0 + noise, 12.0 + noise, 5] for noise in (noise, 2 * noise)]
        return {"documents": {"en": [[20.0 - gain + noise, 10], [40.0 - gain + noise, 10]]},
                "translation": {"en to zh": rows}, "tasks": {"completion": {
                    "labels": [0, 1], "options": [4, 2], "chosen": {"en": [0, 0], "zh": [0, 1 if gain else 0]}}}}
    noises = {0: 0.0, 1: 3.0, 2: -2.0}
    runs = {("1:1", arm, seed): run(gain, noise)
            for arm, gain in (("none", 0.0), ("8%", 1.0)) for seed, noise in noises.items()}
    rows = {row["measure"]: row for row in parallel_corpus.compare(runs)}
    assert rows["bits per byte, en"]["arms"]["none"] == pytest.approx((60 + 2 * sum(noises.values()) / 3) / 20)
    difference = rows["bits per byte, en"]["differences"]["8% - none"]  # 1 bit in 10 bytes, whatever the seed's noise
    assert [difference["mean"], *difference["items"], *difference["t"]] == pytest.approx([-0.1] * 5)
    assert parallel_corpus.is_clear(difference)
    saved = rows["bits saved by the translation, en to zh"]["arms"]
    assert saved == pytest.approx({"none": 1 / 5, "8%": 2 / 5})
    found = rows["translation found, %, en to zh"]["arms"]
    assert found == {"none": 0, "8%": 100}  # a tie with another context is no success
    assert rows["completion, MLC, %"]["arms"] == {"none": 100, "8%": 50}
    assert rows["completion, accuracy, %, zh"]["arms"] == {"none": 50, "8%": 100}
    assert rows["completion, accuracy, %, zh"]["chance"] == pytest.approx(37.5)
    assert not parallel_corpus.is_clear(rows["completion, accuracy, %, en"]["differences"]["8% - none"])


@pytest.mark.slow
def test_the_study_of_parallel_text_runs_on_the_sample(tmp_path):
    result = last_line("parallel_corpus.py", "--corpus", str(ROOT / "samples/text/train"), "--work", str(tmp_path))
    assert {row["ratio"] for row in result["rows"]} == {"9:1"}
    for row in result["rows"]:
        assert set(row["arms"]) == {"none", "16%"} and set(row["differences"]) == {"16% - none"}
    parts = result["parts"]["train"]
    assert parts["en-zh"]["bytes"] == pytest.approx(parts["unpaired"]["bytes"], rel=1e-3)
    assert parts["unpaired"]["documents"] == 2 * parts["en-zh"]["documents"]
    assert 0 < result["epochs"]["9-1_16_0"]["en-zh"] < 1 and "en-zh" not in result["epochs"]["9-1_none_0"]
    assert (tmp_path / "parallel_corpus.svg").stat().st_size > 1000


@pytest.mark.slow
def test_the_race_of_evaluations_without_a_rival_has_our_own_speed():
    result = last_line("eval_race.py")
    assert set(result["items_per_s"]) == {"7M 0-shot", "7M 5-shot"}
    assert all(found["ours"] > 0 for found in result["items_per_s"].values()) and "ratio_0shot" not in result


@pytest.mark.slow
def test_losses_of_combinations_are_those_of_the_naive_loop():
    result = last_line("video_label.py")
    assert result["max_abs_diff"] < 1e-4 and result["ratio"] > 0 and result["combinations"] == 70


@pytest.mark.slow
def test_losses_of_nested_combinations_are_those_of_the_naive_loop():
    result = last_line("video_label.py", "--candidates=12", "--combinations=16")
    assert result["max_abs_diff"] < 1e-4 and result["combinations"] == 16
    assert 0 < result["fed_tokens"] < result["naive_tokens"]


def test_nested_combinations_take_fewer_tokens_and_favour_no_frame():
    result = last_line("video_combinations.py")
    alone, nested = result["16,4,64 one by one"], result["16,4,64 nested"]
    assert nested["tokens"] < 0.9 * alone["tokens"]
    assert abs(nested["frame"][0]) < 5 * nested["frame"][1]


@pytest.mark.slow
@pytest.mark.parametrize("world", ["moments", "stories"])
def test_the_evidence_of_frame_voyager_runs_from_nothing(tmp_path, world):
    result = last_line("video_evidence.py", f"--world={world}", f"--output={tmp_path}", "--voyager_seeds=2")
    assert result["questions"] == 6 and list(result["accuracy"]) == ["4 of 16", "4 of 32", "2 of 16", "4 of 64"]
    assert all(0 <= accuracy <= 1 for row in result["accuracy"].values() for accuracy in row.values())
    assert {"uniform", "similarity", "MDP3", "Frame-Voyager", "frames that matter"} < set(result["accuracy"]["2 of 16"])


@pytest.mark.slow
def test_key_frames_are_the_exact_ones_and_cost_less():
    result = last_line("video_decode.py")
    assert (result["duration"], result["frames"], result["key_frames"]) == (120, 2880, 12)
    spent = result["processor_seconds"]
    assert 0 < spent["key_frames"][0] < spent["exact"][0]


@pytest.mark.slow
def test_conversions_hold_less_than_the_model():
    """A fixed 70 MB and a few tensors of 17 MB; with the model whole in memory it was 676, 495 and 141 MB."""
    result = last_line("convert_memory.py")
    assert result["parameters_mb"] == 134
    assert max(result["float32_mb"], result["bfloat16_mb"]) < 180 and result["load_mb"] < 90


@pytest.mark.parametrize("stages", [["decontaminate"], pytest.param(
    ["duplicates", "languages", "decontaminate", "select"], marks=pytest.mark.slow)])
def test_documents_has_a_field_for_each_stage(stages):
    result = last_line("documents.py", str(ROOT / "samples/text/train"), f"--stages={','.join(stages)}")
    assert result["documents"] == 2000 and list(result)[2:] == stages
    for stage in stages:
        assert result[stage]["documents_per_s"] > 100 and 20 < result[stage]["peak_memory_mb"] < 2000
        assert result[stage]["bytes_per_s"] == pytest.approx(
            result[stage]["documents_per_s"] * result["bytes"] / 2000, rel=0.01)


def test_identifiers_of_languages_know_the_sample(tmp_path):
    for language in ("de", "hi", "zh"):
        shutil.copy(ROOT / f"samples/text/heldout/{language}.jsonl.xz", tmp_path)
    result = last_line("language_id.py", str(tmp_path), "--only", "py3langid,cld2")
    accuracy = result["accuracy"][f"all, {tmp_path.name}, 300"]
    assert accuracy["languages"] == 3 and min(accuracy["py3langid"], accuracy["cld2"]) >= 0.8
    assert result["judgements"]["with_cld2, 300"][0] >= 80 and result["microseconds"]["cld2"]["300"] > 0
