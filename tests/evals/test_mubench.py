"""MuBench's files read through `datasets`, from a local repository."""

import json

import pytest

from evals.mubench import MubenchConfig, main
from evals.tasks.alignment import align_items
from evals.tasks.task_files import Item, Task, find_tasks, write_items
from mlx_pretrain.errors import InputError


@pytest.fixture
def repository(tmp_path, monkeypatch) -> str:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    items = [Item(str(n), f"Frage {n}", ("ja", "nein", "vielleicht")[: 2 + n % 2], n % 2, " ") for n in range(5)]
    for mode in ("lighteval", "mix_2"):
        for language in ("de", "sw"):
            write_items(tmp_path / "hub", Task("SNLIDataset", mode), language, items)
    return str(tmp_path / "hub")


def test_files_are_the_same_afterwards(repository, tmp_path):
    out = tmp_path / "out"
    settings = {"output": str(out), "repository": repository, "names": ["SNLIDataset"], "modes": ["lighteval", "mix_2"],
                "languages": ["de", "sw"]}
    assert main(MubenchConfig(**settings)) == 4
    for path in out.rglob("*.jsonl"):
        source = tmp_path / "hub" / path.relative_to(out)
        assert [json.loads(line) for line in path.read_text().splitlines()] == [
            json.loads(line) for line in source.read_text().splitlines()]
    assert {task.mode: align_items(files).languages for task, files in find_tasks([f"{out}/*/*.jsonl"]).items()} == {
        "lighteval": ("de", "sw"), "mix_2": ("de", "sw")}
    (out / "SNLIDataset/mix_sw_2_test.jsonl").unlink()
    assert main(MubenchConfig(**settings)) == 1


@pytest.mark.parametrize("change, message", [
    ({"names": ["SNLI"]}, r"mubench\.names: SNLI: not one of ARCChallengeDataset"),
    ({"modes": ["cloze"]}, r"mubench\.modes: cloze"),
    ({"languages": ["de", "xx"]}, r"mubench\.languages: xx"),
    ({"languages": ["fr"]}, r"SNLIDataset/lighteval_fr_test\.jsonl: cannot be read"),
])
def test_what_is_not_there_is_named(repository, tmp_path, change, message):
    settings = {"output": str(tmp_path / "out"), "repository": repository, "names": ["SNLIDataset"],
                "languages": ["de"]}
    with pytest.raises(InputError, match=message):
        main(MubenchConfig(**settings | change))
    assert not (tmp_path / "out").exists()
