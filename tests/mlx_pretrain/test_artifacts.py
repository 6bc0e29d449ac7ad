"""Outputs are kept, made again or refused by their records."""

import dataclasses
import json
import os
import re

import pytest
from etils import epath

from mlx_pretrain import __version__, files
from mlx_pretrain.artifacts import differences, is_current, new_folder, provenance, read_folder_record, read_record
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import sha256, write_json

MARKER = "report.json"


@dataclasses.dataclass(frozen=True)
class Config:
    output: str
    ngram: int = 5
    exclude: tuple[str, ...] = ("a.jsonl",)
    overwrite: bool = False


@pytest.fixture(params=["local", "gs"])
def output(request, tmp_path) -> epath.Path:
    if request.param == "local":
        return epath.Path(tmp_path) / "out"
    request.getfixturevalue("gcs")
    return epath.Path("gs://bucket") / request.node.name.replace("[", "-").rstrip("]") / "out"


def made_from(output, inputs="a", **settings):
    return provenance("raters.test", Config(str(output), **settings), {"a.jsonl": inputs * 64})


def make(output, record, content="text"):
    with new_folder(output, MARKER) as folder:
        (folder / "data.txt").write_text(content)
        write_json(folder / MARKER, {"provenance": record, "documents": 3})


def current(output, record, overwrite=False, **more):
    return is_current(output, read_folder_record(output, MARKER), record, overwrite=overwrite, **more)


def test_provenance_is_what_json_reads_back(output):
    record = made_from(output)
    assert record == json.loads(json.dumps(record)) == {
        "program": "raters.test", "version": __version__, "settings": {"ngram": 5, "exclude": ["a.jsonl"]},
        "inputs": {"a.jsonl": "a" * 64}}


def test_settings_may_hold_dataclasses_paths_and_what_has_settings():
    class Corpus:
        @property
        def settings(self):
            return {"text_unit": "line"}

    @dataclasses.dataclass
    class Nested:
        path: epath.Path
        corpus: Corpus

    @dataclasses.dataclass
    class Outer:
        nested: Nested

    assert provenance("x", Outer(Nested(epath.Path("a/b"), Corpus())), {})["settings"] == {
        "nested": {"path": "a/b", "corpus": {"text_unit": "line"}}}
    path = epath.Path("gs://bucket/a")
    assert provenance("x", {"exclude": [path]}, {path: "1", "nested": ({path: Nested({path: 1}, Corpus())},)}) == {
        "program": "x", "version": __version__, "settings": {"exclude": ["gs://bucket/a"]}, "inputs": {
            "gs://bucket/a": "1",
            "nested": [{"gs://bucket/a": {"path": {"gs://bucket/a": 1}, "corpus": {"text_unit": "line"}}}]}}


def test_an_absent_output_is_made_and_the_same_is_kept(output, capsys):
    record = made_from(output)
    assert not current(output, record)
    make(output, record)
    assert current(output, record) and current(output, record, overwrite=True)
    assert capsys.readouterr().err == f"{output}: made before from the same inputs and settings, kept\n" * 2
    assert current(output, record, quiet=True) and not capsys.readouterr().err


@pytest.mark.parametrize("change, words", [
    ({"ngram": 6}, "settings ngram = 5 (now 6)"),
    ({"exclude": ()}, 'settings exclude = ["a.jsonl"] (now [])'),
    ({"inputs": "b"}, "other inputs a.jsonl"),
])
def test_an_output_from_others_is_refused_unless_overwrite(tmp_path, change, words):
    output = tmp_path / "out"
    make(output, made_from(output))
    with pytest.raises(InputError) as error:
        current(output, made_from(output, **change))
    assert str(error.value) == (f"{output}: exists, made with {words}; set overwrite=True to replace it, or name "
                                "another output")
    with pytest.raises(InputError, match=rf"{re.escape(words)}; take another$"):
        current(output, made_from(output, **change), remedy="take another")
    assert not current(output, made_from(output, **change), overwrite=True)
    make(output, made_from(output, **change), "new")
    assert (output / "data.txt").read_text() == "new" and current(output, made_from(output, **change))
    assert os.listdir(tmp_path) == ["out"]


