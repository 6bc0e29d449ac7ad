"""MuBench's 61 languages by family (arXiv 2506.19468), which orders tables and heat maps."""

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
# Written without spaces between words: an option follows its prompt without one.
UNSPACED = frozenset({"zh", "ja", "th", "my", "km"})
OTHER = "other"
ENGLISH = "en"


def family(language: str) -> str:
    """Of a language; "other" for those that MuBench has not."""
    return next((name for name, members in FAMILIES.items() if language in members), OTHER)


def by_family(languages) -> list[str]:
    """In MuBench's order, others at the end in the alphabet's."""
    places = {language: place for place, language in enumerate(LANGUAGES)}
    return sorted(set(languages), key=lambda language: (places.get(language, len(places)), language))
