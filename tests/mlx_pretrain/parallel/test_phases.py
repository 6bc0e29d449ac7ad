"""Phases of tasks: whoever does them, and however often they are interrupted, the output is the same, byte for byte."""

import dataclasses
import json
import os
import pathlib

import pytest
from etils import epath

from mlx_pretrain.errors import InputError
from mlx_pretrain.parallel import cluster, phases
from tests.mlx_pretrain.parallel import counting
from tests.mlx_pretrain.parallel.counting import CountConfig, main

NAMES = [f"{number}.txt" for number in range(5)]
ALL = [*NAMES, "a", "b", "c", "all"]


@pytest.fixture
def config(tmp_path) -> CountConfig:
    (tmp_path / "in").mkdir()
    for number, name in enumerate(NAMES):
        (tmp_path / "in" / name).write_text("a aa b " * number + "c d")
    counting.done.clear()
    return CountConfig(str(tmp_path / "in"), str(tmp_path / "out"))


@pytest.fixture
def shard():
    yield cluster.take_shard
    cluster.take_shard(None)


def contents(folder: os.PathLike) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in pathlib.Path(folder).rglob("*") if path.is_file()}


@pytest.fixture
def alone(config, tmp_path) -> dict[str, bytes]:
    """The output of one process."""
    assert main(dataclasses.replace(config, output=str(tmp_path / "alone")))
    assert counting.done == ALL and not (tmp_path / ".alone.parts").exists()
    counting.done.clear()
    return contents(tmp_path / "alone")


def test_one_process_makes_the_whole_output_and_keeps_it(config, alone, tmp_path):
    assert set(alone) == {"report.json", *(f"words/{name}.json" for name in NAMES),
                          *(f"letters/{letter}.json" for letter in "abc")}
    report = json.loads(alone["report.json"])
    assert report["words"] == 40 and set(report["provenance"]["inputs"]) == set(NAMES)
    assert json.loads(alone["letters/a.json"]) == {"a": 10, "aa": 10}
    assert not main(dataclasses.replace(config, output=str(tmp_path / "alone"))) and not counting.done


def test_local_processes_make_the_same(config, alone):
    assert main(config, workers=2)
    assert not counting.done and contents(config.output) == alone


def test_shards_make_the_same_phase_by_phase(config, alone, shard, capsys):
    def run(number: int) -> list[str]:
        counting.done.clear()
        shard((number, 2))
        assert not main(config) and not pathlib.Path(config.output).exists()
        return list(counting.done)

    assert run(1) == NAMES[1::2] and run(1) == []
    assert "count (phase 1 of 3): 3 of 5 tasks are left to other shards" in capsys.readouterr().err
    assert run(0) == [*NAMES[::2], "a", "c"]  # goes on when the phase before is complete
    assert run(1) == ["b"]
    assert run(0) == ["all"] and run(0) == []
    assert "all tasks are done; the same command without --shard" in capsys.readouterr().err
    shard(None)
    assert main(config) and counting.done == []
    assert contents(config.output) == alone


def test_a_shard_may_wait_for_the_others(config, alone, shard, monkeypatch):
    """Here the other's work appears during the first sleep of each phase."""
    def other(_: float) -> None:
        monkeypatch.setattr(phases, "_wait", 0.0)
        cluster.take_shard((1, 2))
        main(config)
        cluster.take_shard((0, 2))
        monkeypatch.setattr(phases, "_wait", 60.0)

    monkeypatch.setattr(phases.time, "sleep", other)
    shard((0, 2))
    monkeypatch.setattr(phases, "_wait", 60.0)
    main(config)
    assert sorted(counting.done) == sorted(ALL)
    shard(None)
    assert main(config) and contents(config.output) == alone


@pytest.mark.parametrize("fails", ALL)
def test_after_a_failure_it_goes_on_with_what_is_left(config, alone, fails):
    with pytest.raises(InputError, match=f"{fails} fails"):
        main(dataclasses.replace(config, fails=fails))
    assert not pathlib.Path(config.output).exists()
    counting.done.clear()
    assert main(config) and counting.done == ALL[ALL.index(fails):]
    assert contents(config.output) == alone


def test_a_task_whose_input_has_changed_is_done_again_and_all_that_follows(config):
    with pytest.raises(InputError):
        main(dataclasses.replace(config, fails="all"))
    (pathlib.Path(config.folder) / "1.txt").write_text("b b")
    counting.done.clear()
    assert main(config) and counting.done == ["1.txt", "a", "b", "c", "all"]
    assert json.loads(contents(config.output)["report.json"])["words"] == 37


def test_files_of_tasks_that_are_no_longer_wanted_stay_out(config):
    with pytest.raises(InputError):
        main(dataclasses.replace(config, fails="all"))
    (pathlib.Path(config.folder) / "4.txt").unlink()
    assert main(config)
    assert set(contents(pathlib.Path(config.output, "words"))) == {f"{name}.json" for name in NAMES[:4]}


def test_a_file_that_vanishes_between_phases_is_made_again(config, alone, tmp_path):
    with pytest.raises(InputError):
        main(dataclasses.replace(config, fails="a"))
    (tmp_path / ".out.parts/files/counts/3.txt.json").unlink()
    counting.done.clear()
    assert main(config) and counting.done == ["3.txt", "a", "b", "c", "all"]
    assert contents(config.output) == alone


