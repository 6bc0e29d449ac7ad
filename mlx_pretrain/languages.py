"""Codes of languages and their names, writing directions, and the groups in which bits per byte can be compared."""

import re

UNDETERMINED = "und"  # ISO 639-2's code for an undetermined language

# code -> native name, English name.
LANGUAGES = {
    "af": ("Afrikaans", "Afrikaans"), "ar": ("العربية", "Arabic"), "az": ("Azərbaycanca", "Azerbaijani"),
    "bg": ("Български", "Bulgarian"), "bn": ("বাংলা", "Bengali"), "ca": ("Català", "Catalan"),
    "ceb": ("Cebuano", "Cebuano"), "cs": ("Čeština", "Czech"), "da": ("Dansk", "Danish"), "de": ("Deutsch", "German"),
    "el": ("Ελληνικά", "Greek"), "en": ("English", "English"), "es": ("Español", "Spanish"),
    "et": ("Eesti", "Estonian"),
    "fa": ("فارسی", "Persian"), "fi": ("Suomi", "Finnish"), "fr": ("Français", "French"), "ga": ("Gaeilge", "Irish"),
    "gu": ("ગુજરાતી", "Gujarati"), "he": ("עברית", "Hebrew"), "hi": ("हिन्दी", "Hindi"), "hr": ("Hrvatski", "Croatian"),
    "hu": ("Magyar", "Hungarian"), "id": ("Bahasa Indonesia", "Indonesian"), "is": ("Íslenska", "Icelandic"),
    "it": ("Italiano", "Italian"), "ja": ("日本語", "Japanese"), "jv": ("Basa Jawa", "Javanese"),
    "kk": ("Қазақша", "Kazakh"), "km": ("ខ្មែរ", "Khmer"), "kn": ("ಕನ್ನಡ", "Kannada"), "ko": ("한국어", "Korean"),
    "lt": ("Lietuvių", "Lithuanian"), "lv": ("Latviešu", "Latvian"), "ml": ("മലയാളം", "Malayalam"),
    "mr": ("मराठी", "Marathi"), "ms": ("Bahasa Melayu", "Malay"), "my": ("မြန်မာ", "Burmese"),
    "nl": ("Nederlands", "Dutch"), "no": ("Norsk", "Norwegian"), "pa": ("ਪੰਜਾਬੀ", "Punjabi"), "pl": ("Polski", "Polish"),
    "pt": ("Português", "Portuguese"), "ro": ("Română", "Romanian"), "ru": ("Русский", "Russian"),
    "sk": ("Slovenčina", "Slovak"), "sl": ("Slovenščina", "Slovenian"), "sq": ("Shqip", "Albanian"),
    "sr": ("Српски", "Serbian"), "sv": ("Svenska", "Swedish"), "sw": ("Kiswahili", "Swahili"), "ta": ("தமிழ்", "Tamil"),
    "te": ("తెలుగు", "Telugu"), "th": ("ไทย", "Thai"), "tl": ("Tagalog", "Tagalog"), "tr": ("Türkçe", "Turkish"),
    "uk": ("Українська", "Ukrainian"), "ur": ("اردو", "Urdu"), "uz": ("Oʻzbekcha", "Uzbek"),
    "vi": ("Tiếng Việt", "Vietnamese"), "zh": ("中文", "Chinese"),
}
RIGHT_TO_LEFT = frozenset({"ar", "arz", "ckb", "dv", "fa", "he", "ks", "ku", "ps", "sd", "ug", "ur", "yi"})
# UTF-8 bytes per letter decide what a bit per byte means, so languages are compared within these groups.
GROUPS = {
    1: "Mostly one byte per letter (Latin)",
    2: "Two bytes per letter (Greek, Cyrillic, Arabic, Hebrew)",
    3: "Three bytes per letter (Indic scripts, Thai, Han, kana, Hangul)",
    0: "Other languages",
}
# ISO 639-2 and 639-3 codes of the languages above, those of their largest varieties among them (cmn of zh, arb of ar).
_THREE_LETTERS = """
    afr als ara arb aze azj ben bul cat ceb ces cmn dan deu ekk ell eng est fas fil fin fra gle guj heb hin hrv hun ind
    isl ita jav jpn kan kaz khm kor lav lit lvs mal mar msa mya nld nob nor pan pes pol por ron rus slk slv spa sqi srp
    swa swe swh tam tel tgl tha tur ukr urd uzb uzn vie zho zsm
"""


def is_language(code: str) -> bool:
    """Returns whether `code` is of a language above, with or without script and region: "de", "zh-Hant", "pt_BR"."""
    language, *subtags = re.split("[-_]", code)
    return ((language.lower() in LANGUAGES or language.lower() in _THREE_LETTERS.split())
            and all(re.fullmatch("[A-Za-z]{2}|[A-Za-z]{4}|[0-9]{3}", subtag) for subtag in subtags))
