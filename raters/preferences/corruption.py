"""Makes documents worse in known ways, which a rater should notice in any language.

Every corruption works on any script (`mlx_pretrain.data.word_boundaries`) and adds no text of another language, which
would give it away; boilerplate has phrases in 21 languages. All of this is our own formulation.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from mlx_pretrain.data.documents import Document
from mlx_pretrain.data.word_boundaries import join, split_sentences, split_words
from mlx_pretrain.errors import InputError

# Language -> lines that web pages carry around their text.
_BOILERPLATE = {
    "ar": ("مشاركة على فيسبوك | تغريد", "اقرأ المزيد", "جميع الحقوق محفوظة © 2021",
           "نستخدم ملفات تعريف الارتباط. موافق", "الرئيسية > الأخبار > التالي"),
    "cs": ("Sdílet na Facebooku, Twitter", "Číst dál...", "Všechna práva vyhrazena © 2021",
           "Používáme soubory cookie. Souhlasím", "Domů > Novinky > Další"),
    "de": ("Auf Facebook teilen, Twitter", "Weiterlesen...", "Alle Rechte vorbehalten © 2021",
           "Wir verwenden Cookies. Akzeptieren", "Startseite > Aktuelles > Weiter"),
    "el": ("Κοινοποίηση στο Facebook, Twitter", "Διαβάστε περισσότερα...", "Με επιφύλαξη παντός δικαιώματος © 2021",
           "Χρησιμοποιούμε cookies. Αποδοχή", "Αρχική > Νέα > Επόμενο"),
    "en": ("Share on Facebook, Twitter", "Read more...", "All rights reserved © 2021",
           "We use cookies. Accept", "Home > News > Next"),
    "es": ("Compartir en Facebook, Twitter", "Leer más...", "Todos los derechos reservados © 2021",
           "Utilizamos cookies. Aceptar", "Inicio > Noticias > Siguiente"),
    "fr": ("Partager sur Facebook, Twitter", "Lire la suite...", "Tous droits réservés © 2021",
           "Nous utilisons des cookies. Accepter", "Accueil > Actualités > Suivant"),
    "hi": ("फेसबुक पर साझा करें, ट्विटर", "और पढ़ें...", "सर्वाधिकार सुरक्षित © 2021",
           "हम कुकीज़ का उपयोग करते हैं। स्वीकार करें", "होम > समाचार > अगला"),
    "id": ("Bagikan di Facebook, Twitter", "Baca selengkapnya...", "Hak cipta dilindungi © 2021",
           "Kami menggunakan cookie. Setuju", "Beranda > Berita > Berikutnya"),
    "it": ("Condividi su Facebook, Twitter", "Leggi tutto...", "Tutti i diritti riservati © 2021",
           "Utilizziamo i cookie. Accetta", "Home > Notizie > Avanti"),
    "ja": ("フェイスブックでシェア、ツイート", "続きを読む…", "無断転載を禁じます © 2021",
           "クッキーを使用しています。同意する", "ホーム > ニュース > 次へ"),
    "ko": ("페이스북 공유, 트위터", "더 보기...", "모든 권리 보유 © 2021",
           "쿠키를 사용합니다. 동의", "홈 > 뉴스 > 다음"),
    "nl": ("Delen op Facebook, Twitter", "Lees meer...", "Alle rechten voorbehouden © 2021",
           "Wij gebruiken cookies. Accepteren", "Home > Nieuws > Volgende"),
    "pl": ("Udostępnij na Facebooku, Twitter", "Czytaj więcej...", "Wszelkie prawa zastrzeżone © 2021",
           "Używamy plików cookie. Akceptuję", "Strona główna > Aktualności > Dalej"),
    "pt": ("Compartilhar no Facebook, Twitter", "Leia mais...", "Todos os direitos reservados © 2021",
           "Usamos cookies. Aceitar", "Início > Notícias > Próximo"),
    "ro": ("Distribuie pe Facebook, Twitter", "Citește mai mult...", "Toate drepturile rezervate © 2021",
           "Folosim cookie-uri. Accept", "Acasă > Știri > Următorul"),
    "ru": ("Поделиться в Facebook, Twitter", "Читать далее...", "Все права защищены © 2021",
           "Мы используем файлы cookie. Принять", "Главная > Новости > Далее"),
    "th": ("แชร์บนเฟซบุ๊ก ทวิตเตอร์", "อ่านต่อ...", "สงวนลิขสิทธิ์ © 2021",
           "เราใช้คุกกี้ ยอมรับ", "หน้าแรก > ข่าว > ถัดไป"),
    "tr": ("Facebook'ta paylaş, Twitter", "Devamını oku...", "Tüm hakları saklıdır © 2021",
           "Çerezleri kullanıyoruz. Kabul et", "Ana sayfa > Haberler > Sonraki"),
    "vi": ("Chia sẻ lên Facebook, Twitter", "Đọc thêm...", "Bảo lưu mọi quyền © 2021",
           "Chúng tôi sử dụng cookie. Đồng ý", "Trang chủ > Tin tức > Tiếp theo"),
    "zh": ("分享到微博、微信", "阅读更多……", "版权所有 © 2021",
           "我们使用 Cookie。同意", "首页 > 新闻 > 下一页"),
}

_NOISE = 0.15  # share of characters misread at severity 1
_LOOKALIKES = str.maketrans("lI1O0oceS5B8g9Z2uvnm", "1l|0O0ec5S8B9g2Zvumn")


def _generator(seed: int, document: Document, purpose: str) -> np.random.Generator:
    """Returns a random generator for a document, the same for its translations."""
    key = "\0".join([str(seed), document.source, document.id, purpose])
    return np.random.default_rng(int.from_bytes(hashlib.sha256(key.encode()).digest()[:16]))


def _permute(rng: np.random.Generator, units: Sequence[str], severity: float) -> list[str]:
    """Permutes a share `severity` of the units, at least two."""
    units = list(units)
    filled = [i for i, unit in enumerate(units) if unit.strip()]
    count = min(max(math.ceil(severity * len(filled)), 2), len(filled))
    chosen = np.sort(rng.choice(filled, count, replace=False)) if filled else []
    # A shuffle that returns the same order is replaced by a rotation.
    order = rng.permutation(chosen)
    if np.array_equal(order, chosen):
        order = np.roll(order, 1)
    for to, unit in zip(chosen, [units[i] for i in order]):
        units[to] = unit
    return units


def _shuffle_words(rng: np.random.Generator, document: Document, severity: float) -> str:
    units, gaps = split_words(document.text)
    return join(_permute(rng, units, severity), gaps)


def _shuffle_sentences(rng: np.random.Generator, document: Document, severity: float) -> str:
    units, gaps = split_sentences(document.text)
    return join(_permute(rng, units, severity), gaps)


def _insert_lines(rng: np.random.Generator, text: str, new: Iterable[str]) -> str:
    lines = text.split("\n")
    for line in new:
        lines.insert(int(rng.integers(len(lines) + 1)), line)
    return "\n".join(lines)


def _boilerplate(rng: np.random.Generator, document: Document, severity: float) -> str:
    """Inserts lines of boilerplate, at severity 1 one per line of the text and at least 12."""
    phrases = _BOILERPLATE.get(document.language, _BOILERPLATE["en"])
    count = math.ceil(severity * max(document.text.count("\n") + 1, 12))
    return _insert_lines(rng, document.text, (phrases[i] for i in rng.integers(len(phrases), size=count)))


def _duplicate(rng: np.random.Generator, document: Document, severity: float) -> str:
    """Inserts copies of paragraphs (lines), at severity 1 one per paragraph."""
    paragraphs = [line for line in document.text.split("\n") if line.strip()]
    count = math.ceil(severity * len(paragraphs))
    return _insert_lines(rng, document.text, (paragraphs[i] for i in rng.integers(len(paragraphs), size=count)))


def _truncate(rng: np.random.Generator, document: Document, severity: float) -> str:
    """Keeps the beginning, at least a tenth of the text, and ends within a sentence."""
    units, gaps = split_sentences(document.text)
    keep = 1 - 0.9 * severity * rng.uniform(0.5, 1)
    ends = np.cumsum([len(unit) + len(gap) for unit, gap in zip(units, gaps)])
    last = int(np.searchsorted(ends, keep * ends[-1]))
    last = next((i for i in [*range(last, len(units)), *range(last, -1, -1)] if len(units[i].strip()) > 1), last)
    inner_words, inner_gaps = split_words(units[last])
    cut = len(inner_words) // 2
    rest = join(inner_words[:cut], inner_gaps[: cut + 1]) if cut else units[last][: len(units[last]) // 2]
    return join([*units[:last], rest.rstrip()], [*gaps[: last + 1], ""])


def _misread(rng: np.random.Generator, document: Document, severity: float) -> str:
    """Replaces characters as a bad scan does: by lookalikes or others of the text, or lost, doubled, cut apart."""
    text = document.text
    letters = [c for c in text if c.isalpha()]
    if not letters:
        return text
    hit = rng.random(len(text)) < _NOISE * severity
    hit[rng.choice([i for i, c in enumerate(text) if c.isalpha()])] = True
    errors, others = rng.integers(5, size=len(text)), rng.integers(len(letters), size=len(text))
    read = []
    for character, wrong, error, other in zip(text, hit, errors, others):
        if not wrong or character == "\n":
            read.append(character)
        elif error <= 1:
            lookalike = character.translate(_LOOKALIKES)
            read.append(lookalike if lookalike != character else letters[other])
        else:
            read.append(("", character * 2, character + " ")[error - 2])
    return "".join(read)


CORRUPTIONS: Mapping[str, Callable[[np.random.Generator, Document, float], str]] = {
    "shuffled-words": _shuffle_words,
    "shuffled-sentences": _shuffle_sentences,
    "boilerplate": _boilerplate,
    "ocr": _misread,
    "truncated": _truncate,
    "duplicated": _duplicate,
}


def corrupt(document: Document, corruption: str, severity: float, seed: int = 0) -> Document:
    """Returns the document made worse, deterministic in (seed, source and id of the document, corruption, severity).

    Args:
      document: document; a text without anything to change (one sentence to shuffle) stays as it is.
      corruption: key of CORRUPTIONS.
      severity: share of the document that is hit, in (0, 1].
      seed: seed of all draws.

    Returns:
      A document with the id "<id>#<corruption>", so that corrupted translations of one document stay aligned.

    Raises:
      InputError: unknown corruption, or severity out of range.
    """
    if corruption not in CORRUPTIONS:
        raise InputError(f"corrupt: no corruption {corruption!r}; available: {', '.join(CORRUPTIONS)}")
    if not 0 < severity <= 1:
        raise InputError(f"corrupt: severity = {severity!r}: must be in (0, 1]")
    text = document.text
    if text.strip():
        text = CORRUPTIONS[corruption](_generator(seed, document, corruption), document, severity)
    return dataclasses.replace(document, id=f"{document.id}#{corruption}", text=text)


def corrupt_share(
    documents: Iterable[Document],
    share: float,
    corruptions: Sequence[str] = tuple(CORRUPTIONS),
    severities: tuple[float, float] = (0.2, 1.0),
    seed: int = 0,
) -> Iterator[tuple[Document, float]]:
    """Replaces a share of the documents by corrupted ones, the same documents in the same way in every language.

    Args:
      documents: stream of documents.
      share: share of them to corrupt, in [0, 1].
      corruptions: keys of CORRUPTIONS to draw from.
      severities: bounds between which severities are drawn evenly.
      seed: seed of all draws.

    Yields:
      Each document and the severity of its corruption, 0 for documents left as they are.
    """
    for document in documents:
        rng = _generator(seed, document, "share")
        drawn, corruption = rng.random(), corruptions[rng.integers(len(corruptions))]
        severity = rng.uniform(*severities)
        yield (corrupt(document, corruption, severity, seed), severity) if drawn < share else (document, 0.0)
