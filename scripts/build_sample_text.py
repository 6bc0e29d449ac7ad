"""Builds the sample text of the repository from a folder of aligned multilingual documents.

    python scripts/build_sample_text.py --corpus=DIR --out=samples/text

DIR holds `<lang>.jsonl.xz`, one JSON per line `{id, source, lang, text}`, with ids aligned across languages within a
source. Writes OUT/train/<lang>.jsonl.xz and OUT/heldout/<lang>.jsonl.xz, the same bytes on every run, and prints what
was dropped and why. Standard library only.
"""

import argparse
import hashlib
import itertools
import json
import lzma
import os
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path

SEED = "sample-text-1"
LANGUAGES = [
    "ar", "cs", "de", "el", "en", "es", "fr", "hi", "id", "it", "ja", "ko", "nl", "pl", "pt", "ru", "tr", "vi", "zh"]
SCRIPTS = {"ar": "ARABIC", "el": "GREEK", "hi": "DEVANAGARI", "ja": "CJK HIRAGANA KATAKANA", "ko": "HANGUL",
           "ru": "CYRILLIC", "zh": "CJK"}

# Bytes of text per language, and the most that one source takes of it while another source has documents left.
BYTES_PER_LANGUAGE = 930_000
SHARES = {"udhr": 1.0, "gnome-help": 0.35, "debian-handbook": 0.35, "libreoffice-help": 1.0}

# Bytes of text held out per source where a language has much of it, else HELDOUT_SHARE of what it has.
HELDOUT = {"udhr": 1_500, "libreoffice-help": 8_000, "debian-handbook": 12_000, "gnome-help": 7_000}
HELDOUT_SHARE, HELDOUT_SHARE_MAXIMUM = 0.12, 0.15
HELDOUT_MINIMUM, HELDOUT_MAXIMUM = 25_000, 40_000
HELDOUT_DOCUMENT = 10_000

SHORTEST, LONGEST = 200, 40_000  # columns; articles of the declaration may be shorter
PARAGRAPH = 80  # columns; shorter lines are headings and menu paths that repeat everywhere

ENGLISH = {
    "the", "and", "with", "for", "that", "this", "you", "are", "from", "by", "be", "can", "which", "will", "your",
    "been", "have", "these", "when", "not"}
CODE = re.compile(r"[{}]$|\);$|^\s*(Sub|End|Dim|Function|Next|Loop|REM|#|\$|def|import|print|MsgBox|<\w)\b"
                  r"|^\S*\(\S*\)$|^\S+ = |^\s*[/$#=]")


