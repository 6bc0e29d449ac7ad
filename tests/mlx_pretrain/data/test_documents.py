"""Readers of documents: every format gives the same documents, every damage one clear line."""

import gzip
import json
import lzma
import tracemalloc

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard

from mlx_pretrain.data.documents import Document, RecordKeys, match_files, read_documents
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
        return zstandard.compress(content)
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


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_json_file_has_an_object_a_line(tmp_path, suffix):
    path = tmp_path / f"c4.json{suffix}"
    path.write_bytes(compress(b'{"text": "one", "url": "x"}\n{"text": "two"}\n', suffix))
    assert [document.text for document in read_documents(path)] == ["one", "two"]
    path.write_bytes(compress(b'[\n  {"text": "one"}\n]\n', suffix))
    with pytest.raises(InputError, match=r":1: malformed JSON: .*each line must be a JSON object"):
        list(read_documents(path))


@pytest.mark.parametrize("extension", ["jsonl", "parquet"])
def test_fields_may_have_other_keys(tmp_path, extension):
    keys = RecordKeys("content", "key", "tongue", "site")
    path = tmp_path / f"d.{extension}"
    record = {"content": "x", "key": 7, "tongue": "fi", "site": "web", "text": "", "n": 1}
    if extension == "jsonl":
        path.write_text(json.dumps(record))
    else:
        pa.parquet.write_table(pa.Table.from_pylist([record]), path)
    expected = Document("7", "x", "fi", "web")
    assert list(read_documents(path, keys=keys)) == [expected]
    (document,) = read_documents(path, keys=keys, extra=None)
    assert document.extra == {"n": 1}
    assert next(read_documents(path, keys=RecordKeys(language=None))).language == ""
    assert next(read_documents(path, language="sv")).language == "sv"  # no "lang" here


def test_a_missing_text_is_named_with_what_there_is(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"content": "x", "url": "y", "n": 1}')
    with pytest.raises(InputError, match=r'd.jsonl:1: no "text" string in this record; available: content, url \('):
        list(read_documents(tmp_path / "d.jsonl"))
    pa.parquet.write_table(pa.table({"content": ["x"], "n": [1]}), tmp_path / "d.parquet")
    with pytest.raises(InputError, match=r'd.parquet: no column "text"; available: content, n \(Corpus.text_key'):
        list(read_documents(tmp_path / "d.parquet"))


def test_the_language_may_stand_under_lang_or_language(tmp_path):
    records = [{"text": "", "lang": "fi", "language": "Finnish"}, {"text": "", "language": "fra"},
               {"text": "", "lang": None, "language": "sv"}, {"text": "", "lang": "", "language": "da"}]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, records)))
    found = list(read_documents(tmp_path / "d.jsonl", extra=None))
    assert [document.language for document in found] == ["fi", "fra", "sv", "da"]
    assert [dict(document.extra) for document in found] == [{"language": "Finnish"}, {}, {}, {}]


@pytest.mark.parametrize("language, named", [
    (["en"], "a list"), ([], "a list"), ({"en": 0.9}, "an object"), (7, "a number"), (0, "a number"),
    (0.5, "a number"), (True, "a truth value"), (False, "a truth value"),
])
@pytest.mark.parametrize("field", ["lang", "language"])
def test_a_language_that_is_no_string_is_the_fault_of_its_record(tmp_path, language, named, field):
    records = [{"text": "a", "lang": "en"}, {"text": "b", field: language}, {"text": "c"}]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, records)))
    rejected = []
    texts = [d.text for d in read_documents(tmp_path / "d.jsonl", rejected=lambda *reject: rejected.append(reject))]
    assert texts == ["a", "c"]
    ((number, reason),) = rejected
    assert number == 2 and f'd.jsonl:2: "{field}" is {named} where a string is expected' in reason
    pa.parquet.write_table(pa.table({"text": ["b"], field: [language]}), tmp_path / "d.parquet")
    with pytest.raises(InputError, match=f'd.parquet:1: "{field}" is {named}'.replace("an object", "a[n ]")):
        list(read_documents(tmp_path / "d.parquet"))


