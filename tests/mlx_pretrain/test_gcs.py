"""gs:// through the real clients, epath on gcsfs and TensorStore, against a server on loopback."""

import dataclasses
import gzip
import json
import logging
import math
import struct
import time
import urllib.parse

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pyarrow as pa
import pyarrow.parquet
import pytest
import tensorstore as ts
from etils import epath
from safetensors.numpy import load_file
from tensorboardX.proto.event_pb2 import Event

from data_mixtures.tokenizer import train_model
from mlx_pretrain.command_line import errors_as_one_line
from mlx_pretrain.convert.export import ExportConfig, export_model
from mlx_pretrain.data import token_store as token_store
from mlx_pretrain.data.corpus import Corpus
from mlx_pretrain.data.loader import BatchSource, store_mixture
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import (
    absolute,
    atomic_writer,
    file_sizes,
    kvstore,
    move_folder,
    read_json,
    read_jsonl,
    write_json,
)
from mlx_pretrain.gcs import Appender
from mlx_pretrain.inference.language_model import load_language_model
from mlx_pretrain.parallel import partitioning
from mlx_pretrain.reports.run_history import read_history
from mlx_pretrain.training import checkpoints
from mlx_pretrain.training.checkpoints import Checkpoints, DataState
from mlx_pretrain.training.initial_weights import InitialWeights
from mlx_pretrain.training.metric_writer import METRICS, MetricWriter
from mlx_pretrain.training.train_state import TrainState, abstract_state, make_initial_state
from tests.conftest import RATES


@pytest.fixture
def folder(gcs, request) -> epath.Path:
    """An empty folder on gs://."""
    return epath.Path("gs://bucket") / request.node.name.replace("[", "-").rstrip("]")


def content(gcs, path) -> bytes:
    return gcs.buckets["bucket"][str(path).removeprefix("gs://bucket/")].content


def uploads(requests) -> list[str]:
    return [path for method, path in requests if method in ("POST", "PUT") and path.startswith("/upload")]


def test_epath_uses_gcsfs_where_tensorflow_is_installed_too(folder):
    assert type(folder._backend).__name__ == "_FileSystemSpecBackend"
    assert absolute(folder) == folder


@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")  # gcsfs's way
def test_an_object_appears_when_it_is_complete(gcs, folder):
    path = folder / "report.html"
    with gcs.counted() as requests, atomic_writer(path) as file:
        file.write(b"x" * (6 << 20))  # above what is uploaded in one request
        file.flush()
        assert requests == [] and str(path).removeprefix("gs://bucket/") not in gcs.buckets["bucket"]
    assert content(gcs, path) == b"x" * (6 << 20)
    assert len(requests) == len(uploads(requests)) == 2  # one opens the upload, one has the bytes; nothing is renamed
    assert gcs.buckets["bucket"][str(path).removeprefix("gs://bucket/")].content_type == "text/html"

    def fails():
        with atomic_writer(path) as file:
            file.write(b"half")
            raise RuntimeError("in the middle")

    with gcs.counted() as requests, pytest.raises(RuntimeError, match="in the middle"):
        fails()
    assert requests == [] and content(gcs, path) == b"x" * (6 << 20)


def test_conditional_writes_for_leases(folder, tmp_path):
    for place in (folder, tmp_path):
        store = ts.KvStore.open(kvstore(place)).result()
        absent = store.read("lease").result().stamp.generation
        mine = store.write("lease", b"mine", if_equal=absent).result()
        assert not store.write("lease", b"theirs", if_equal=absent).result().generation
        later = store.write("lease", b"mine, later", if_equal=mine.generation).result()
        assert not store.write("lease", b"theirs", if_equal=mine.generation).result().generation
        assert not store.write("lease", None, if_equal=mine.generation).result().generation
        assert (place / "lease").read_text() == "mine, later"
        store.write("lease", None, if_equal=later.generation).result()
        assert not (place / "lease").exists()


def test_listings_see_what_other_clients_write(folder):
    (folder / "a").write_text("")
    assert [path.name for path in folder.iterdir()] == ["a"]
    ts.KvStore.open(kvstore(folder)).result().write("b", b"").result()
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b"] and (folder / "b").exists()


