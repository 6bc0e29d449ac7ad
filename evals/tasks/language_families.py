"""MuBench's 61 languages by family (arXiv 2506.19468), which gives the order of tables and heat maps."""

from collections.abc import Iterable

FAMILIES: dict[str, tuple[str, ...]] = {
    "Germanic": ("en", "de", "nl", "sv", "da", "no", "af", "is"),
    "Romance": ("fr", "es", "pt", "it", "ro", "ca"),
    "Slavic": ("ru", "pl", "uk", "cs", "bg", "sr", "hr", "sk", "sl"),
    "Hellenic": ("el",),
    "Indo-Aryan": ("hi", "bn", "ur", "mr", "pa", "gu"),
    "Iranian": ("fa",),
    "Baltic": ("lt", "lv"),
    "Celtic": ("ga",),
    "Albanian": ("sq",),
    "Sino-Tibetan": ("zh", "my"),
    "Turkic": ("tr", "uz", "kk", "az"),
    "Austronesian": ("id", "tl", "ms", "jv", "ceb"),
    "Dravidian": ("ta", "te", "ml", "kn"),
    "Uralic": ("fi", "hu", "et"),
    "Afro-Asiatic": ("ar", "he"),
    "Austroasiatic": ("vi", "km"),
    "Koreanic": ("ko",),
    "Japonic": ("ja",),
    "Kra-Dai": ("th",),
    "Niger-Congo": ("sw",),
}
LANGUAGES = tuple(language for family in FAMILIES.values() for language in family)
# Languages written without spaces between words, where a choice follows its prompt without one.
UNSPACED = frozenset({"zh", "ja", "th", "my", "km"})
OTHER = "other"
ENGLISH = "en"


def family(language: str) -> str:
    """Returns the family of a language; "other" for languages that MuBench does not have."""
    return next((name for name, members in FAMILIES.items() if language in members), OTHER)


def by_family(languages: Iterable[str]) -> list[str]:
    """Returns the languages, each once, in MuBench's order, then the others alphabetically."""
    ranks = {language: rank for rank, language in enumerate(LANGUAGES)}
    return sorted(set(languages), key=lambda language: (ranks.get(language, len(ranks)), language))
