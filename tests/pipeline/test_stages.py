"""The stages: their gin files fit their commands, and follow from the settings."""

import importlib
import json
import re

import gin
import pytest

from mlx_pretrain.configuration.gin_files import parse_gin
from mlx_pretrain.errors import InputError
from pipeline.__main__ import describe_documents
from pipeline.progress import gin_text
from pipeline.stages import all_stages


def test_the_gin_file_of_every_stage_fits_its_command(config, tmp_path):
    """Every parameter exists and has the right type, and every macro is read; tests/e2e runs the commands."""
    pipeline = config(prompts={"de": "Das"}, videos=True, climb=True)
    stages = all_stages(pipeline)
    assert len({stage.name for stage in stages}) == len(stages) == 31
    stages += [stage for stage in all_stages(config(climb=False)) if stage.name == "rates"]
    for stage in stages:
        importlib.import_module(stage.module)
        path = tmp_path / "stage.gin"
        path.write_text(gin_text(pipeline, stage))
        gin.clear_config()
        try:
            parse_gin([str(path)], [f"{stage.overwrite} = True"] if stage.overwrite else [])
        finally:
            gin.clear_config()


def names(config):
    return [stage.name for stage in all_stages(config)]


def test_settings_decide_which_stages_there_are(config, tmp_path):
    assert {"hold_out", "rater", "decontaminate", "control_pretrain"} < set(names(config()))
    assert "videos" not in names(config())
    assert "rates" in names(config()) and "proxies" not in names(config())  # so little text
    assert "rates" not in names(config(climb=True)) and "proxies" in names(config(climb=True))
    assert not {"control_select", "control_evaluate"} & set(names(config(control=False)))
    assert not {"ngrams", "pairs", "rater"} & set(names(config(rater="run")))
    assert not {"decontaminate", "evaluate"} & set(names(config(tasks=[])))
    for split in ("train", "heldout"):
        (tmp_path / "both" / split).mkdir(parents=True)
        (tmp_path / "both" / split / "xx.txt").write_text("text")
    both = config(documents="both", files="{split}/{language}.*")
    assert "hold_out" not in names(both)
    assert "evaluate" not in names(both)  # there are no tasks in xx


def test_the_plan_says_which_documents_are_left_out_and_not_evaluated(config, tmp_path):
    for path in ("vi/00.txt", "vi/01.txt", "web/fi/a.parquet"):
        (tmp_path / "documents" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "documents" / path).write_text("text")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/x_de_test.jsonl").write_text("{}")
    lines = [*describe_documents(config(tasks=["tasks/*.jsonl"], output="documents/web"))]
    assert re.fullmatch(r"Documents: de \(1 file, [\d.]+kB\), en \(1 file, [\d.]+kB\)", lines[0]), lines
    assert lines[1:] == [  # without those of the output
        "Left out: 2 files of documents such as documents/vi/00.txt, which no pattern of pipeline.files matches; "
        "['{language}.*', '{language}/*.txt'] would",
        "Not evaluated, as there are no tasks in them: en"]


def test_other_prompts_make_no_other_stage_run_again(config):
    assert names(config(videos=True, prompts={"de": "Das"}))[-2:] == ["generate", "report"]


def text_of(config, name):
    (stage,) = (stage for stage in all_stages(config) if stage.name == name)
    return gin_text(config, stage)


def test_keys_of_the_records_hold_for_the_users_own_files(config, tmp_path):
    """As an error about them says: set Corpus.text_key."""
    gin.bind_parameter("Corpus.text_key", "content")
    try:
        held_out = config()
        assert "\nCorpus.text_key = 'content'\n" in text_of(held_out, "hold_out")
        assert "text_key" not in text_of(held_out, "score") + text_of(held_out, "export")
        for split in ("train", "heldout"):
            (tmp_path / "both" / split).mkdir(parents=True)
            (tmp_path / "both" / split / "de.jsonl").write_text('{"content": "text"}\n')
        both = config(documents="both", files="{split}/{language}.*")
        assert "\nCorpus.text_key = 'content'\n" in text_of(both, "score")
        exported = text_of(both, "export")
        assert "heldout/Corpus.text_key = 'content'" in exported and "kept/Corpus.text_key" not in exported
    finally:
        gin.clear_config()


def test_settings_of_a_stage_replace_the_pipelines(config):
    text = text_of(config(settings={"select": {"select.fraction": 0.1, "select.corpus": "@Corpus()"}},
                          gin_files={"select": ["my.gin"]}), "select")
    assert text.index("include 'gin/raters/select.gin'") < text.index("include 'my.gin'") < text.index("SELECTED")
    assert text.count("select.fraction") == text.count("select.fraction = 0.1\n") == 1
    assert text.endswith("select.corpus = @Corpus()\n")


def test_the_control_gets_as_many_tokens_as_were_kept(config, tmp_path):
    assert "select.tokens" not in text_of(config(), "control_select")
    (tmp_path / "out/selected").mkdir(parents=True)
    (tmp_path / "out/selected/selection.json").write_text(json.dumps(
        {"languages": [{"language": "de", "kept_tokens": 70}, {"language": "en", "kept_tokens": 90}]}))
    assert "select.tokens = {'de': 70, 'en': 90}" in text_of(config(), "control_select")


def test_unknown_names_and_missing_files_are_errors(config):
    for field, value in (("settings", {"selct": {}}), ("gin_files", {"selct": []}), ("only", ["selct"])):
        with pytest.raises(InputError, match=rf"pipeline.{field}: no stage 'selct'; is select meant\?; there is "):
            all_stages(config(**{field: value}))
    with pytest.raises(InputError, match=r"only: no stage 'videos'; there is hold_out, tokenizer"):
        all_stages(config(only=["videos"]))  # pipeline.videos is not set
    with pytest.raises(InputError, match=r"none/.*: no file matches; pipeline.tasks"):
        config(tasks=["none/*_test.jsonl"])
    with pytest.raises(InputError, match="elsewhere"):
        all_stages(config(documents="elsewhere"))
    with pytest.raises(InputError, match="keep = 0"):
        config(keep=0)


def test_languages_that_records_alone_name(config, tmp_path):
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed/all.jsonl").write_text('{"id": "a", "lang": "de", "text": "x"}\n')
    mixed = {"documents": "mixed", "files": "*.jsonl"}
    assert "evaluate" not in names(config(**mixed))
    chosen = config(**mixed, languages=["de"])
    assert "evaluate" in names(chosen) and "hold_out" in names(chosen)
    assert "Corpus.languages" not in text_of(chosen, "hold_out")
    assert "Corpus.languages = ['de']" in text_of(chosen, "tokenizer")
    assert "Corpus.languages = ['de']" in text_of(chosen, "score")
    assert "kept/Corpus.languages" not in text_of(chosen, "export")
