"""The parts of a run's time sum to its wall time, whatever happened to its processes."""

import contextlib
import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_pretrain.errors import InputError
from mlx_pretrain.training.goodput import PARTS, Clock, open_record, read_goodput


def test_a_clock_counts_one_part_at_a_time(tmp_path):
    clock = Clock()
    clock.switch("step")
    before, start = clock.now(), time.perf_counter()
    with clock.timed("evaluation"):
        time.sleep(0.03)
        with clock.timed("compile"):
            time.sleep(0.02)
    time.sleep(0.01)
    spent, elapsed = clock.now(), time.perf_counter() - start
    grown = {part: seconds - before.get(part, 0.0) for part, seconds in spent.items()}
    assert grown["compile"] >= 0.02 and grown["evaluation"] >= 0.03 and grown["step"] >= 0.01
    assert sum(grown.values()) == pytest.approx(elapsed, abs=2e-3)
    assert sum(spent.values()) == pytest.approx(time.time() - clock.started, abs=0.05)


# A process: (idle before it, start, [(data, step) seconds of each step], steps between checkpoints, steps between
# lines, killed).
PROCESSES = st.lists(
    st.tuples(
        st.floats(0, 50), st.floats(0.1, 9), st.lists(st.tuples(st.floats(0, 1), st.floats(0.01, 2)), max_size=25),
        st.integers(1, 7), st.integers(1, 4),
    ),
    min_size=1, max_size=6,
)


@given(PROCESSES)
def test_parts_sum_to_wall_time_and_lost_steps_are_found(tmp_path_factory, processes):
    path = tmp_path_factory.mktemp("run") / "goodput.jsonl"
    now, saved = 1e9, 0
    kept_seconds: dict[int, float] = {}  # step -> seconds of steps and data that count
    all_seconds = idle = 0.0
    first, last_line, lines = None, None, []
    for pause, start, steps, checkpoint_every, log_every in processes:
        now += pause
        if last_line is not None:
            idle += now - last_line
        first = now if first is None else first
        step, total = saved, {"start": start, "data": 0.0, "step": 0.0}
        kept_seconds = {s: x for s, x in kept_seconds.items() if s <= saved}
        process = {"process": now, "first_step": saved}
        now += start
        lines.append({**process, "time": now, "step": step, "seconds": dict(total)})
        last_line = now
        recorded = dict(kept_seconds)
        for data, compute in steps:
            step, now = step + 1, now + data + compute
            total["data"] += data
            total["step"] += compute
            kept_seconds[step] = data + compute
            if step % checkpoint_every == 0:
                saved = step
            # A checkpoint comes with a line, as in the trainer.
            if step % log_every == 0 or step % checkpoint_every == 0:
                lines.append({**process, "time": now, "step": step, "seconds": dict(total)})
                last_line, recorded = now, dict(kept_seconds)
        kept_seconds = recorded  # the rest was never written down
        all_seconds += sum(lines[-1]["seconds"][part] for part in ("data", "step"))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    goodput = read_goodput(path)
    assert goodput.processes == len(processes)
    assert goodput.wall_s == pytest.approx(last_line - first)
    assert sum(goodput.seconds.values()) == pytest.approx(goodput.wall_s, rel=1e-6, abs=1e-6)
    assert min(goodput.seconds.values()) >= -1e-6
    assert goodput.seconds["between"] == pytest.approx(idle, abs=1e-5)
    kept = sum(kept_seconds.values())
    assert goodput.seconds["step"] + goodput.seconds["data"] == pytest.approx(kept, abs=1e-5)
    assert goodput.seconds["repeated"] == pytest.approx(all_seconds - kept, abs=1e-5)


def test_half_a_line_of_a_killed_process_is_removed(tmp_path):
    path, clock = tmp_path / "goodput.jsonl", Clock()
    for _ in range(2):
        with contextlib.closing(open_record(path)) as file:
            clock.record(file, 1, 0)
        with path.open("a") as file:
            file.write('{"process": 1')
    assert path.read_text().count("\n") == 2
    assert read_goodput(path).processes == 1
    assert set(read_goodput(path).seconds) == set(PARTS)


def test_bad_records_name_the_line(tmp_path):
    path = tmp_path / "goodput.jsonl"
    assert read_goodput(path) is None
    path.write_text('{"process": 1, "time": 2, "step": 3, "first_step": 0, "seconds": {"step": "x"}}\n')
    with pytest.raises(InputError, match=r"goodput\.jsonl:1: not a line of a goodput record"):
        read_goodput(path)
