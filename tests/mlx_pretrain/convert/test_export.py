"""Exports: transformers' logits, shards, what is in memory, what becomes of an output, and damage."""

import dataclasses
import itertools
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors
from etils import epath
from safetensors.numpy import load_file

from data_mixtures.tokenizer import train_model
from mlx_pretrain.convert.decoders import load_decoder, save_decoder
from mlx_pretrain.convert.export import ExportConfig, export_model
from mlx_pretrain.data.tokenizers import Tokenizer
from mlx_pretrain.errors import InputError
from mlx_pretrain.inference.language_model import load_language_model
from mlx_pretrain.models.decoder import Decoder, DecoderConfig, logits
from mlx_pretrain.parallel import partitioning
from mlx_pretrain.training import checkpoints, checksums, saved_arrays
from mlx_pretrain.training.checkpoints import Checkpoints, DataState
from mlx_pretrain.training.train_state import TrainState, abstract_params

ROOT = pathlib.Path(__file__).parents[3]


def forward(config, params, tokens):
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    return np.asarray(logits(params, Decoder(config).apply({"params": params}, tokens, positions)[0]))


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def exported(model, output, **settings) -> pathlib.Path:
    export_model(ExportConfig(str(model), str(output), **settings))
    return pathlib.Path(output)


def weights(folder) -> dict[str, np.ndarray]:
    """Returns all tensors of a folder, read by the safetensors library."""
    return {name: array for path in sorted(folder.glob("*.safetensors")) for name, array in load_file(path).items()}


