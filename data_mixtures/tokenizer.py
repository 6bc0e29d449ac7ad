"""Trains the tokenizer: SentencePiece on a temperature-balanced sample of all languages.

    python -m data_mixtures.tokenizer --gin_file=gin/mixtures/sample.gin --gin_file=gin/mixtures/prepare.gin

The model is lossless: decode(encode(text)) == text for every text, whatever its script, spaces, tabs and line ends,
because nothing is normalised and unknown characters fall back to their UTF-8 bytes. Two exceptions: U+2581 "▁", with
which SentencePiece itself spells the space, comes back as a space; lone surrogates are no text and cannot be encoded.
"""

import hashlib
import io
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import gin
import sentencepiece
from etils import epath

from data_mixtures.baselines import capped_budgets, temperature_rates
from mlx_pretrain import __version__
from mlx_pretrain.command_line import run
from mlx_pretrain.data.corpus import Corpus
from mlx_pretrain.data.token_store import BOS_ID, EOS_ID, PAD_ID, UNK_ID
from mlx_pretrain.data.tokenizers import Tokenizer
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import read_json, write_atomic, write_json

FORMAT = "mlx-tokenizer"
VERSION = 1


def _sentences(corpus: Corpus, split: str, language: str, max_bytes: int) -> Iterator[tuple[str, int]]:
    """Lines of a language's documents, cut to at most `max_bytes`, each with its length in bytes.

    Line ends are a piece of their own in the vocabulary, so training needs none; it refuses NUL.
    """
    step = max(max_bytes // 4, 1)  # a character has up to 4 bytes
    for document in corpus.documents(split, language):
        for line in document.text.replace("\0", "").splitlines():
            for start in range(0, len(line), step):
                yield (sentence := line[start : start + step]), len(sentence.encode())


def sample_sentences(
    corpus: Corpus, split: str, max_bytes: int, temperature: float, max_sentence_bytes: int
) -> tuple[Iterator[str], dict[str, int]]:
    """A sample of all languages, balanced by temperature and spread evenly over each language's text.

    Reads the corpus twice (sizes, then text); memory stays at one document. No randomness.

    Args:
      corpus, split: the text.
      max_bytes: size of the sample; a smaller corpus is taken whole.
      temperature: language shares are proportional to bytes^(1 / temperature), as far as there is text.
      max_sentence_bytes: longest sentence.

    Returns:
      The sentences, and language -> bytes of text aimed at.
    """
    sizes = {language: sum(size for _, size in _sentences(corpus, split, language, max_sentence_bytes))
             for language in corpus.languages_of(split)}
    rates = temperature_rates(sizes, temperature)
    budgets = {language: int(budget) for language, budget in capped_budgets(rates, max_bytes, sizes).items()}

    def sentences() -> Iterator[str]:
        for language, budget in budgets.items():
            seen = taken = 0
            for sentence, size in _sentences(corpus, split, language, max_sentence_bytes):
                seen += size
                if taken * sizes[language] < budget * seen:
                    taken += size
                    yield sentence

    return sentences(), budgets


def train_model(sentences: Iterator[str], config: Mapping[str, Any]) -> bytes:
    """Trains SentencePiece with the framework's special ids.

    Raises:
      InputError: the sample does not support the vocabulary size.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences,
            model_writer=model,
            model_type=config["model_type"],
            vocab_size=config["vocab_size"],
            character_coverage=config["character_coverage"],
            max_sentence_length=config["max_sentence_bytes"],
            num_threads=config["num_threads"],
            pad_id=PAD_ID, eos_id=EOS_ID, unk_id=UNK_ID, bos_id=BOS_ID,
            byte_fallback=True,
            split_digits=True,
            user_defined_symbols=["\n"],
            # Lossless: no Unicode normalisation, every space kept, no space put in front.
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            minloglevel=2,
        )
    except (RuntimeError, ValueError, OSError) as error:
        cause = str(error).splitlines()[0].rpartition("] ")[2] or str(error).splitlines()[0]
        raise InputError(f"train_tokenizer: SentencePiece cannot train on this sample: {cause}") from None
    return model.getvalue()


@gin.configurable
def train_tokenizer(
    corpus: Corpus = gin.REQUIRED,
    output: epath.PathLike = gin.REQUIRED,
    vocab_size: int = gin.REQUIRED,
    model_type: str = "unigram",
    max_bytes: int = 4_000_000,
    temperature: float = 3.33,
    character_coverage: float = 0.9995,
    max_sentence_bytes: int = 4096,
    num_threads: int = 2,
    split: str = "train",
    overwrite: bool = False,
) -> None:
    """Trains the tokenizer of a corpus and writes it, with a .json beside it that says how it was made.

    A tokenizer made before from the same files and settings is kept.

    Args:
      corpus: the documents.
      output: the model file, e.g. "runs/demo/tokenizer.model".
      vocab_size: number of pieces, 4 special and 256 byte pieces included.
      model_type: "unigram" or "bpe".
      max_bytes: size of the training sample over all languages.
      temperature: balances the languages in the sample; 1 natural, 3.33 that of XLM-R, large uniform.
      character_coverage: share of all characters that get a piece; the rest is spelled in bytes.
      max_sentence_bytes: longer lines are cut.
      num_threads: unigram's result depends on it in the last digits, so it is a setting and not the core count.
      split: the split to train on.
      overwrite: replaces a tokenizer that was made otherwise.
    """
    if model_type not in ("unigram", "bpe"):
        raise InputError(f"train_tokenizer.model_type: {model_type!r}, known are unigram and bpe")
    output = epath.Path(output)
    sidecar = output.with_suffix(".json")
    config = {"vocab_size": vocab_size, "model_type": model_type, "max_bytes": max_bytes, "temperature": temperature,
              "character_coverage": character_coverage, "max_sentence_bytes": max_sentence_bytes,
              "num_threads": num_threads, "split": split, **corpus.settings}
    made_from = {"config": config, "inputs": {l: corpus.hashes(split, l) for l in corpus.languages_of(split)}}
    if output.exists() and not overwrite:
        record = read_json(sidecar, "tokenizer record") if sidecar.exists() else {}
        if any(record.get(key) != value for key, value in made_from.items()):
            raise InputError(f"{output}: exists, made from other files or settings; set train_tokenizer.overwrite=True "
                             "to replace it")
        if record.get("sha256") == Tokenizer(output).sha256:
            print(f"{output}: made before from the same files and settings, kept", file=sys.stderr)
            return
    start = time.perf_counter()
    sentences, sampled = sample_sentences(corpus, split, max_bytes, temperature, max_sentence_bytes)
    print(f"training a {model_type} tokenizer of {vocab_size} pieces on {sum(sampled.values()) / 1e6:.1f} MB of text "
          f"in {len(sampled)} languages", file=sys.stderr)
    model = train_model(sentences, config)
    record = {"format": FORMAT, "version": VERSION, "sha256": hashlib.sha256(model).hexdigest(), **made_from,
              "sampled_bytes": sampled, "provenance": {"program": "data_mixtures.tokenizer", "version": __version__,
                                                       "sentencepiece": sentencepiece.__version__}}
    output.unlink(missing_ok=True)  # record first, model last: a model always has its own record
    write_json(sidecar, record)
    write_atomic(output, model)
    print(f"{output}: trained in {time.perf_counter() - start:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    run(train_tokenizer, "data_mixtures.tokenizer")
