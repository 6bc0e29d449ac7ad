"""Names of files and folders that stages agree on."""

import pathlib

import pytest

from mlx_pretrain.data.documents import Document
from mlx_pretrain.errors import InputError
from raters.duplicates import DuplicatesConfig, deduplicate
from raters.filtering import stages
from tests.raters.rated import write_documents


def test_files_are_named_below_the_part_without_wildcards(tmp_path):
    for name in ("train/en.jsonl", "heldout/en.jsonl"):
        write_documents(tmp_path / name, [{"text": "t"}])
    assert list(stages.input_files(tmp_path / "*/en.jsonl")) == ["heldout/en.jsonl", "train/en.jsonl"]
    assert list(stages.input_files(tmp_path / "train/*")) == ["en.jsonl"]
    assert list(stages.input_files(tmp_path / "train/en.jsonl")) == ["en.jsonl"]


@pytest.mark.parametrize(("name", "output"), [
    ("a/x.jsonl.xz", "a/x.jsonl.gz"), ("x.parquet", "x.jsonl.gz"), ("x.txt", "x.jsonl.gz"),
    ("x.y.jsonl", "x.y.jsonl.gz"),
])
def test_outputs_are_named_after_inputs(name, output):
    assert stages.output_name(name) == output


def test_the_record_decides_on_the_language_before_the_file_does():
    document = Document("a", "t", "", "")
    assert stages.language_of(document, "train/en.jsonl.xz") == "en"
    assert stages.language_of(Document("a", "t", "de", ""), "train/en.jsonl.xz") == "de"


def test_two_inputs_never_share_an_output(tmp_path):
    for name in ("en.jsonl", "en.jsonl.gz"):
        write_documents(tmp_path / "in" / name, [{"text": "t"}])
    config = DuplicatesConfig(str(tmp_path / "in/*"), str(tmp_path / "out"), write_documents=True)
    with pytest.raises(InputError, match=r"en\.jsonl\.gz: lies beside en\.jsonl, which has"):
        deduplicate(config)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    output = tmp_path / "out"
    with pytest.raises(RuntimeError), stages.new_folder(output) as folder:
        (pathlib.Path(folder) / "half").write_text("")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial/of_a_killed_run").write_text("")
    output.mkdir()
    (output / "old").write_text("")
    with stages.new_folder(output) as folder:
        (pathlib.Path(folder) / "new").write_text("")
        assert (output / "old").exists()
    assert [path.name for path in output.iterdir()] == ["new"] and len(list(tmp_path.iterdir())) == 1