def content(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def make_run(folder, tied: bool) -> DecoderConfig:
    """A run of step 3 with weights and their average, laid out over eight devices."""
    folder.mkdir()
    (folder / "own.model").write_bytes(train_model(iter(["the cat sat on the mat"] * 20), {
        "model_type": "bpe", "vocab_size": 284, "character_coverage": 1.0, "max_sentence_bytes": 4096,
        "num_threads": 1}))
    config = DecoderConfig(vocab_size=288, embed_dim=32, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=12, mlp_dim=48,
                           max_length=64, rope_theta=700.0, tie_embeddings=tied)
    checkpoints.save_model(folder, config, folder / "own.model")
    mesh, rng, zero = partitioning.make_mesh(2, 2, 2), np.random.default_rng(0), jnp.int32(0)

    def params():
        return jax.tree.map(lambda like: partitioning.put(
            rng.normal(0, 0.2, like.shape).astype(np.float32), like.sharding), abstract_params(config, mesh))

    saver = Checkpoints(folder)
    saver.save(3, TrainState(zero, zero, params(), {"average": params(), "moment": params()}), DataState(3, {}), {})
    saver.close()
    return config


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def any_run(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("runs") / "run"
    make_run(folder, request.param)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    make_run(folder, tied=False)
    return folder


@pytest.mark.parametrize("dtype, max_shard_size", [("float32", "5GB"), ("float32", 20_000), ("bfloat16", "0.03MB")])
@pytest.mark.filterwarnings("ignore")
def test_transformers_has_the_same_logits(tmp_path, any_run, dtype, max_shard_size):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    folder = exported(any_run, tmp_path / "hf", dtype=dtype, max_shard_size=max_shard_size)
    assert (folder / "model.safetensors.index.json").exists() is (max_shard_size != "5GB")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = load_language_model(any_run)
    text = "the cat sat on the mat"
    ids = transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    assert ids == [model.bos_id, *model.tokenizer.encode(text)]
    tokens = np.random.default_rng(1).integers(0, 288, (2, 40))
    with torch.inference_mode():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    params = model.params if dtype == "float32" else load_language_model(folder).params
    np.testing.assert_allclose(forward(model.config, params, tokens), expected, atol=2e-5, rtol=1e-4)
    generation = theirs.generation_config
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (3, 1, 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_comes_back_bit_by_bit(tmp_path, any_run, dtype):
    model = load_language_model(any_run)
    folder = exported(any_run, tmp_path / "hf", dtype=dtype, max_shard_size=30_000)
    back = load_language_model(folder)
    assert back.config == dataclasses.replace(model.config, dtype="float32")
    rounded = jax.tree.map(lambda x: np.asarray(x, dtype).astype(np.float32), jax.device_get(model.params))
    assert_same(back.params, rounded)
    assert_same(load_decoder(folder)[1], rounded)
    again = exported(folder, tmp_path / "again", dtype=dtype, max_shard_size=30_000)
    assert_same(weights(again), weights(folder))
    ours, theirs = (json.loads((path / "generation_config.json").read_text()) for path in (folder, again))
    assert ours == theirs == {"bos_token_id": 3, "eos_token_id": 1, "pad_token_id": 0}


def test_the_average_is_exported(tmp_path, run):
    for name in ("last", "ema"):
        params = load_language_model(run, weights=name).params
        assert_same(load_language_model(exported(run, tmp_path / name, weights=name)).params, params)


def test_shards_are_what_the_index_says(tmp_path, run):
    whole = weights(exported(run, tmp_path / "whole"))
    folder = exported(run, tmp_path / "shards", max_shard_size=20_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert files == [f"model-{n:05}-of-00008.safetensors" for n in range(1, 9)]
    assert_same(weights(folder), whole)
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in whole.values())
    sizes = []
    for file in files:
        tensors = load_file(folder / file)
        assert {name for name, place in index["weight_map"].items() if place == file} == set(tensors)
        sizes.append(sum(array.nbytes for array in tensors.values()))
        assert sizes[-1] <= 20_000 or len(tensors) == 1  # the embedding has 36,864 bytes
        with safetensors.safe_open(folder / file, "numpy") as opened:
            assert opened.metadata() == {"format": "pt"}
    # No file could have taken the next one's tensors too.
    assert all(a + b > 20_000 for a, b in itertools.pairwise(sizes))


@pytest.mark.parametrize("size, expected", [
    (7, 7), ("5GB", 5 * 10**9), ("1.5 kb", 1500), ("2MiB", 1 << 21), ("800", 800)])
def test_sizes(tmp_path, run, size, expected):
    folder = exported(run, tmp_path / "hf", max_shard_size=size)
    record = json.loads((folder / "export.json").read_text())["provenance"]["settings"]
    assert record["max_shard_size"] == expected and record["step"] == 3


@pytest.mark.parametrize("size", ["big", "5G", 0, "0GB", -3, "GB", "", True, None, "1e9"])
def test_sizes_that_are_none(size):
    with pytest.raises(InputError, match=r"max_shard_size = .*: neither a number of bytes nor a size like '5GB'"):
        ExportConfig("model", "output", max_shard_size=size)


class Recorder:
    """An array whose parts are new arrays; each is gone before the next is asked for."""

    alive: weakref.ref | None = None
    parts = 0

    def __init__(self, array):
        self._array = np.asarray(array)

    def __getitem__(self, index):
        assert Recorder.alive is None or Recorder.alive() is None, "the tensor before is still in memory"
        part = self._array[index].copy()
        Recorder.alive, Recorder.parts = weakref.ref(part), Recorder.parts + 1
        return part


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_tensor_is_in_memory_while_a_folder_is_written(tmp_path, run, dtype):
    model = load_language_model(run)
    save_decoder(tmp_path / "plain", model.config, model.params, dtype=dtype, max_shard_size=30_000)
    Recorder.parts = 0
    save_decoder(tmp_path / "watched", model.config, jax.tree.map(Recorder, model.params), dtype=dtype,
                 max_shard_size=30_000)
    assert content(tmp_path / "plain") == content(tmp_path / "watched")
    assert Recorder.parts == 3 * 9 + 3  # each layer's tensors, embedding, final norm and output projection


@pytest.mark.parametrize("chunks", ["layers", "old"])
def test_one_layer_of_a_checkpoint_is_in_memory(tmp_path, run, monkeypatch, chunks):
    """Old checkpoints have the layers of a parameter in common chunks; these are read once."""
    source = run
    if chunks == "old":
        source = tmp_path / "old"
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints, "_chunks", lambda state: jax.tree.map(lambda _: ocp.SaveArgs(), state))
            make_run(source, tied=False)
    config, alive, largest = checkpoints.load_model(source), [], []
    read = saved_arrays.SavedArray._read

    def watched(array, begin, end):
        rows = read(array, begin, end)
        alive.append(weakref.ref(rows))
        largest.append(rows.nbytes)
        held = sum(part.nbytes for ref in alive if (part := ref()) is not None)
        assert held == rows.nbytes, "rows read before are still in memory"
        return rows

    monkeypatch.setattr(saved_arrays.SavedArray, "_read", watched)
    folder = exported(source, tmp_path / "hf")
    assert_same(load_decoder(folder)[1], load_language_model(source).params)
    layers = config.n_layers if chunks == "layers" else 1
    assert len(alive) == layers * 9 + 3
    assert max(largest) == 4 * config.vocab_size * config.embed_dim
    embed, mlp = config.embed_dim, config.mlp_dim
    assert sorted(set(largest))[-2] == 4 * embed * mlp * config.n_layers // layers


def test_devices_read_their_own_parts_alone(run, tmp_path):
    """On a mesh of 2 x 2 x 2, an eighth of nothing is read twice, and nothing is read whole that is divided."""
    config, params = load_decoder(exported(run, tmp_path / "hf"))
    abstract, asked = abstract_params(config, partitioning.make_mesh(2, 2, 2)), []

    class Parts:
        def __init__(self, array):
            self.array = array

        def __getitem__(self, index):
            asked.append(self.array[index].size)
            return self.array[index]

    def check(array, like):
        asked.clear()
        placed = partitioning.put_parts(Parts(array), like)
        assert placed.sharding == like.sharding and placed.dtype == like.dtype
        np.testing.assert_array_equal(placed, array)
        shard = np.prod(like.sharding.shard_shape(like.shape))
        assert asked == [shard] * (array.size // shard)

    jax.tree.map(check, params, abstract)


def refusal(message, *arguments, **settings):
    with pytest.raises(InputError, match=message):
        exported(*arguments, **settings)


def test_an_output_is_kept_made_again_refused_or_replaced(tmp_path, run, capfd):
    folder = exported(run, tmp_path / "hf")
    before, changed = content(folder), {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    exported(run, folder)
    assert "made before from the same inputs and settings, kept" in capfd.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == changed
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[-5] ^= 1
    (folder / "model.safetensors").write_bytes(raw)
    exported(run, folder)
    assert "damaged (model.safetensors does not hold the bytes" in capfd.readouterr().err
    assert content(folder) == before
    refusal(r'hf: exists, made with settings dtype = "float32" \(now "bfloat16"\);', run, folder, dtype="bfloat16")
    assert content(folder) == before
    exported(run, folder, dtype="bfloat16", overwrite=True, max_shard_size=9_000)
    exported(run, folder, overwrite=True)
    assert content(folder) == before  # no shard is left over
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_folders_of_others_are_refused(tmp_path, run):
    (tmp_path / "empty").mkdir()
    exported(run, tmp_path / "empty")
    (tmp_path / "empty/notes.txt").write_text("mine")
    refusal(r"empty: holds notes\.txt besides what", run, tmp_path / "empty", dtype="bfloat16", overwrite=True)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/config.json").write_text("{}")
    refusal("foreign: has no record of what it was made from", run, tmp_path / "foreign")
    (tmp_path / "file").write_text("")
    refusal("file: ", run, tmp_path / "file")
    refusal(r"run: (holds|has no record)", run, run, overwrite=False)


def test_another_checkpoint_of_the_same_step_is_another_input(tmp_path, run):
    folder = exported(run, tmp_path / "hf")
    make_run(tmp_path / "moved", tied=False)  # the same model elsewhere
    before = content(folder)
    exported(tmp_path / "moved", folder)
    assert content(folder) == before
    make_run(tmp_path / "other", tied=True)
    refusal(r"hf: exists, made with other inputs", tmp_path / "other", folder)


def test_damaged_weights_are_not_exported(tmp_path, run):
    """A checksum that is not that of the array: damage that the digests of the files do not show."""
    shutil.copytree(run, tmp_path / "run")
    step = tmp_path / "run/checkpoints/3"
    meta = json.loads((step / "meta/metadata").read_text())
    [name] = [name for name in meta["checksums"] if name.startswith("params/") and name.endswith("mlp/up")]
    meta["checksums"][name] = "0123456789abcdef"
    (step / "meta/metadata").write_text(json.dumps(meta))
    (step / "files.json").unlink()
    checksums.write_digests(epath.Path(step))
    refusal(rf"checkpoints/3: damaged: 1 of 12 arrays .* first is {name}", tmp_path / "run", tmp_path / "hf")
    [file] = [path for path in (step / "state").rglob("d/*") if path.stat().st_size > 100_000][:1]
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    refusal("checkpoints/3: damaged: state/.* does not hold", tmp_path / "run", tmp_path / "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


KILLED = """
import os, signal, sys
from mlx_pretrain.convert import decoders, export
decoders.write_json = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # when the weights are written
export.export_model(export.ExportConfig(sys.argv[1], sys.argv[2]))
"""


def test_a_killed_export_leaves_nothing_and_the_next_one_is_whole(tmp_path, run):
    done = subprocess.run([sys.executable, "-c", KILLED, run, tmp_path / "hf"],
                          env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    assert done.returncode == -9, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [".hf.partial"]
    folder = exported(run, tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert content(folder) == content(exported(run, tmp_path / "again"))


def test_a_full_disk_is_one_line(tmp_path, run):
    """A limit on the size of files, which the system reports as it reports a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        refusal(rf"^{tmp_path}/\.hf\.partial/model\.safetensors: cannot be written \(File too large\)$", run,
                tmp_path / "hf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_the_rest_of_generation_config_is_kept(tmp_path, run):
    first = exported(run, tmp_path / "first")
    generation = {"eos_token_id": [1, 2], "bos_token_id": 3, "pad_token_id": 2, "temperature": 0.6, "do_sample": True}
    (first / "generation_config.json").write_text(json.dumps(generation))
    (first / "chat_template.jinja").write_text("{{ messages }}")
    second = exported(first, tmp_path / "second", dtype="bfloat16")
    assert json.loads((second / "generation_config.json").read_text()) == generation
    config = json.loads((second / "config.json").read_text())
    assert [config[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [3, [1, 2], 2]
    assert (second / "chat_template.jinja").read_text() == "{{ messages }}"


@pytest.fixture
def shards(tmp_path, run):
    return exported(run, tmp_path / "shards", max_shard_size=20_000)


def rewrite_index(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def loading_fails(folder, message):
    for load in (load_decoder, load_language_model):
        with pytest.raises(InputError, match=message):
            load(folder)


def test_shards_that_are_missing_or_cut_off(shards):
    path = shards / "model-00002-of-00008.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    loading_fails(shards, r"model-00002-of-00008\.safetensors: not a safetensors file \(it has \d+ bytes, its header")
    path.unlink()
    loading_fails(shards, r"model-00002-of-00008\.safetensors: no such file")


def test_a_shard_with_a_tensor_of_another_shape(shards):
    [path] = [path for path in shards.glob("*.safetensors") if "model.norm.weight" in load_file(path)]
    safetensors.numpy.save_file(load_file(path) | {"model.norm.weight": np.zeros(5, np.float32)}, path)
    loading_fails(shards, rf"{path.name}: tensor model\.norm\.weight has shape \[5\], config\.json says \[32\]")


def test_a_tensor_in_two_shards(shards):
    one, two = sorted(shards.glob("*.safetensors"))[:2]
    name = next(iter(load_file(one)))
    safetensors.numpy.save_file(load_file(two) | {name: load_file(one)[name]}, two)
    loading_fails(shards, rf"{two.name}: tensor {name} is stored twice, also in {one.name}")


@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", 3, None,
                                  ".hidden.safetensors", "pytorch_model.bin", "a\n.safetensors", "-r/../x.safetensors"])
def test_an_index_that_leads_elsewhere(shards, tmp_path, file):
    shutil.copy(next(shards.glob("*.safetensors")), tmp_path / "x.safetensors")
    rewrite_index(shards, lambda names: names.update({"model.norm.weight": file}))
    loading_fails(shards, r"model\.safetensors\.index\.json: model\.norm\.weight is in .*, which is no file name of")


def test_an_index_that_is_wrong(shards):
    files = sorted(path.name for path in shards.glob("*.safetensors"))
    rewrite_index(shards, lambda names: names.update({"model.embed_tokens.weight": files[-1]}))
    loading_fails(shards, rf"{files[-1]}: no tensor model\.embed_tokens\.weight, which the index lists for it")
    (shards / "model.safetensors.index.json").write_text('{"weight_map": []}')
    loading_fails(shards, r"index\.json: no weight_map")


def test_a_tokenizer_survives_the_round_trip(tmp_path, run):
    model = load_language_model(exported(run, tmp_path / "hf"))
    text = "the cat sat on the mat. Ünïcode 猫"
    assert model.tokenizer.encode(text) == Tokenizer(run / "own.model").encode(text)