def columns(text):
    """Returns the width of `text` in columns; Han, Kana and Hangul count two, as each is worth about two letters."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def is_code(line):
    """Returns whether a line is a command, program text, or mostly symbols and digits rather than words."""
    symbols = [character for character in line if not character.isspace()]
    letters = sum(unicodedata.category(character)[0] in "LM" for character in symbols)
    wide = columns(line) > 1.5 * len(line)
    return letters < (0.5 if wide else 0.7) * len(symbols) or bool(CODE.search(line))


def is_english(line, untranslated, lang):
    """Returns whether a line is English: several translations share it, or it is full of English words."""
    words = re.findall(r"[^\W\d_]+", line)
    latin = sum(word.isascii() for word in words)
    if line.count(" ") < 2:
        return False
    # A sentence without one letter of the language's own script; commands start with a small letter.
    if lang in SCRIPTS and latin == len(words) and line[0].isupper():
        return len(words) >= (3 if line.endswith(".") else 4)
    if len(words) < 4 or latin < 0.8 * len(words):
        return False
    hits = [word.lower() for word in words if word.lower() in ENGLISH]
    kinds = len(set(hits))
    return line in untranslated or len(hits) >= (0.12 if kinds >= 3 else 0.2 if kinds == 2 else 1) * len(words)


def untranslated_lines(corpus):
    """Returns key -> lines of the English document, or lines that at least three other languages share."""
    counts = defaultdict(Counter)
    for lang, documents in corpus.items():
        for key, text in documents.items():
            for line in set(text.split("\n")):
                counts[key][line] += 3 if lang == "en" else 1
    return {key: {line for line, count in lines.items() if count >= 3} for key, lines in counts.items()}


def own_script(text, lang):
    """Returns the share of the letters of `text` in the script of `lang`; 1 for languages written in Latin letters."""
    if lang not in SCRIPTS:
        return 1.0
    letters = [character for character in text if character.isalpha()]
    names = tuple(SCRIPTS[lang].split())
    return sum(unicodedata.name(character, "").startswith(names) for character in letters) / max(1, len(letters))


def paragraphs(text):
    """Returns the lines of `text` long enough that a repetition is no accident."""
    return [line for line in text.split("\n") if columns(line) >= PARAGRAPH]


def order(key):
    """Returns a seeded hash of (source, id), which shuffles documents alike in every language and run."""
    return hashlib.sha256("\t".join((SEED, *key)).encode()).hexdigest()


def size(text):
    return len(text.encode())


def read(corpus, lang, dropped):
    """Returns (source, id) -> text of one language, from the sources that may be shipped."""
    path = Path(corpus) / f"{lang}.jsonl.xz"
    documents = {}
    try:
        with lzma.open(path, "rt", encoding="utf-8") as file:
            for line in file:
                record = json.loads(line)
                key = record["source"], record["id"]
                if record["source"] not in SHARES:
                    dropped["source not shipped"] += 1
                    continue
                # Portuguese has two GNOME translations under one id: the second is Brazilian, like its other sources.
                dropped["other variant of the same id"] += key in documents
                documents[key] = record["text"]
    except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError, ValueError, KeyError) as error:
        sys.exit(f"error: {path}: {type(error).__name__}: {error}")
    return documents


def clean(documents, untranslated, lang, dropped):
    """Returns the documents fit for training, without paragraphs that their translators left in English."""
    kept, seen = {}, set()
    for key, text in sorted(documents.items()):
        lines = [line for line in text.split("\n") if line.strip()]
        prose = [line for line in lines if not is_code(line)]
        english = {line for line in prose if lang != "en" and is_english(line, untranslated[key], lang)}
        if len(english) > 0.3 * len(prose):
            dropped["mostly untranslated"] += 1
            continue
        lines = [line for line in lines if line not in english]
        text = "\n".join(lines)
        width = columns(text)
        program = sum(columns(line) for line in lines if is_code(line))
        listing = sum(columns(line) for line in lines if columns(line) < PARAGRAPH // 2)
        if key[0] == "udhr":
            reason = None
        elif width < SHORTEST:
            reason = "too short"
        elif width > LONGEST:
            reason = "too long"
        elif program > 0.25 * width:
            reason = "mostly code or symbols"
        elif listing > 0.5 * width:
            reason = "mostly headings and lists"
        elif own_script(text, lang) < 0.6:
            reason = "mostly another script"
        else:
            reason = None
        if reason is None and text in seen:
            reason = "exact duplicate"
        if reason:
            dropped[reason] += 1
            continue
        dropped["(paragraphs left in English, cut out)"] += len(english)
        seen.add(text)
        kept[key] = text
    return kept


def choose_heldout(corpus, keys):
    """Returns the ids (source, id) held out in every language, most widely translated first, about equal in size."""
    heldout, held = set(), {lang: Counter() for lang in corpus}
    available = {lang: Counter() for lang in corpus}
    for lang, documents in corpus.items():
        for key, text in documents.items():
            available[lang][key[0]] += size(text)
    shared = sharing(corpus)
    maximum = {lang: min(HELDOUT_MAXIMUM, HELDOUT_SHARE_MAXIMUM * available[lang].total()) for lang in corpus}

    def target(lang, source):
        """Returns the bytes to hold out of a source, or of all sources together (None)."""
        if source:
            return min(HELDOUT[source], HELDOUT_SHARE * available[lang][source])
        return min(HELDOUT_MINIMUM, HELDOUT_SHARE * available[lang].total())

    # A document is held out in all its languages, so first those that nearly all of their languages still want;
    # each language counts in units of its own target, or those with little text would never be served.
    for source, useful in itertools.product((*HELDOUT, None), (0.9, 0.7, 0.5, 0.3, 0.15)):
        for key in keys:
            if key in heldout or source not in (key[0], None) or len(shared[key]) > 1:
                continue
            sizes = {lang: size(documents[key]) for lang, documents in corpus.items() if key in documents}
            gain = cost = 0
            for lang, length in sizes.items():
                aim = target(lang, source)
                missing = aim - (held[lang][source] if source else held[lang].total())
                gain += min(max(0, missing), length) / aim
                cost += length / aim
            if gain < useful * cost or max(sizes.values()) > HELDOUT_DOCUMENT:
                continue
            if all(held[lang].total() + length <= maximum[lang] for lang, length in sizes.items()):
                heldout.add(key)
                for lang, length in sizes.items():
                    held[lang][key[0]] += length
    return heldout


def sharing(corpus):
    """Returns key -> the other keys that share a whole paragraph with it in some language."""
    shared = defaultdict(set)
    for documents in corpus.values():
        owners = defaultdict(set)
        for key, text in documents.items():
            for paragraph in paragraphs(text):
                owners[paragraph].add(key)
        for keys in owners.values():
            for key in keys if len(keys) > 1 else ():
                shared[key] |= keys - {key}
    return shared


def choose_training(documents, keys, budget, dropped):
    """Takes up to `budget` bytes of documents in the order of `keys`; sources over their share wait for a second
    round."""
    chosen, repeating, seen, taken = set(), set(), set(), Counter()
    for limited in (True, False):
        for key in keys:
            text = documents.get(key)
            if text is None or key in chosen or taken.total() + size(text) > budget:
                continue
            if limited and taken[key[0]] + size(text) > SHARES[key[0]] * budget:
                continue
            long = paragraphs(text)
            if sum(columns(line) for line in long if line in seen) > 0.5 * columns(text):
                repeating.add(key)
                continue
            chosen.add(key)
            seen.update(long)
            taken[key[0]] += size(text)
    dropped["repeats paragraphs of others"] = len(repeating - chosen)
    dropped["beyond the budget"] = len(documents) - len(chosen | repeating)
    return chosen


def write(path, documents, lang):
    """Writes documents in shuffled order, atomically."""
    lines = [json.dumps({"id": "/".join(key), "source": key[0], "lang": lang, "text": documents[key]},
                        ensure_ascii=False) + "\n" for key in sorted(documents, key=order)]
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_bytes(lzma.compress("".join(lines).encode(), preset=9 | lzma.PRESET_EXTREME))
    scratch.replace(path)


def cell(documents):
    """Returns number of documents, bytes of text, and documents per source, as cells of a Markdown table."""
    counts = Counter(key[0] for key in documents)
    sources = " + ".join(str(counts[source]) for source in SHARES)
    return f"{len(documents)} | {sum(map(size, documents.values())):,} | {sources}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", required=True, help="folder of <lang>.jsonl.xz")
    parser.add_argument("--out", default="samples/text", help="folder of the sample")
    arguments = parser.parse_args()
    dropped = {lang: Counter() for lang in LANGUAGES}
    corpus = {lang: read(arguments.corpus, lang, dropped[lang]) for lang in LANGUAGES}
    untranslated = untranslated_lines(corpus)
    corpus = {lang: clean(corpus[lang], untranslated, lang, dropped[lang]) for lang in LANGUAGES}

    coverage = Counter(key for documents in corpus.values() for key in documents)
    sources = list(SHARES)
    # Most widely translated first; pages on functions of the Basic language, terse and all alike, after the others.
    keys = sorted(coverage, key=lambda key: (
        sources.index(key[0]), key[1].startswith("sbasic/"), -coverage[key], order(key)))
    heldout = choose_heldout(corpus, keys)
    # Dropped in every language: where two originals share a paragraph, their translations only differ in wording.
    shared = sharing(corpus)
    leaking = set().union(*(shared[key] for key in heldout)) - heldout

    rows, total = [], 0
    for lang, documents in corpus.items():
        dropped[lang]["shares a paragraph with a held-out document"] = sum(key in leaking for key in documents)
        parts = {"heldout": {key: text for key, text in documents.items() if key in heldout}}
        rest = {key: text for key, text in documents.items() if key not in heldout | leaking}
        budget = BYTES_PER_LANGUAGE - sum(map(size, parts["heldout"].values()))
        parts["train"] = {key: rest[key] for key in choose_training(rest, keys, budget, dropped[lang])}
        for part, selected in parts.items():
            path = Path(arguments.out) / part / f"{lang}.jsonl.xz"
            write(path, selected, lang)
            total += path.stat().st_size
        rows.append(f"| {lang} | {cell(parts['train'])} | {cell(parts['heldout'])} |")
        print(f"{lang}: dropped " + ", ".join(f"{count} {reason}" for reason, count in dropped[lang].items() if count))
    print(f"{len(heldout)} ids held out, {len(leaking)} more kept out of training for a paragraph they share")
    print(f"{total:,} bytes in {2 * len(rows)} files; documents, bytes of text, and documents of {' + '.join(SHARES)}:")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
