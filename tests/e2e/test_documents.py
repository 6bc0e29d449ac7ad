"""Commands over documents that are killed, start twice or find the disk full: in the end the bytes are the same."""

import json
import lzma
import pathlib
import random
import resource
import shutil
import signal
import time

import pytest

from data_mixtures.tokenizer import train_model
from tests.e2e.conftest import REPOSITORY, run, started
from tests.raters.rated import write_documents, write_scores

STAGES = {  # stage -> macro of its output, further flags
    "languages": ("MISLABELLED", "--gin.languages.write_documents=True"),
    "duplicates": ("DUPLICATES", "--gin.duplicates.write_documents=True"),
    "decontaminate": ("CONTAMINATED", "--gin.ITEMS=['items.jsonl']"),
    "select": ("SELECTED", "--gin.SCORES=scores", "--gin.select.fraction=0.4"),
    "export": ("TOKEN_STORE", "--gin.DOCUMENTS=.", "--gin.Corpus.files={split}/{language}/*.jsonl",
               "--gin.Corpus.splits=['corpus']", "--gin.TOKENIZER=tokenizer.model", "--gin.SEQUENCE_LENGTH=64",
               "--gin.export_tokens.group_bytes=40000", "--gin.export_tokens.shuffle_seed=1",
               "--gin.export_tokens.bucket_bytes=100000"),
}
MARKERS = {"select": "selection.json", "export": "manifest.json"}  # others: report.json
WAYS = ("alone", "workers", "shards", "beam")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> pathlib.Path:
    """Twelve files of sample text in two languages, with documents to remove, and evaluation items."""
    folder = tmp_path_factory.mktemp("documents")
    for language, other in (("en", "de"), ("de", "en")):
        with lzma.open(REPOSITORY / f"samples/text/train/{language}.jsonl.xz", "rt") as lines:
            records = [json.loads(line) | {"lang": language} for line, _ in zip(lines, range(60))]
        for number in range(6):
            part = records[10 * number : 10 * number + 10]
            part += [records[0] | {"id": f"copy{number}"}, records[number] | {"id": "wrong", "lang": other}]
            write_documents(folder / f"corpus/{language}/{number}.jsonl", part)
            write_scores(folder / "scores", f"{language}/{number}.jsonl", part, [len(one["text"]) % 97 for one in part])
    write_documents(folder / "items.jsonl", [{"id": "leak", "text": records[7]["text"][:200]}])
    (folder / "tokenizer.model").write_bytes(train_model((record["text"] for record in records), {
        "model_type": "bpe", "vocab_size": 400, "character_coverage": 1.0, "max_sentence_bytes": 9999,
        "num_threads": 1}))
    return folder


def flags(stage: str, output: str, *more: str) -> list[str]:
    macro, *settings = STAGES[stage]
    if stage == "export":
        return ["data_mixtures.export", "--gin_file=gin/mixtures/sample.gin", "--gin_file=gin/mixtures/prepare.gin",
                f"--gin.{macro}={output}", *settings, *more]
    return [f"raters.{stage}", f"--gin_file=gin/raters/{stage}.gin", "--gin.DOCUMENTS=*/*.jsonl", "--gin.ROOT=corpus",
            f"--gin.{macro}={output}", *settings, *more]


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def undisturbed(corpus):
    """Returns a function from a stage to its output and the seconds it took."""
    made = {}

    def of(stage: str) -> tuple[dict[str, bytes], float]:
        if stage not in made:
            start = time.monotonic()
            ended = run(*flags(stage, f"whole-{stage}"), folder=corpus)
            assert ended.code == 0, ended.err
            made[stage] = contents(corpus / f"whole-{stage}"), time.monotonic() - start
            kinds = {name.split("/")[0] for name, content in made[stage][0].items() if content}
            assert kinds >= {{"select": "train", "export": "corpus"}.get(stage, "removed"),
                             MARKERS.get(stage, "report.json")}
        return made[stage]

    return of


def commands(stage: str, output: str, way: str) -> list[list[str]]:
    """Returns the commands that together make the output, to be run one after the other until all have ended well."""
    if way == "shards":
        return [flags(stage, output, f"--shard={number}/2") for number in (1, 0, 1, 0)] + [flags(stage, output)]
    workers = f"--gin.{'export_tokens' if stage == 'export' else stage}.workers=2"
    return [flags(stage, output, *{"alone": (), "workers": (workers,),
                                   "beam": ("--beam", "--runner=DirectRunner")}[way])]


def kill_and_go_on(corpus: pathlib.Path, stage: str, way: str, seconds: float, kills: int, seed: int) -> None:
    """Kills the commands at random moments, and lets them end when they were killed often enough."""
    moments = random.Random(seed)
    if way == "beam":
        pytest.importorskip("apache_beam")
    for command in commands(stage, "killed", way):
        killed = 0
        while True:
            with started(*command, folder=corpus) as process:
                if killed < kills:
                    deadline = time.monotonic() + moments.uniform(0.2, 1.1) * seconds
                    while time.monotonic() < deadline and process._forked.poll(0.01) is None:
                        pass
                    process.signal(signal.SIGKILL)
                ended = process.end()
            if ended.code == 0:
                break
            assert ended.code == -signal.SIGKILL, ended.err
            killed += 1
            report = corpus / "killed" / MARKERS.get(stage, "report.json")
            assert not (corpus / "killed").exists() or json.loads(report.read_text()), "a part of an output"


@pytest.mark.parametrize("way", WAYS[:3])
def test_a_killed_command_goes_on(corpus, undisturbed, way):
    check_kills(corpus, undisturbed, "languages", way, kills=1)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stage", STAGES)
def test_fifty_kills(corpus, undisturbed, stage, way):
    for seed in range(10):
        check_kills(corpus, undisturbed, stage, way, kills=5, seed=seed)


def check_kills(corpus, undisturbed, stage: str, way: str, kills: int, seed: int = 0) -> None:
    whole, seconds = undisturbed(stage)
    kill_and_go_on(corpus, stage, way, seconds, kills, seed)
    assert contents(corpus / "killed") == whole
    assert not (corpus / ".killed.parts").exists()
    shutil.rmtree(corpus / "killed")


def test_two_processes_of_one_shard_do_no_harm(corpus, undisturbed):
    whole, _ = undisturbed("languages")
    with started(*flags("languages", "twice", "--shard=0/2"), folder=corpus) as one, \
            started(*flags("languages", "twice", "--shard=0/2"), folder=corpus) as other:
        assert [one.end().code, other.end().code] == [0, 0]
    assert run(*flags("languages", "twice"), folder=corpus).code == 0
    assert contents(corpus / "twice") == whole and not (corpus / ".twice.parts").exists()


@pytest.mark.parametrize("stage", ["languages", "export"])
def test_a_full_disk_is_one_line_and_the_command_goes_on_when_there_is_room(corpus, undisturbed, stage):
    whole, _ = undisturbed(stage)
    name = f"full-{stage}"
    limit = max(map(len, whole.values())) - 1  # the largest file does not fit
    with started(*flags(stage, name), folder=corpus) as process:
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
        ended = process.end()
    *progress, error = ended.err.splitlines()
    assert ended.code == 1 and all(line.endswith("tokens/s") for line in progress), ended.err
    assert error.startswith(f"error: {name}") and error.endswith("cannot be written (File too large)")
    assert not (corpus / name).exists()
    assert run(*flags(stage, name), folder=corpus).code == 0
    assert contents(corpus / name) == whole
