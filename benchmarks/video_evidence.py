"""Runs Frame-Voyager's evidence from nothing: videos, Video-LLMs, labels, runs of Frame-Voyager, the table.

    python benchmarks/video_evidence.py --world=moments --output=DIR [--voyager_seeds 5 1 1]
        [--set train_voyager.rank=0 ...] [--name=voyager] [--evaluate=False] [--quick]

Each step is a command of the project with a gin file of its own in DIR/gin, so an interrupted run goes on where it was,
and a second one with other settings of Frame-Voyager (`--set`, under another `--name`) uses the same Video-LLMs and
labels. DIR/seconds.json has the time of each command that did something. `--quick`: tiny numbers, does it run?
"""

import argparse
import json
import pathlib
import subprocess
import sys
import time

QUICK = {
    "synthetic": {"synthetic.llm_videos": 12, "synthetic.label_videos": 8, "synthetic.validation_videos": 4,
                  "synthetic.test_videos": 4},
    "train_towers": {"STEPS": 4, "train_towers.batch_size": 16},
    "train": {"STEPS": 4, "train_video.batch_size": 4, "train_video.eval_questions": 8},
    "label": {"label.max_combinations": 12},
    "train_voyager": {"STEPS": 4},
    "evaluate": {"evaluate_frames.limit": 6, "evaluate_frames.resamples": 50},
}


class Runner:
    """Runs commands with gin files that it writes."""

    def __init__(self, output: pathlib.Path, world: str, quick: bool):
        """Prepares the folder of a world."""
        self.output, self._quick = output, quick
        (output / "gin").mkdir(parents=True, exist_ok=True)
        self._seconds = output / "seconds.json"
        sets = {"LLM_QUESTIONS": "llm.jsonl", "LLM_CAPTIONS": "llm_captions.jsonl", "LABEL_QUESTIONS": "labels.jsonl",
                "VALIDATION": "validation.jsonl", "VALIDATION_CAPTIONS": "validation_captions.jsonl",
                "TEST": "test.jsonl", "TOKENIZER": "tokenizer.model"}
        self._macros = {"VIDEOS": f"{output}/videos", "FRAMES": f"{output}/frames", "TOWERS": f"{output}/towers",
                        **{macro: f"{output}/videos/{name}" for macro, name in sets.items()}}
        self._world = [f"gin/video/{world}.gin"] if world != "moments" else []

    def __call__(self, command: str, name: str, **settings) -> None:
        """Runs `python -m video.<command>`; `name` is that of its gin file, `settings` parameters and macros."""
        path = self.output / "gin" / f"{name}.gin"
        everything = {**self._macros, **settings, **(QUICK.get(command, {}) if self._quick else {})}
        path.write_text("".join([
            *(f"include '{file}'\n" for file in (f"gin/video/{command}.gin", *self._world)),
            *(f"{key} = {value if str(value)[:1] in ('@', '[') else repr(value)}\n"
              for key, value in everything.items())]))
        started = time.monotonic()
        subprocess.run([sys.executable, "-m", f"video.{command}", f"--gin_file={path}"], check=True)
        seconds = json.loads(self._seconds.read_text()) if self._seconds.exists() else {}
        spent = time.monotonic() - started
        if spent > 10 or name not in seconds:  # else it found its output whole
            seconds[name] = round(seconds.get(name, 0) + spent)
            self._seconds.write_text(json.dumps(seconds, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", default="moments", choices=["moments", "stories"])
    parser.add_argument("--output", required=True, type=pathlib.Path)
    parser.add_argument("--voyager_seeds", type=int, nargs="+", default=[5, 1, 1],
                        help="runs of Frame-Voyager for each of the Video-LLMs")
    parser.add_argument("--set", action="append", default=[], help="a parameter of Frame-Voyager's training")
    parser.add_argument("--name", default="voyager", help="name of Frame-Voyager's runs, for other settings")
    parser.add_argument("--evaluate", default=True, type=lambda text: text != "False")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    output, name = arguments.output.absolute(), arguments.name
    run = Runner(output, arguments.world, arguments.quick)
    run("synthetic", "synthetic")
    run("decode", "decode")
    run("train_towers", "towers")
    parts, trials = [], []
    for llm_seed, voyager_seeds in enumerate(arguments.voyager_seeds):
        llm = f"{output}/llm{llm_seed}"
        run("train", f"llm{llm_seed}", VIDEO_LLM=llm, **{"train_video.seed": llm_seed})
        stores = {split: f"{output}/{split}{llm_seed}" for split in ("labels", "validation")}
        for split in stores:
            run("label", f"{split}{llm_seed}", VIDEO_LLM=llm, LABELS=stores[split],
                **{"label.questions": f"{output}/videos/{split}.jsonl"})
        runs = [f"{output}/{name}{llm_seed}_{seed}" for seed in range(voyager_seeds)]
        extra = dict(text.split("=", 1) for text in arguments.set)
        for seed, folder in enumerate(runs):
            run("train_voyager", pathlib.Path(folder).name, VIDEO_LLM=llm, LABELS=stores["labels"],
                VALIDATION_LABELS=stores["validation"], VOYAGER=folder,
                **{"train_voyager.seed": seed}, **{key: json.loads(value) for key, value in extra.items()})
        trials.append(f"@seed{llm_seed}/Trial()")
        parts.append({f"seed{llm_seed}/Trial.name": f"seed{llm_seed}", f"seed{llm_seed}/Trial.video_llm": llm,
                      f"seed{llm_seed}/Trial.voyagers": f"{runs}", f"seed{llm_seed}/Trial.towers": f"{output}/towers"})
    if arguments.evaluate:
        settings = {key: value for part in parts for key, value in part.items()}
        run("evaluate", f"evaluate_{name}", **settings, **{
            "evaluate_frames.trials": f"[{', '.join(trials)}]", "EVALUATION": f"{output}/evaluation_{name}"})
        results = json.loads((output / f"evaluation_{name}/results.json").read_text())
        print(json.dumps({"questions": results["questions"], "trials": results["trials"], "accuracy": {
            f"{setting['frames']} of {setting['candidates']}": {
                method: round(row["accuracy"]["all"]["value"], 4) for method, row in setting["methods"].items()}
            for setting in results["settings"]}}))


if __name__ == "__main__":
    main()