@pytest.mark.parametrize("binary", [pa.binary(), pa.large_binary(), pa.string(), pa.large_string()])
def test_parquet_text_may_be_binary(tmp_path, binary):
    columns = {"text": "x\u00e9", "id": "a", "lang": "fi", "source": "web"}
    table = pa.table({name: pa.array([value.encode()] * 2, pa.binary()).cast(binary)
                      for name, value in columns.items()})
    pa.parquet.write_table(table, tmp_path / "d.parquet", store_schema=False)
    assert list(read_documents(tmp_path / "d.parquet")) == [Document("a", "x\u00e9", "fi", "web")] * 2


@pytest.mark.parametrize("binary", [pa.binary(), pa.string(), pa.large_string()])
def test_parquet_text_that_is_not_utf_8_is_the_fault_of_its_row(tmp_path, binary):
    raw = pa.array([b"one", b"caf\xe9", b"three"], pa.large_binary() if binary == pa.large_string() else pa.binary())
    text = raw if binary == pa.binary() else raw.view(binary)  # Arrow checks nothing here
    pa.parquet.write_table(pa.table({"text": text}), tmp_path / "d.parquet")
    rejected = []
    found = list(read_documents(tmp_path / "d.parquet", rejected=lambda *reject: rejected.append(reject)))
    assert [document.text for document in found] == ["one", "three"]
    assert [number for number, _ in rejected] == [2] and 'd.parquet:2: "text": not UTF-8' in rejected[0][1]


def zstd_frame(content: bytes, window_log: int) -> bytes:
    """One raw block; RFC 8878, 3.1.1."""
    header = b"\x28\xb5\x2f\xfd\x00" + bytes([(window_log - 10) << 3])
    return header + (len(content) << 3 | 1).to_bytes(3, "little") + content


@pytest.mark.parametrize("window_log", [20, 27, 28, 31])
def test_zstd_frames_of_every_window_are_read_one_after_another(tmp_path, window_log):
    path = tmp_path / "d.jsonl.zst"
    frame = zstd_frame(GOOD, window_log)
    assert zstandard.get_frame_parameters(frame).window_size == 2**window_log
    skippable = b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc"  # RFC 8878, 3.1.2: pzstd and seekable files write them
    path.write_bytes(frame + skippable + zstd_frame(GOOD, 20) + frame)
    assert [document.text for document in read_documents(path)] == ["good"] * 3
    path.write_bytes(frame + frame[:-3])
    with pytest.raises(InputError, match=rf"cannot be read near byte {2 * len(frame) - 3} .*frame has no end"):
        list(read_documents(path))


def test_zstd_without_a_size_and_with_a_window_of_256_mib_is_read(tmp_path):
    settings = zstandard.ZstdCompressionParameters.from_level(3, window_log=28)
    stream = zstandard.ZstdCompressor(compression_params=settings).compressobj()  # as a pipe into `zstd --long=28`
    content = stream.compress(GOOD * 100_000) + stream.flush()
    header = zstandard.get_frame_parameters(content)
    assert header.window_size == 2**28 and header.content_size == zstandard.CONTENTSIZE_UNKNOWN
    (tmp_path / "d.jsonl.zst").write_bytes(content)
    assert sum(document.text == "good" for document in read_documents(tmp_path / "d.jsonl.zst")) == 100_000
    damaged = bytearray(content)
    damaged[len(content) // 2] ^= 0xFF
    damaged[7:10] = b"\xff\xff\xff"
    (tmp_path / "d.jsonl.zst").write_bytes(damaged)
    with pytest.raises(InputError, match=r"d.jsonl.zst: cannot be read near byte \d+ \(truncated or damaged\?\)"):
        list(read_documents(tmp_path / "d.jsonl.zst"))


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
    with pytest.raises(InputError, match=r'd.parquet: no column "text"; available: id ' ):
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


@pytest.mark.parametrize("suffix", [".xz", ".zst"])
def test_memory_stays_flat(tmp_path, suffix):
    """40 MB of documents pass through in less than 10 MB of Python memory."""
    path = tmp_path / f"d.jsonl{suffix}"
    with lzma.open(path, "wb", preset=0) if suffix == ".xz" else zstandard.open(path, "wb") as file:
        for _ in range(40):
            file.write((b'{"text": "%s"}\n' % (b"x" * 10_000)) * 100)
    tracemalloc.start()
    assert sum(len(document.text) for document in read_documents(path)) == 40_000_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000