def test_folders_are_moved(gcs, folder, tmp_path):
    for place in (folder, tmp_path):
        for name in ("c/0", "c/1", "report.json", "b"):
            write_json(place / "old" / name, name)
        with gcs.counted() as requests:
            move_folder(place / "old", place / "new" / "deep", last="report.json")
        assert file_sizes(place) == {f"new/deep/{name}": len(name) + 3 for name in ("c/0", "c/1", "report.json", "b")}
        moved = [path for _, path in requests if "/moveTo/" in path]
        assert len(moved) == (4 if place == folder else 0)
        assert not moved or "report.json" in moved[-1]


def test_a_damaged_checkpoint_on_gcs_is_moved_aside(gcs, folder):
    state = {"params": jnp.arange(8.0)}
    checkpoints = Checkpoints(folder)
    for step in (1, 2):
        checkpoints.save(step, state, DataState(step, {}), {})
    checkpoints.close()
    damaged = {path for path in file_sizes(folder / "checkpoints") if path.startswith("2/state/ocdbt.process_0/d/")}
    assert damaged
    for path in damaged:
        (folder / "checkpoints" / path).write_bytes(b"")
    checkpoints = Checkpoints(folder)
    _, progress = checkpoints.restore(jax.eval_shape(lambda: state))
    assert progress.sequences == 1 and checkpoints.steps() == [1]
    checkpoints.close()
    names = file_sizes(folder)
    assert not any(name.startswith("checkpoints/2/") for name in names)
    assert {f"damaged_checkpoints/{path}" for path in damaged} < names.keys()


@pytest.mark.parametrize("what", ["object", "bucket", "permission", "write", "write-bucket", "store-bucket"])
def test_errors_are_one_line_with_path_and_cause(gcs, folder, what, monkeypatch):
    path = folder / "x.json" if "bucket" not in what else epath.Path("gs://another/x.json")
    message = f"{path}: no such file"
    if "bucket" in what:
        message = f"{path / token_store.MANIFEST if 'store' in what else path}: no bucket 'another'"
    elif what != "object":
        monkeypatch.setattr(gcs, "forbidden", [folder.name])
        message = f"{path}: no permission: the caller does not have storage.objects access"
    act = {"write": write_json, "store": lambda path, _: token_store.TokenStore(path)}.get(
        what.split("-")[0], lambda path, _: read_json(path))
    with pytest.raises(InputError) as raised:
        act(path, {})
    assert str(raised.value) == message


def test_errors_of_the_clients_end_a_command_with_one_line(gcs, folder, monkeypatch, capsys):
    monkeypatch.setattr(gcs, "forbidden", [folder.name])
    with pytest.raises(SystemExit), errors_as_one_line():
        (folder / "x").write_text("")
    assert capsys.readouterr().err == "error: gs://: no permission: the caller does not have storage.objects access\n"


def test_appending_uploads_what_is_new_and_readers_see_whole_writes(gcs, folder):
    path = folder / "log"
    file = Appender(path, every=None)
    for number in range(3):
        file.write(b"%03d" % number * 1000)
        with gcs.counted() as requests:
            file.flush()
        assert len(uploads(requests)) == 1 and len(requests) == 3
        assert len(content(gcs, path)) == 3000 * (number + 1)
    with gcs.counted() as requests:
        file.flush()
    assert not requests
    file.close()
    again = Appender(path, every=None)
    again.write(b"end")
    again.close()
    assert content(gcs, path) == b"000" * 1000 + b"001" * 1000 + b"002" * 1000 + b"end"
    assert [name for name in gcs.buckets["bucket"] if name.startswith(folder.name)] == [f"{folder.name}/log"]


def test_appending_happens_by_itself(gcs, folder):
    file = Appender(folder / "log", every=0.05)
    file.write(b"a killed process leaves this")
    deadline = time.monotonic() + 20
    while not (folder / "log").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert content(gcs, folder / "log") == b"a killed process leaves this"
    file.close()


def test_an_append_whose_answer_is_lost_is_made_once(gcs, folder, monkeypatch):
    file = Appender(folder / "log", every=None)
    for text in (b"one ", b"two ", b"three"):
        file.write(text)
        gcs.lose_answer_of = "/compose" if text == b"two " else None
        file.flush()
    assert gcs.lose_answer_of is None and content(gcs, folder / "log") == b"one two three"


