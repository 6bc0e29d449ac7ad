"""`make demo`: the whole pipeline on the sample text, every stage by its own command.

It may be interrupted and started again: each stage keeps its finished outputs, and training resumes from its last
checkpoint.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
RUN_DIR = "runs/demo"
ALLOCATION = "runs/sample/climb"
EVALS = "runs/sample/evals"
RATER, SELECTED = "runs/sample/rater", "runs/sample/selected"
DOCUMENTS = "samples/text/train/*.jsonl.xz"


def video_stage(stage: str, *flags: str) -> list[str]:
    """Returns a command of Frame-Voyager at the demo's size."""
    return [f"video.{stage}", f"--gin_file=gin/video/{stage}.gin", "--gin_file=gin/video/demo.gin", *flags]


FRAMES = "runs/sample/video/selected"
PREPARE = ["--gin_file=gin/mixtures/sample.gin", "--gin_file=gin/mixtures/prepare.gin"]
STAGES = [
    ("Train a tokenizer on the sample text", ["data_mixtures.tokenizer", *PREPARE]),
    ("Export documents to tokens", ["data_mixtures.export", *PREPARE]),
    ("Train 43 tiny models on mixtures", ["data_mixtures.climb.proxies", "--gin_file=gin/runs/demo_proxies.gin"]),
    ("Choose the languages' shares", ["data_mixtures.climb.allocate", "--gin_file=gin/runs/demo_allocate.gin"]),
    ("Report on the choice", ["data_mixtures.climb.report", f"--gin.climb_report.folder={ALLOCATION}"]),
    ("Pretrain", ["mlx_pretrain.train", "--gin_file=gin/runs/demo.gin", "--gin_file=gin/evals/during_training.gin",
                  f"--gin.RATES={ALLOCATION}/rates.json", "--gin.train.tasks_every=300"]),
    ("Generate text in every language", ["mlx_pretrain.generate", "--gin_file=gin/runs/demo_samples.gin"]),
    ("Write the report", ["mlx_pretrain.report", f"--gin.report.run_dir={RUN_DIR}"]),
    ("Evaluate it on aligned questions in ten languages", ["evals.run", "--gin_file=gin/evals/run.gin",
                                                           f"--gin.MODEL={RUN_DIR}", f"--gin.OUTPUT={EVALS}"]),
    ("Train a rater of English on n-grams", ["raters.ngrams", "--gin_file=gin/raters/pairs.gin"]),
    ("Carry English preferences to all languages", ["raters.pairs", "--gin_file=gin/raters/pairs.gin"]),
    ("Train a multilingual rater", ["raters.train", "--gin_file=gin/raters/train.gin", f"--gin.RUN_DIR={RATER}",
                                    "--gin.STEPS=200"]),
    ("Rate the documents", ["raters.score", "--gin_file=gin/raters/score.gin", f"--gin.DOCUMENTS=['{DOCUMENTS}']",
                            f"--gin.RATER_DIR={RATER}", "--gin.SCORES=runs/sample/scores"]),
    ("Keep the better half", ["raters.select", "--gin_file=gin/raters/select.gin", f"--gin.DOCUMENTS={DOCUMENTS}",
                              "--gin.SCORES=runs/sample/scores", f"--gin.SELECTED={SELECTED}",
                              "--gin.select.fraction=0.5"]),
    ("Report on what was kept", ["raters.selection_report", f"--gin.selection_report.folder={SELECTED}"]),
    ("Render short videos with questions", video_stage(
        "synthetic", "--gin.synthetic.train_videos=120", "--gin.synthetic.test_videos=16")),
    ("Decode their frames", video_stage("decode")),
    ("Train a small Video-LLM", video_stage("train", "--gin.STEPS=90", "--gin.warmup_cosine.warmup_steps=10",
                                            "--gin.train_video.eval_questions=40")),
    ("Compute its losses on combinations of frames", video_stage(
        "label", "--gin.label.max_combinations=64", "--gin.label.limit=300")),
    ("Compute them on held-out videos", video_stage(
        "label", "--gin.label.max_combinations=256", "--gin.label.limit=60", "--gin.QUESTIONS=%TEST",
        "--gin.LABELS=%TEST_LABELS")),
    ("Train Frame-Voyager on these losses", video_stage("train_voyager", "--gin.STEPS=60",
                                                        "--gin.warmup_cosine.warmup_steps=10")),
    ("Choose 4 of 32 frames for every question", video_stage(
        "select", "--gin.Selector.candidates=32", "--gin.Selector.num_frames=4", "--gin.select_frames.sheets=4")),
]


def fast_bfloat16() -> bool:
    """Returns whether this CPU multiplies bfloat16 in hardware; float32 is faster on others."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    return cpuinfo.exists() and bool({"avx512_bf16", "amx_bf16"} & set(cpuinfo.read_text().split()))


def run_stage(command: list[str]) -> int:
    """Runs `python -m ...` and waits for its end, after Ctrl-C too: training saves a checkpoint before it ends."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen([sys.executable, "-m", *command], cwd=ROOT, env=environment) as process:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                continue


def last_evaluations() -> tuple[dict, dict]:
    """Returns the first and the last evaluation of the run."""
    lines = (ROOT / RUN_DIR / "metrics.jsonl").read_text().splitlines()
    evaluations = [record for record in map(json.loads, lines) if record["kind"] == "eval"]
    return evaluations[0], evaluations[-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, help="training steps, instead of those in gin/runs/demo.gin")
    arguments = parser.parse_args()
    started = time.monotonic()
    for number, (title, command) in enumerate(STAGES, 1):
        if command[0] == "mlx_pretrain.train" and fast_bfloat16():
            command = [*command, "--gin.DecoderConfig.dtype=bfloat16"]
        if command[0] == "mlx_pretrain.train" and arguments.steps:
            warmup = f"--gin.warmup_cosine.warmup_steps={arguments.steps // 10}"
            command = [*command, f"--gin.STEPS={arguments.steps}", warmup]
        elapsed = time.monotonic() - started
        print(f"\n[{number}/{len(STAGES)}] {title}  ({elapsed:.0f} s)\n  python -m {' '.join(command)}", flush=True)
        code = run_stage(command)
        if code:
            print(f"\nstopped in stage {number}; `make demo` resumes here", file=sys.stderr)
            return code
    before, after = last_evaluations()
    print(f"\nDone in {time.monotonic() - started:.0f} s: held-out text of {len(after) // 2 - 2} languages went from "
          f"{before['bits_per_byte']:.2f} to {after['bits_per_byte']:.2f} bits per byte.\n"
          f"Open report.html in {RUN_DIR}, {EVALS}, {ALLOCATION} and {SELECTED} in a browser, and the pictures in "
          f"{FRAMES}/sheets.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