def test_a_damaged_output_is_made_again_when_its_inputs_are_the_same(output, capsys):
    record = made_from(output)
    make(output, record)
    assert not current(output, record, damage=lambda: "data.txt is cut")
    assert capsys.readouterr().err == f"{output}: damaged (data.txt is cut), made again\n"
    assert current(output, record, damage=lambda: None)
    with pytest.raises(InputError, match="ngram"):
        current(output, made_from(output, ngram=7), damage=lambda: "data.txt is cut")


def test_an_output_without_a_readable_record_is_refused_unless_overwrite(output, capsys):
    record = made_from(output)
    make(output, record)
    content = (output / MARKER).read_bytes()
    no_json = (b"", content[: len(content) // 2])
    for text in (*no_json, b"[]", b"{}", b'{"provenance": 3}', b'{"provenance": {"seed": 1}}'):
        (output / MARKER).write_bytes(text)
        capsys.readouterr()
        with pytest.raises(InputError) as error:
            current(output, record, damage=lambda: "not looked for")
        assert str(error.value) == (f"{output}: has no record of what it was made from; set overwrite=True to replace "
                                    "it, or name another output")
        assert (f"{output / MARKER}: damaged (no JSON: " in capsys.readouterr().err) == (text in no_json)
        assert not current(output, record, overwrite=True)
    make(output, record)
    assert current(output, record)


def test_an_output_of_another_program_is_never_replaced(output):
    make(output, provenance("raters.other", {}, {}))
    for overwrite in (False, True):
        with pytest.raises(InputError, match=r"exists and was not made by raters\.test; name another output"):
            current(output, made_from(output), overwrite=overwrite)


def test_a_folder_that_holds_anything_else_is_not_replaced(output, capsys):
    record, contents = made_from(output), {"contents": (MARKER, "data.txt", "figures")}
    (output / "proxies").mkdir(parents=True, exist_ok=True)
    (output / "proxies" / "run.csv").write_text("mine")
    with pytest.raises(InputError, match=r"out: holds proxies besides what raters\.test makes; move it away, or name"):
        current(output, record, overwrite=True, **contents)
    for name, text in ((MARKER, json.dumps({"provenance": record})), ("data.txt", "cut"), ("figures", "follows")):
        (output / name).write_text(text)
    assert current(output, record, **contents)  # it is kept
    with pytest.raises(InputError, match="holds proxies besides"):
        current(output, record, damage=lambda: "data.txt is cut", **contents)
    with pytest.raises(InputError, match="holds proxies besides"):
        current(output, made_from(output, ngram=6), overwrite=True, **contents)
    assert (output / "proxies" / "run.csv").read_text() == "mine" and "made again" not in capsys.readouterr().err
    (output / "proxies").rmtree()
    assert not current(output, made_from(output, ngram=6), overwrite=True, **contents)


def test_an_empty_folder_is_absent(tmp_path):
    (tmp_path / "out").mkdir()
    assert not current(tmp_path / "out", made_from(tmp_path / "out"))


def test_a_run_killed_while_it_writes_leaves_the_former_output(output):
    record = made_from(output)
    make(output, record)
    context = new_folder(output, MARKER)
    folder = context.__enter__()
    (folder / "data.txt").write_text("new")  # killed before the marker and the end of the block
    assert current(output, record) and (output / "data.txt").read_text() == "text"
    make(output, record, "newest")
    assert (output / "data.txt").read_text() == "newest"
    assert not folder.exists() or not any(folder.iterdir())
    context.gen.close()


def test_an_error_leaves_the_former_output_alone(output):
    record = made_from(output)
    make(output, record)
    with pytest.raises(RuntimeError, match="broken"), new_folder(output, MARKER) as folder:
        (folder / "data.txt").write_text("new")
        raise RuntimeError("broken")
    assert current(output, record) and (output / "data.txt").read_text() == "text"
    assert not folder.exists()


@pytest.mark.parametrize("looks", [True, False])
def test_a_run_killed_between_the_two_renames_loses_nothing(tmp_path, looks):
    """The former folder was renamed, and the new one not yet; then another run fails."""
    output = epath.Path(tmp_path) / "out"
    make(output, made_from(output))
    output.rename(tmp_path / ".out.former")
    (tmp_path / ".out.partial").mkdir()
    if looks:
        assert current(output, made_from(output))
    with pytest.raises(RuntimeError, match="broken"), new_folder(output, MARKER):
        raise RuntimeError("broken")
    assert (output / "data.txt").read_text() == "text"
    make(output, made_from(output), "new")
    assert os.listdir(tmp_path) == ["out"] and (output / "data.txt").read_text() == "new"


def test_a_former_output_that_was_replaced_is_removed(tmp_path):
    """A run was killed after the new folder had taken its place."""
    output = epath.Path(tmp_path) / "out"
    make(output, made_from(output))
    (tmp_path / ".out.former").mkdir()
    assert current(output, made_from(output))
    make(output, made_from(output), "new")
    assert os.listdir(tmp_path) == ["out"] and (output / "data.txt").read_text() == "new"


def test_records_of_single_files(tmp_path, capsys):
    path = tmp_path / "model.json"
    assert read_record(path) is None
    path.write_text('{"config": {"seed": 1}}')
    assert read_record(path) == {"config": {"seed": 1}} and read_record(path, "config") == {"seed": 1}
    assert read_record(path, "provenance") == {}
    path.write_text('{"config": ')
    assert read_record(path) == {} and "model.json: damaged (no JSON: " in capsys.readouterr().err
    with pytest.raises(InputError, match="has no record of what it was made from"):
        is_current(path, {}, {"config": {"seed": 1}}, overwrite=False)


def test_differences_name_what_differs():
    a, b = "a" * 64, "b" * 64
    assert differences({"seed": 1, "inputs": {"x": a, "y": a}, "note": 1}, {"seed": 2, "inputs": {"x": b, "z": a}}) == [
        "seed = 1 (now 2)", "other inputs x", "more inputs y", "inputs that lack z"]
    assert differences({}, {"seed": None}) == []
    assert differences({"inputs": {"es/0": a}}, {"inputs": {f"es/{i}": a for i in range(5)}, "seed": 1}) == [
        "inputs that lack es/1, es/2 and 2 more", "seed = null (now 1)"]
    assert len(differences({"text": "x" * 200}, {"text": ""})[0]) < 110


def test_a_message_names_a_few_differences(tmp_path):
    old, new = ({f"setting{i}": i + change for i in range(6)} for change in (0, 1))
    with pytest.raises(InputError, match=r"setting3 = 3 \(now 4\) and 2 more; set overwrite"):
        is_current(tmp_path, old, new, overwrite=False)


def test_a_file_that_has_not_changed_is_hashed_once(tmp_path, monkeypatch):
    path = tmp_path / "large.bin"
    path.write_bytes(b"a")
    reads = []
    hash_file = files._sha256
    monkeypatch.setattr(files, "_sha256", lambda path: reads.append(path) or hash_file(path))
    first = sha256(path)
    path.write_bytes(b"b")  # at once: the time of change may be the same
    assert sha256(path) != first and len(reads) == 2
    os.utime(path, (1e9, 1e9))
    assert len({sha256(path) for _ in range(3)}) == 1 and len(reads) == 3
    path.write_bytes(b"c")
    os.utime(path, (2e8, 2e8))
    sha256(path)
    assert len(reads) == 4
