"""The examples of docs/training.md run."""

import json
import pathlib
import re

from mlx_pretrain.training.metric_writer import read_metrics

PAGE = pathlib.Path(__file__).parents[3] / "docs" / "training.md"


def test_the_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "example"}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.S):
        exec(compile(block, str(PAGE), "exec"), names)
    stopped = json.loads(pathlib.Path("regression/run.json").read_text())["stopped"]
    assert stopped["reason"] == "the held-out loss is below 0.1" and stopped["step"] % 10 == 0
    lines = [line for line in read_metrics("regression") if line["kind"] == "train"]
    assert pathlib.Path("regression/losses.txt").read_text().splitlines() == [
        f"{line['step']} {line['loss']:.4f}" for line in lines]
