"""metrics.jsonl after crashes, and the TensorBoard files beside it."""

import json
import math

import pytest

from mlx_pretrain.errors import InputError
from mlx_pretrain.files import read_jsonl
from mlx_pretrain.training.metric_writer import METRICS, MetricWriter


def lines(folder):
    return [record for _, record in read_jsonl(folder / METRICS)]


def test_a_resumed_run_forgets_what_it_does_again(tmp_path):
    writer = MetricWriter(tmp_path, 0)
    for step in (1, 2, 3):
        writer.write(step, "train", {"loss": 1.0 / step})
    writer.close()
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": 4, "los')  # kill -9 in the middle of a line
    writer = MetricWriter(tmp_path, 2)
    writer.write(3, "train", {"loss": 5.0})
    writer.close()
    assert [(r["step"], r["loss"]) for r in lines(tmp_path)] == [(1, 1.0), (2, 0.5), (3, 5.0)]


def test_non_finite_values_are_valid_json(tmp_path):
    writer = MetricWriter(tmp_path, 0)
    writer.write(1, "train", {"loss": math.nan})
    writer.close()
    assert json.loads((tmp_path / METRICS).read_text())["loss"] is None


def test_tensorboard_reads_the_scalars(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = MetricWriter(tmp_path, 0)
    writer.write(7, "eval", {"loss/aa": 2.5})
    writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("eval/loss/aa")] == [(7, 2.5)]


def test_damage_before_the_last_line_is_named(tmp_path):
    (tmp_path / METRICS).write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(InputError, match=rf"{METRICS}:2"):
        MetricWriter(tmp_path, 5)
