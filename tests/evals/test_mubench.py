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


def test_files_of_another_revision_are_refused(repository, tmp_path, capsys):
    settings = {"output": str(tmp_path / "out"), "repository": repository, "names": ["SNLIDataset"]}
    assert main(MubenchConfig(**settings, languages=["de"])) == 1
    path = tmp_path / "out/SNLIDataset/lighteval_de_test.jsonl"
    content = path.read_bytes()
    assert main(MubenchConfig(**settings, languages=["de", "sw"])) == 1  # a further language
    path.write_bytes(content[:-9])
    assert main(MubenchConfig(**settings, languages=["de"])) == 1 and path.read_bytes() == content
    assert f"{path}: damaged (not the file that its record describes), made again" in capsys.readouterr().err
    other = {"languages": ["de"], "revision": "v2"}
    with pytest.raises(InputError, match=r'made with settings revision = null \(now "v2"\); set overwrite=True'):
        main(MubenchConfig(**settings, **other))
    assert main(MubenchConfig(**settings, **other, overwrite=True)) == 1
    # A file without a record, as earlier versions wrote them.
    path.with_name("made_from.lighteval_de_test.json").unlink()
    with pytest.raises(InputError, match=r"has no record of what it was made from; set overwrite=True to replace it"):
        main(MubenchConfig(**settings, **other))
    assert path.read_bytes() == content
    main(MubenchConfig(**settings, **other, overwrite=True))
    assert path.with_name("made_from.lighteval_de_test.json").exists()


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
