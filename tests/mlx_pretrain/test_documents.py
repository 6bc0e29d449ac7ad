"""Readers of documents: every format gives the same documents, every kind of damage one clear line."""

import gzip
import json
import lzma
import tracemalloc

import pyarrow as pa
import pyarrow.parquet
import pytest

from mlx_pretrain.data.documents import Document, match_files, read_documents
from mlx_pretrain.errors import InputError

RECORDS = [
    {"id": "a", "lang": "fi", "text": "yksi\nkaksi  \t", "source": "s"},
    {"id": "b", "lang": "ja", "text": "日本語 😀\u2028x\x85y", "source": "s"},
]
DOCUMENTS = [Document(r["id"], r["text"], r["lang"], r["source"]) for r in RECORDS]


def compress(content: bytes, suffix: str) -> bytes:
    if suffix == ".xz":
        return lzma.compress(content)
    if suffix == ".gz":
        return gzip.compress(content)
    if suffix == ".zst":
        return pa.compress(content, "zstd", asbytes=True)
    return content


@pytest.mark.parametrize("suffix", ["", ".xz", ".gz", ".zst"])
def test_jsonl_of_every_compression_reads_the_same(tmp_path, suffix):
    path = tmp_path / f"d.jsonl{suffix}"
    lines = "\n\n".join(json.dumps(r, ensure_ascii=False) for r in RECORDS)
    path.write_bytes(compress(lines.encode(), suffix))
    assert list(read_documents(path)) == DOCUMENTS


def test_parquet_reads_the_same(tmp_path):
    pa.parquet.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "d.parquet", row_group_size=1)
    assert list(read_documents(tmp_path / "d.parquet")) == DOCUMENTS


def test_missing_id_language_and_source_get_defaults(tmp_path):
    (tmp_path / "d.jsonl").write_text('\n{"text": "x", "id": null}\n{"text": ""}\n')
    assert list(read_documents(tmp_path / "d.jsonl")) == [Document("d.jsonl:2", "x", "", ""),
                                                          Document("d.jsonl:3", "", "", "")]


@pytest.mark.parametrize("suffix", ["", ".xz"])
def test_a_text_file_is_one_document_or_one_per_line(tmp_path, suffix):
    path = tmp_path / f"d.txt{suffix}"
    path.write_bytes(compress("\ufeffone\n\ntwo \r\n".encode(), suffix))
    assert [d.text for d in read_documents(path)] == ["one\n\ntwo \r\n"]
    assert list(read_documents(path, "line")) == [Document(f"{path.name}:1", "one", "", ""),
                                                  Document(f"{path.name}:3", "two ", "", "")]


GOOD = json.dumps({"text": "good"}).encode() + b"\n"


@pytest.mark.parametrize(("name", "content", "message"), [
    ("d.jsonl", b"", "d.jsonl: empty"),
    ("d.jsonl", b"\n \n", "d.jsonl: empty"),
    ("d.jsonl.gz", b"", "d.jsonl.gz: empty"),
    ("d.txt", b" \n", "d.txt: empty"),
    ("d.jsonl", GOOD + b'{"text": "\xff"}\n', "d.jsonl:2: not UTF-8"),
    ("d.txt", b"caf\xe9", "d.txt: not UTF-8"),
    ("d.jsonl", GOOD + b'{"text": "cut', "d.jsonl:2: malformed JSON"),
    ("d.jsonl", GOOD + b"[" * 100_000 + b"\n", "d.jsonl:2: malformed JSON"),
    ("d.jsonl", GOOD + b"[1]\n", "d.jsonl:2: a list where a JSON object"),
    ("d.jsonl", GOOD + b'{"body": "x"}\n', 'd.jsonl:2: no "text"'),
    ("d.jsonl", b'{"text": 7}\n', 'd.jsonl:1: no "text"'),
    ("d.jsonl", b'{"text": "half \\ud83d pair"}\n', "d.jsonl:1: the text is not valid Unicode"),
    ("d.csv", b"text\nx\n", "d.csv: unknown type"),
    ("d.parquet.xz", b"x", "d.parquet.xz: unknown type"),
    ("d.parquet", b"PAR1 and then nothing", "d.parquet: cannot be read"),
    ("d.jsonl.xz", GOOD, "d.jsonl.xz: cannot be read"),
    ("d.jsonl.gz", GOOD, "d.jsonl.gz: cannot be read"),
    ("d.jsonl.zst", GOOD, "d.jsonl.zst: cannot be read"),
])
def test_damage_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        list(read_documents(tmp_path / name))
    assert str(error.value).startswith(f"{tmp_path}/{message}")
    assert "\n" not in str(error.value)


def test_bad_records_are_passed_over_when_somebody_takes_note(tmp_path):
    path, found = tmp_path / "d.jsonl", []
    path.write_bytes(GOOD + b'{"text": "\xff"}\n[1]\n\n' + b'{"text": "last", "id": 7, "score": 2.5, "no": 1}\n')
    documents = list(read_documents(path, extra=("score", "votes"), rejected=lambda *reject: found.append(reject)))
    assert [(d.text, d.number, d.extra) for d in documents] == [
        ("good", 1, {"score": None, "votes": None}), ("last", 5, {"score": 2.5, "votes": None})]
    assert [(number, reason.split(": ")[1]) for number, reason in found] == [
        (2, "not UTF-8"), (3, "a list where a JSON object is expected")]


@pytest.mark.parametrize("suffix", [".xz", ".gz", ".zst"])
@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_a_truncated_stream_is_an_error_and_not_a_shorter_file(tmp_path, suffix, kind):
    content = compress(b"".join(b'{"text": "document %d"}\n' % i for i in range(5000)), suffix)
    (tmp_path / f"d.{kind}{suffix}").write_bytes(content[:-20])
    with pytest.raises(InputError, match=r"truncated or damaged"):
        list(read_documents(tmp_path / f"d.{kind}{suffix}"))


def test_a_parquet_file_without_text_is_named(tmp_path):
    pa.parquet.write_table(pa.table({"id": ["a"]}), tmp_path / "d.parquet")
    with pytest.raises(InputError, match=r'd.parquet:1: no "text"'):
        list(read_documents(tmp_path / "d.parquet"))


def test_missing_files_are_named(tmp_path):
    for suffix in (".jsonl", ".txt.xz", ".parquet"):
        with pytest.raises(InputError, match=f"gone{suffix}: no such file"):
            list(read_documents(tmp_path / f"gone{suffix}"))
    with pytest.raises(InputError, match=r"no file matches"):
        match_files(tmp_path / "*.jsonl")
    with pytest.raises(InputError, match=r"no such file"):
        match_files(tmp_path / "x.jsonl")
    with pytest.raises(InputError, match=r"\*\* is not supported"):
        match_files(tmp_path / "**" / "x.jsonl")


def test_memory_stays_flat(tmp_path):
    """40 MB of documents pass through in less than 4 MB of Python memory."""
    path = tmp_path / "d.jsonl.xz"
    with lzma.open(path, "wb", preset=0) as file:
        for _ in range(40):
            file.write((b'{"text": "%s"}\n' % (b"x" * 10_000)) * 100)
    tracemalloc.start()
    assert sum(len(document.text) for document in read_documents(path)) == 40_000_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4_000_000