def test_what_cannot_be_appended_now_is_later(gcs, folder, monkeypatch, caplog):
    file = Appender(folder / "log", every=None)
    file.write(b"first ")
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(gcs, "forbidden", [folder.name])
        file.flush()
        assert "6 bytes not appended yet: no permission" in caplog.text
        with pytest.raises(InputError, match="log: no permission"):
            file.close()
    file = Appender(folder / "log", every=None)
    file.write(b"first ")
    file.flush()
    with monkeypatch.context() as patch:
        patch.setattr(gcs, "forbidden", [folder.name])
        file.flush()
        file.write(b"second ")
        file.flush()
    file.write(b"third")
    file.close()
    assert content(gcs, folder / "log") == b"first second third"


def test_a_second_writer_of_an_appended_file_is_noticed(gcs, folder):
    first, second = (Appender(folder / "log", every=0.05) for _ in range(2))
    first.write(b"a")
    first.flush()
    second.write(b"b")
    with pytest.raises(InputError, match="log: written by another process meanwhile"):
        second.flush()
    deadline = time.monotonic() + 20
    with pytest.raises(InputError, match="log: written by another process meanwhile"):
        while time.monotonic() < deadline:  # the thread has found it too
            second.write(b"")
            time.sleep(0.01)
    first.close()
    assert content(gcs, folder / "log") == b"a"


def test_metrics_of_a_resumed_run_and_tensorboard(folder):
    writer = MetricWriter(folder, -1)
    for step in (1, 2, 3):
        writer.write(step, "train", {"loss": 1 / step})
    assert not (folder / METRICS).exists()
    writer.flush()  # as before a checkpoint
    assert [line["step"] for _, line in read_jsonl(folder / METRICS)] == [1, 2, 3]
    writer.close()
    resumed = MetricWriter(folder, 2)
    resumed.write(3, "train", {"loss": 5.0})
    resumed.write(3, "eval", {"loss": math.nan})
    resumed.close()
    history = read_history(folder / METRICS)
    assert [line["loss"] for line in history.train] == [1, 0.5, 5.0] and math.isnan(history.evals[0]["loss"])

    values = []
    for path in sorted((folder / "tensorboard").iterdir(), key=lambda path: path.name):
        values += [(event.step, value.simple_value) for event in read_events(path.read_bytes())
                   for value in event.summary.value if value.tag == "train/loss"]
    assert values == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3)), (3, 5.0)]


def read_events(content: bytes):
    """The events of a TensorBoard file: records of length, checksum, content, checksum."""
    while content:
        (size,) = struct.unpack("<Q", content[:8])
        yield Event.FromString(content[12 : 12 + size])
        content = content[16 + size :]


def make_store(folder, rows=20):
    splits, rng = {}, np.random.default_rng(0)
    for split in ("train", "heldout"):
        for language in RATES:
            writer = token_store.PartWriter(folder / split / language, 8, np.uint16)
            writer.append(rng.integers(0, 90, (rows, 8)).astype(np.uint16))
            splits.setdefault(split, {})[language] = writer.close(8 * rows, 100, 3)
    with atomic_writer(folder / token_store.TOKENIZER) as file:
        file.write(b"stands for a tokenizer")
    token_store.write_manifest(folder, token_store.Manifest(
        8, 96, token_store.sha256(folder / token_store.TOKENIZER), splits, {}))
    return splits


