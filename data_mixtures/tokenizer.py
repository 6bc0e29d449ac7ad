"""Trains the tokenizer: SentencePiece on a temperature-balanced sample of all languages.

    python -m data_mixtures.tokenizer --gin_file=gin/mixtures/sample.gin --gin_file=gin/mixtures/prepare.gin

The model is lossless: decode(encode(text)) == text for every text, whatever its script, spaces, tabs and line ends,
because texts are not normalised and unknown characters fall back to their UTF-8 bytes. Two exceptions: U+2581 "▁", with
which SentencePiece itself spells the space, is decoded as a space; lone surrogates are no text and cannot be encoded.
"""

import dataclasses
import io
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

import gin
import sentencepiece
from etils import epath

from data_mixtures.baselines import capped_budgets, temperature_rates
from mlx_pretrain import __version__
from mlx_pretrain.artifacts import is_current_file, settings_of, write_with_record
from mlx_pretrain.command_line import run
from mlx_pretrain.data.corpus import Corpus
from mlx_pretrain.data.token_store import BOS_ID, EOS_ID, PAD_ID, UNK_ID
from mlx_pretrain.data.tokenizers import Tokenizer
from mlx_pretrain.errors import InputError
from mlx_pretrain.parallel.cluster import log

FORMAT = "mlx-tokenizer"
VERSION = 1


def _sentences(corpus: Corpus, split: str, language: str, max_bytes: int) -> Iterator[tuple[str, int]]:
    """Yields the lines of a language's documents, cut to at most `max_bytes`, each with its length in bytes.

    Line ends have their own piece in the vocabulary, so the sample needs none. SentencePiece refuses NUL.
    """
    step = max(max_bytes // 4, 1)  # a character has up to 4 bytes
    for document in corpus.documents(split, language):
        for line in document.text.replace("\0", "").splitlines():
            for start in range(0, len(line), step):
                yield (sentence := line[start : start + step]), len(sentence.encode())


def sample_sentences(
    corpus: Corpus, split: str, max_bytes: int, temperature: float, max_sentence_bytes: int
) -> tuple[Iterator[str], dict[str, int]]:
    """Samples all languages, balanced by temperature and spread evenly over each language's text.

    Reads the corpus twice (sizes, then text); memory stays at one document. No randomness.

    Args:
      corpus, split: the text.
      max_bytes: size of the sample; a smaller corpus is taken whole.
      temperature: bytes of a language are proportional to (bytes in the corpus)^(1 / temperature), up to all its text.
      max_sentence_bytes: longest sentence.

    Returns:
      The sentences, and language -> bytes to sample.
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


def train_model(sentences: Iterator[str], settings: Mapping[str, Any]) -> bytes:
    """Trains SentencePiece with the framework's special ids and returns the model file's bytes.

    Raises:
      InputError: the sample does not support the vocabulary size.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences,
            model_writer=model,
            model_type=settings["model_type"],
            vocab_size=settings["vocab_size"],
            character_coverage=settings["character_coverage"],
            max_sentence_length=settings["max_sentence_bytes"],
            num_threads=settings["num_threads"],
            hard_vocab_limit=not settings.get("allow_fewer"),
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
        if most := re.search(r"Vocabulary size too high .*<= (\d+)", cause):
            raise InputError(f"train_tokenizer.vocab_size = {settings['vocab_size']}: there is too little text for "
                             f"more than {most[1]} pieces") from None
        raise InputError(f"train_tokenizer: SentencePiece cannot train on this sample: {cause}") from None
    return model.getvalue()


@gin.configurable("train_tokenizer")
@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Parameters of the tokenizer's training.

    Attributes:
      corpus: documents, e.g. @Corpus().
      output: model file, e.g. "runs/demo/tokenizer.model".
      vocab_size: number of pieces, 4 special and 256 byte pieces included.
      model_type: "unigram" or "bpe".
      max_bytes: size of the training sample over all languages.
      temperature: balance of the languages in the sample; 1 natural, 3.33 that of XLM-R, large values uniform.
      character_coverage: share of all characters that get a piece; the others are spelled in bytes.
      max_sentence_bytes: length to which lines are cut.
      num_threads: threads of SentencePiece. Unigram's result depends on it in the last digits, so that it is a setting
        and not the number of cores.
      split: split to train on.
      overwrite: replaces a tokenizer that was made from other files or settings.
      allow_fewer: makes fewer pieces where there is too little text for vocab_size, instead of failing; for unigram.
    """

    corpus: Corpus = gin.REQUIRED
    output: epath.PathLike = gin.REQUIRED
    vocab_size: int = gin.REQUIRED
    model_type: str = "unigram"
    max_bytes: int = 4_000_000
    temperature: float = 3.33
    character_coverage: float = 0.9995
    max_sentence_bytes: int = 4096
    num_threads: int = 2
    split: str = "train"
    overwrite: bool = False
    allow_fewer: bool = False

    def __post_init__(self):
        if self.model_type not in ("unigram", "bpe"):
            raise InputError(f"train_tokenizer.model_type: {self.model_type!r}, known are unigram and bpe")
        if self.allow_fewer and self.model_type == "bpe":
            raise InputError("train_tokenizer.allow_fewer: bpe makes exactly vocab_size pieces")


def train_tokenizer(config: TokenizerConfig) -> None:
    """Trains the tokenizer of a corpus and writes it, with a .json beside it that records how it was made.

    A tokenizer made before from the same files and settings is kept.

    Raises:
      InputError: documents cannot be read, the sample does not support the vocabulary size, or a tokenizer made from
        others is in the way.
    """
    corpus, output, split = config.corpus, epath.Path(config.output), config.split
    sidecar = output.with_suffix(".json")
    settings = settings_of(config)
    del settings["corpus"]
    if not config.allow_fewer:
        del settings["allow_fewer"]  # earlier versions did not record it
    settings |= corpus.record_settings
    made_from = {"config": settings, "inputs": {l: corpus.hashes(split, l) for l in corpus.languages_of(split)}}
    if is_current_file(output, sidecar, made_from, overwrite=config.overwrite):
        return
    start = time.perf_counter()
    sentences, sampled = sample_sentences(corpus, split, config.max_bytes, config.temperature,
                                          config.max_sentence_bytes)
    log(f"training a {config.model_type} tokenizer of {config.vocab_size} pieces on "
        f"{sum(sampled.values()) / 1e3:,.0f} KB of text in {len(sampled)} languages")
    model = train_model(sentences, settings)
    record = {"format": FORMAT, "version": VERSION, **made_from, "sampled_bytes": sampled, "provenance": {
        "program": "data_mixtures.tokenizer", "version": __version__, "sentencepiece": sentencepiece.__version__}}
    write_with_record(output, model, sidecar, record)
    pieces = Tokenizer(output).vocab_size
    fewer = f" (of {config.vocab_size} wanted: there is too little text for more)" * (pieces < config.vocab_size)
    log(f"{output}: {pieces} pieces{fewer}, trained in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    run(train_tokenizer, TokenizerConfig, "data_mixtures.tokenizer")
