"""The sink for Weights & Biases, with its real client, without a network."""

import json
import math
import pathlib
import struct
import subprocess
import sys

import pytest

from mlx_pretrain.errors import InputError
from mlx_pretrain.files import write_json
from mlx_pretrain.training.metric_writer import MetricWriter

wandb = pytest.importorskip("wandb")

from wandb.proto.wandb_internal_pb2 import Record  # noqa: E402

from mlx_pretrain.training.weights_and_biases import WeightsAndBiases  # noqa: E402


def records(path: pathlib.Path) -> list[Record]:
    """Reads a .wandb file: a LevelDB log after 7 bytes, in blocks of 32 KiB, with a header before each part."""
    content, whole, parts, start = path.read_bytes(), [], b"", 7
    while start + 7 <= len(content):
        left = 32768 - start % 32768
        if left < 7:
            start += left
            continue
        size, part_type = struct.unpack("<HB", content[start + 4 : start + 7])
        parts += content[start + 7 : start + 7 + size]
        start += 7 + size
        if part_type in (1, 4):  # a whole record, or its last part
            whole.append(Record.FromString(parts))
            parts = b""
    return whole


def test_a_restart_goes_on_with_the_same_run(tmp_path):
    write_json(tmp_path / "run.json", {"seed": 3})
    offline = lambda run_dir, step: WeightsAndBiases(run_dir, step, project="tests", mode="offline")  # noqa: E731
    for first in (1, 3):
        writer = MetricWriter(tmp_path, first - 1, [offline])
        for step in (first, first + 1):
            writer.write(step, "train", {"loss": 1 / step})
        writer.write(first + 1, "eval", {"loss/aa": math.nan})
        writer.close()
    files = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    run_id = json.loads((tmp_path / "wandb.json").read_text())["id"]
    assert [path.name for path in files] == [f"run-{run_id}.wandb"] * 2
    history = {}
    for path in files:
        log = records(path)
        [run] = [record.run for record in log if record.WhichOneof("record_type") == "run"]
        assert (run.run_id, run.project, run.display_name) == (run_id, "tests", tmp_path.name)
        assert {item.key: item.value_json for item in run.config.update}["seed"] == "3"
        for record in log:
            if record.WhichOneof("record_type") == "history":
                row = {item.key or "/".join(item.nested_key): json.loads(item.value_json)
                       for item in record.history.item}
                history[record.history.step.num] = {k: v for k, v in row.items() if not k.startswith("_")}
    assert history[1] == {"train/loss": 1.0} and history[3] == {"train/loss": pytest.approx(1 / 3)}
    assert history[4]["train/loss"] == 0.25 and math.isnan(history[4]["eval/loss/aa"])
    assert sorted(history) == [1, 2, 3, 4]


def test_offline_files_of_a_run_on_gs_are_refused():
    """They would lie in a temporary folder of a machine that may be gone."""
    with pytest.raises(InputError, match="mode = 'offline': writes to local run folders alone, not to gs://b/run"):
        WeightsAndBiases("gs://b/run", -1, mode="offline")


def test_wandb_is_imported_on_request_alone():
    code = ("import sys, gin, mlx_pretrain.train\n"
            "assert 'mlx_pretrain.training.weights_and_biases' not in sys.modules\n"
            "from mlx_pretrain.configuration.gin_files import parse_gin\n"
            "parse_gin(['gin/runs/weights_and_biases.gin'], ['WeightsAndBiases.mode = \"offline\"'])\n"
            "sinks = gin.query_parameter('train.sinks')\n"
            "assert [sink.configurable.name for sink in sinks] == ['WeightsAndBiases']\n"
            "assert 'mlx_pretrain.training.weights_and_biases' in sys.modules and 'wandb' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True)