def test_a_token_store_opens_with_one_listing_a_split(gcs, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(token_store, "ROWS_PER_SHARD", 4)
    make_store(folder, rows=30)  # is replaced
    assert make_store(folder) == make_store(tmp_path)
    assert len(token_store.TokenStore(folder).part("train", "aa").files) == 5
    mixture = store_mixture(token_store.TokenStore(folder), RATES, 8, seed=0)
    with gcs.counted() as requests:
        store = token_store.TokenStore(folder)
        source = BatchSource(store, mixture)
    asked = [path.partition("?")[0] for _, path in requests]
    assert sum("prefix=" in path and "train/" in urllib.parse.unquote(path) for _, path in requests) == 1
    assert not any("%2Fc%2F" in path for path in asked)  # no shard by itself
    assert sum("zarr.json" in path for path in asked) == 2 * len(RATES)  # opened once, and once with the loader's cache
    there = token_store.TokenStore(tmp_path)
    assert store_mixture(there, RATES, 8, seed=0) == mixture
    there = BatchSource(there, mixture)
    for batch in range(3):
        np.testing.assert_array_equal(source[batch]["tokens"], there[batch]["tokens"])
    assert file_sizes(folder) == file_sizes(tmp_path)


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_damage_of_a_store_is_named(gcs, folder, damage):
    make_store(folder)
    shard = folder / "train" / "bb" / "c" / "0" / "0"
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(InputError, match=f"^{shard}: "):
        store_mixture(token_store.TokenStore(folder), RATES, 8, seed=0)


def test_documents(folder):
    records = [{"id": str(n), "text": f"text {n}"} for n in range(3)]
    with atomic_writer(folder / "a.jsonl.gz") as file:
        file.write(gzip.compress(b"".join(json.dumps(record).encode() + b"\n" for record in records)))
    with atomic_writer(folder / "b.parquet") as file:
        pa.parquet.write_table(pa.Table.from_pylist(records), file)
    for corpus in (Corpus(folder, "*"), Corpus(files=folder / "*"), Corpus(folder, ["{language}.jsonl.gz", "b.p*"])):
        assert corpus.folder == folder and list(corpus.paths()) == ["a.jsonl.gz", "b.parquet"]
        for name in corpus.paths():
            assert [document.text for document in corpus.read(name)] == ["text 0", "text 1", "text 2"]


@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")  # gcsfs's way
def test_a_run_is_converted_to_a_hugging_face_folder_and_back(gcs, folder, tmp_path, tiny_config):
    """From gs:// to gs://, in shards; files of an interrupted export do not count."""
    (tmp_path / "own.model").write_bytes(train_model(iter(["the cat sat"] * 20), {
        "model_type": "bpe", "vocab_size": 272, "character_coverage": 1.0, "max_sentence_bytes": 999,
        "num_threads": 1}))
    config = dataclasses.replace(tiny_config, vocab_size=288)
    mesh = partitioning.make_mesh(1, 4, 2)
    checkpoints.save_model(folder / "run", config, tmp_path / "own.model")
    with partitioning.use(mesh):
        params = make_initial_state(config, optax.sgd(1.0), abstract_state(config, optax.sgd(1.0), mesh))(0).params
    zero, saver = jnp.int32(0), Checkpoints(folder / "run")
    saver.save(1, TrainState(zero, zero, params, {}), DataState(1, {}), {})
    saver.close()
    write_json(folder / ".hf.partial/config.json", {})  # of a killed export
    export_model(ExportConfig(str(folder / "run"), str(folder / "hf"), max_shard_size="30KB"))
    name = str(folder).removeprefix("gs://bucket/")
    assert not any(path.startswith(f"{name}/.hf.partial") for path in gcs.buckets["bucket"])
    shards = [path for path in gcs.buckets["bucket"] if path.startswith(f"{name}/hf/model-")]
    assert len(shards) > 2
    (tmp_path / "hf").mkdir()
    for shard in shards:
        (tmp_path / "hf" / shard.rpartition("/")[2]).write_bytes(gcs.buckets["bucket"][shard].content)
        load_file(tmp_path / "hf" / shard.rpartition("/")[2])
    model = load_language_model(folder / "hf", mesh)
    jax.tree.map(np.testing.assert_array_equal, model.params, params)
    weights = InitialWeights(folder / "hf", config, tmp_path / "own.model")
    jax.tree.map(np.testing.assert_array_equal, weights.load(mesh), params)
    uploaded = len(uploads(gcs.requests))
    export_model(ExportConfig(str(folder / "run"), str(folder / "hf"), max_shard_size="30KB"))
    assert len(uploads(gcs.requests)) == uploaded  # kept
    (folder / "hf" / shards[-1].rpartition("/")[2]).unlink()
    with pytest.raises(InputError, match=r"gs://.*/model-.*\.safetensors: no such file"):
        load_language_model(folder / "hf", mesh)
