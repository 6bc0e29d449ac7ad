"""Which ids begin and end a text, as the files of a Hugging Face folder say it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from etils import epath

from mlx_pretrain.convert.weights import read_object
from mlx_pretrain.data.tokenizers import SubwordTokenizer
from mlx_pretrain.errors import InputError

CONFIG, GENERATION_CONFIG, TOKENIZER_CONFIG = "config.json", "generation_config.json", "tokenizer_config.json"
_SPECIAL_TOKENS_MAP = "special_tokens_map.json"


class SpecialIds(NamedTuple):
    """Ids of a model with somebody else's tokenizer.

    Attributes:
      bos_id: begins a document; None: not said.
      eos_ids: each of them ends a document; empty: not said.
      prefix_ids: put before every text; None: what the template of tokenizer.json puts there.
    """

    bos_id: int | None
    eos_ids: tuple[int, ...]
    prefix_ids: tuple[int, ...] | None = None


def read_special_ids(folder: epath.PathLike, raw: Mapping[str, Any], tokenizer: SubwordTokenizer) -> SpecialIds:
    """Reads the ids as transformers does.

    generation_config.json comes before config.json, and both before the end that tokenizer_config.json names. Its
    `add_bos_token` has the last word on what stands before a text.

    Args:
      folder: with config.json, and the other files where there are any.
      raw: the object in config.json.
      tokenizer: of the folder.

    Raises:
      InputError: a file is malformed, an id is no number, or a token that is named is not in the vocabulary.
    """
    folder = epath.Path(folder)
    described = [(folder / GENERATION_CONFIG, _optional(folder / GENERATION_CONFIG)), (folder / CONFIG, raw)]
    bos_ids, eos_ids = (next(filter(None, (_ids(path, content, name) for path, content in described)), ())
                        for name in ("bos", "eos"))
    settings = read_tokenizer_settings(folder)
    bos_id = bos_ids[0] if bos_ids else None
    if not eos_ids and (named := _named_id(folder, settings, "eos_token", tokenizer)) is not None:
        eos_ids = (named,)
    return SpecialIds(bos_id, eos_ids, _prefix_ids(folder, settings, tokenizer, bos_id))


def read_tokenizer_settings(folder: epath.PathLike) -> dict[str, Any]:
    """The settings in tokenizer_config.json, with the special tokens that are named beside it; may be empty.

    Raises:
      InputError: a file is malformed.
    """
    settings = _optional(epath.Path(folder) / TOKENIZER_CONFIG)
    if "added_tokens_decoder" not in settings:  # with it, the map is of an older version, and is not read
        settings = settings | _optional(epath.Path(folder) / _SPECIAL_TOKENS_MAP)
    return settings


def _ids(path: epath.Path, content: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """The ids in `<name>_token_id` of a file's object, a number or a list of them; empty where there are none."""
    found = content.get(f"{name}_token_id")
    numbers = found if isinstance(found, list) else [] if found is None else [found]
    if not all(isinstance(number, int) and not isinstance(number, bool) for number in numbers):
        raise InputError(f"{path}: {name}_token_id is {found!r}, neither a number nor a list of numbers")
    return tuple(dict.fromkeys(numbers))


def _prefix_ids(
    folder: epath.Path, settings: Mapping[str, Any], tokenizer: SubwordTokenizer, bos_id: int | None
) -> tuple[int, ...] | None:
    added = settings.get("add_bos_token")
    if added is None:
        return None
    if not isinstance(added, bool):
        raise InputError(f"{folder / TOKENIZER_CONFIG}: add_bos_token is {added!r}, neither true nor false")
    if not added:
        return ()
    if "bos_token" in settings:
        named = _named_id(folder, settings, "bos_token", tokenizer)
        return () if named is None else (named,)
    if bos_id is None:
        raise InputError(f"{folder / TOKENIZER_CONFIG}: add_bos_token is true, but no file names that token")
    return (bos_id,)


def _named_id(
    folder: epath.Path, settings: Mapping[str, Any], name: str, tokenizer: SubwordTokenizer
) -> int | None:
    """The id of a token that is named by its text; None where none is."""
    token = settings.get(name)
    if isinstance(token, dict):
        token = token.get("content")
    if token is None:
        return None
    found = tokenizer.vocabulary().get(token) if isinstance(token, str) else None
    if found is None:
        raise InputError(f"{folder / TOKENIZER_CONFIG}: {name} is {token!r}, which is no token of the tokenizer")
    return found


def _optional(path: epath.Path) -> dict[str, Any]:
    return read_object(path) if path.exists() else {}
