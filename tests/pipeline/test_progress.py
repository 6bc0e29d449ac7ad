"""A stage is done only as long as nothing that it depends on has changed."""

import json

import pytest

from pipeline.progress import Progress
from pipeline.stages import all_stages
from tests.pipeline.conftest import write_documents


def progress(config):
    stages = all_stages(config)
    return Progress(config, stages), {stage.name: stage for stage in stages}


def done(config):
    """Returns the names of the stages that are done, in order, for a process that reads the record anew."""
    record, stages = progress(config)
    return [name for name in stages if name in record.done()]


@pytest.fixture
def first_three(config):
    """The first three stages have run."""
    record, stages = progress(config())
    for name in ("hold_out", "tokenizer", "ngrams"):
        record.start(stages[name])
        (config().folder / stages[name].output).parent.mkdir(parents=True, exist_ok=True)
        (config().folder / stages[name].output).write_text("made")
        record.end(stages[name], 12.3)
    return config


def test_what_undoes_a_stage(first_three, tmp_path):
    config = first_three
    assert done(config()) == done(config(steps=7)) == ["hold_out", "tokenizer", "ngrams"]
    changed = {"tokenizer": {"train_tokenizer.model_type": "bpe"}}
    assert done(config(settings=changed)) == ["hold_out"]  # what follows a stage that runs is made again

    (tmp_path / "more.gin").write_text("train_tokenizer.model_type = 'bpe'\n")
    (tmp_path / "my.gin").write_text("include 'more.gin'\n")
    with_file = config(gin_files={"tokenizer": ["my.gin"]})
    assert done(with_file) == ["hold_out"]
    record, stages = progress(with_file)
    record.start(stages["tokenizer"])
    record.end(stages["tokenizer"], 1.0)
    assert "tokenizer" in done(with_file)
    (tmp_path / "more.gin").write_text("train_tokenizer.model_type = 'unigram'\n")  # included, not named
    assert "tokenizer" not in done(with_file)

    record, stages = progress(config())
    for name in ("tokenizer", "ngrams"):
        record.start(stages[name])
        record.end(stages[name], 1.0)
    assert done(config()) == ["hold_out", "tokenizer", "ngrams"]
    (tmp_path / "out/rater/ngrams.npz").unlink()
    assert done(config()) == ["hold_out", "tokenizer"]
    write_documents(tmp_path / "documents", "en", range(21))
    assert done(config()) == []


def test_a_stage_that_runs_again_undoes_those_after_it(first_three):
    record, stages = progress(first_three())
    record.start(stages["tokenizer"])
    assert done(first_three()) == ["hold_out"]  # also where the run is killed here
    record.end(stages["tokenizer"], 5.0)
    assert done(first_three()) == ["hold_out", "tokenizer"]


def test_a_refused_output_is_not_gone_on_with(first_three, tmp_path):
    """Else `overwrite` would take the run of other settings for an interrupted one, and leave it where it is."""
    changed = {"settings": {"tokenizer": {"train_tokenizer.model_type": "bpe"}}}
    record, stages = progress(first_three(**changed))
    assert record.has_output(stages["tokenizer"]) and not record.resumes(stages["tokenizer"])
    record.start(stages["tokenizer"])  # and its command refuses
    record, stages = progress(first_three(**changed, overwrite=True))
    assert not record.resumes(stages["tokenizer"]) and not record.start(stages["tokenizer"])
    record, stages = progress(first_three(**changed, overwrite=True))  # killed while it made it anew
    assert record.resumes(stages["tokenizer"])


def test_times_are_those_of_the_last_whole_run(first_three, tmp_path):
    record, stages = progress(first_three())
    assert record.estimate(stages["tokenizer"]) == 12.3
    assert not record.start(stages["tokenizer"])
    record, stages = progress(first_three())  # killed, and started again
    assert record.start(stages["tokenizer"])  # goes on
    record.end(stages["tokenizer"], 0.5)
    assert not record.start(stages["rater"])
    record, stages = progress(first_three())
    record.start(stages["tokenizer"])
    assert not record.start(stages["rater"])  # as a stage before it has run since
    assert json.loads((tmp_path / "out/pipeline.json").read_text())["seconds"]["tokenizer"] == 12.3
    estimates = [progress(first_three(steps=steps))[0].estimate(stages["pretrain"]) for steps in (10_000, 20_000)]
    assert estimates[1] == pytest.approx(2 * estimates[0])