def test_a_file_that_vanishes_within_a_phase_is_named(config, tmp_path, monkeypatch):
    with pytest.raises(InputError):
        main(dataclasses.replace(config, fails="a"))
    left = phases.Plan.left

    def left_then_gone(*arguments):
        tasks = left(*arguments)
        (tmp_path / ".out.parts/files/counts/3.txt.json").unlink(missing_ok=True)
        return tasks

    monkeypatch.setattr(phases.Plan, "left", left_then_gone)
    with pytest.raises(InputError, match=r"counts/3\.txt\.json: a file of the phases before is gone; run the command"):
        main(config)


def test_an_input_that_changes_while_it_is_read_is_named(config, monkeypatch):
    write = counting.write_json

    def write_and_change(path, value):
        write(path, value)
        (pathlib.Path(config.folder) / "2.txt").write_text("other")

    monkeypatch.setattr(counting, "write_json", write_and_change)
    with pytest.raises(InputError, match=r"2\.txt: changed while it was read; run the command again"):
        main(config)


def test_other_settings_are_refused_and_replaced_when_asked(config, alone, monkeypatch):
    main(config)
    monkeypatch.setattr(counting, "LETTERS", "ab")
    with pytest.raises(InputError, match=r'exists, made with settings letters = "abc" \(now "ab"\)'):
        main(config)
    assert contents(config.output) == alone
    assert main(dataclasses.replace(config, overwrite=True))
    assert set(contents(pathlib.Path(config.output, "letters"))) == {"a.json", "b.json"}


def test_a_shard_does_not_work_for_an_output_that_stays(config, shard, tmp_path, monkeypatch, capsys):
    main(config)
    before = contents(config.output)
    (pathlib.Path(config.folder) / "1.txt").write_text("b b")  # is compared by the command without a shard
    counting.done.clear()
    shard((0, 2))
    assert not main(config) and not counting.done
    assert "out: is there already; the same command without --shard compares its files" in capsys.readouterr().err
    with monkeypatch.context() as changed:
        changed.setattr(counting, "LETTERS", "ab")
        with pytest.raises(InputError, match=r'exists, made with settings letters = "abc" \(now "ab"\)'):
            main(config)
    assert not counting.done and not (tmp_path / ".out.parts").exists()
    assert not main(dataclasses.replace(config, overwrite=True)) and counting.done == NAMES[::2]
    assert contents(config.output) == before


def test_a_plan_may_know_damage_and_earlier_layouts_of_its_record(config, alone, monkeypatch):
    def plan_with(**fields):
        monkeypatch.setattr(counting, "make_plan", lambda one: dataclasses.replace(make_plan(one), **fields))

    make_plan = counting.make_plan
    main(config)
    plan_with(damage=lambda: None)
    assert not main(config)
    counting.done.clear()
    plan_with(damage=lambda: "a page is torn")
    assert main(config) and counting.done == ALL and contents(config.output) == alone
    report = pathlib.Path(config.output, "report.json")
    content = json.loads(report.read_text())
    report.write_text(json.dumps({"origin": content.pop("provenance"), **content}))
    plan_with()
    with pytest.raises(InputError, match="has no record of what it was made from"):
        main(config)
    plan_with(recorded=lambda: json.loads(report.read_text())["origin"])
    assert not main(config)


def test_a_move_that_was_killed_is_completed(config, alone, monkeypatch):
    with monkeypatch.context() as killed:
        killed.setattr(phases, "replace_folder", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            main(config)
    assert not pathlib.Path(config.output).exists()
    counting.done.clear()
    assert not main(config) and not counting.done and contents(config.output) == alone


def test_workers_that_see_another_configuration_are_refused(config):
    plan = counting.make_plan(config)
    address = phases.Address(counting.__name__, "make_plan", phases.to_text(config), "another")
    with pytest.raises(InputError, match="this process sees other settings or files"):
        phases.run_task(address, "count", "0.txt", plan.keys["count"]["0.txt"])


def test_an_output_on_an_object_store_is_the_same(config, alone, gcs, shard, monkeypatch):
    output = epath.Path("gs://bucket/counted/out")
    remote = dataclasses.replace(config, output=str(output))
    shard((0, 2))
    assert not main(remote)
    shard(None)
    assert main(remote) and counting.done.count("0.txt") == 1

    def written() -> dict[str, bytes]:
        return {name.removeprefix("counted/"): one.content for name, one in gcs.buckets["bucket"].items()
                if name.startswith("counted/")}

    assert written() == {f"out/{name}": content for name, content in alone.items()}

    def move_one(source, target, last):
        (target / "words/3.txt.json").write_bytes((source / "words/3.txt.json").read_bytes())
        (source / "words/3.txt.json").unlink()
        raise KeyboardInterrupt

    # Objects are moved one by one: a killed process leaves some at the old place, and no marker at the new one.
    (output / "report.json").unlink()
    with monkeypatch.context() as killed:
        killed.setattr(phases, "move_folder", move_one)
        with pytest.raises(KeyboardInterrupt):
            main(dataclasses.replace(remote, overwrite=True))
    assert "out/report.json" not in written()
    assert not main(remote) and written() == {f"out/{name}": content for name, content in alone.items()}
