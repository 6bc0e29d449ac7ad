"""The ids that begin and end a text, read from the files of a Hugging Face folder."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from etils import epath

from mlx_pretrain.convert.weights import read_object
from mlx_pretrain.data.tokenizers import SubwordTokenizer
from mlx_pretrain.errors import InputError

CONFIG, GENERATION_CONFIG, TOKENIZER_CONFIG = "config.json", "generation_config.json", "tokenizer_config.json"
_SPECIAL_TOKENS_MAP = "special_tokens_map.json"


class SpecialIds(NamedTuple):
    """Special ids of a model with a Hugging Face tokenizer.

    Attributes:
      bos_id: id that begins a document; None: not stated.
      eos_ids: ids that end a document; empty: not stated.
      prefix_ids: ids put before every text; None: those of the template in tokenizer.json.
      pad_id: id of padding; None: not stated.
    """

    bos_id: int | None
    eos_ids: tuple[int, ...]
    prefix_ids: tuple[int, ...] | None = None
    pad_id: int | None = None


def read_special_ids(folder: epath.PathLike, raw: Mapping[str, Any], tokenizer: SubwordTokenizer) -> SpecialIds:
    """Reads the ids as transformers does.

    generation_config.json takes precedence over config.json, and both over the eos_token of tokenizer_config.json.
    `add_bos_token` of tokenizer_config.json, where it is set, decides whether texts begin with BOS.

    Args:
      folder: folder with config.json; the other files may be missing.
      raw: the object in config.json.
      tokenizer: tokenizer of the folder.

    Raises:
      InputError: a file is malformed, an id is no number, or a named token is not in the vocabulary.
    """
    folder = epath.Path(folder)
    described = [(folder / GENERATION_CONFIG, _optional(folder / GENERATION_CONFIG)), (folder / CONFIG, raw)]
    bos_ids, eos_ids, pad_ids = (next(filter(None, (_ids(path, content, name) for path, content in described)), ())
                                 for name in ("bos", "eos", "pad"))
    settings = read_tokenizer_settings(folder)
    bos_id = bos_ids[0] if bos_ids else None
    if not eos_ids and (named := _named_id(folder, settings, "eos_token", tokenizer)) is not None:
        eos_ids = (named,)
    return SpecialIds(bos_id, eos_ids, _prefix_ids(folder, settings, tokenizer, bos_id),
                      pad_ids[0] if pad_ids else None)


def read_tokenizer_settings(folder: epath.PathLike) -> dict[str, Any]:
    """Reads the settings of tokenizer_config.json and of special_tokens_map.json beside it; may be empty.

    Raises:
      InputError: a file is malformed.
    """
    settings = _optional(epath.Path(folder) / TOKENIZER_CONFIG)
    if "added_tokens_decoder" not in settings:  # with it, the map is of an older version, and is not read
        settings = settings | _optional(epath.Path(folder) / _SPECIAL_TOKENS_MAP)
    return settings


def _ids(path: epath.Path, content: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """Returns the ids in `<name>_token_id` of a file's object, a number or a list of numbers; () without the field."""
    value = content.get(f"{name}_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise InputError(f"{path}: {name}_token_id is {value!r}, neither a number nor a list of numbers")
    return tuple(dict.fromkeys(ids))


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
    """Returns the id of the token whose text a setting names; None where the setting is missing."""
    token = settings.get(name)
    if isinstance(token, dict):
        token = token.get("content")
    if token is None:
        return None
    token_id = tokenizer.vocabulary().get(token) if isinstance(token, str) else None
    if token_id is None:
        raise InputError(f"{folder / TOKENIZER_CONFIG}: {name} is {token!r}, which is no token of the tokenizer")
    return token_id


def _optional(path: epath.Path) -> dict[str, Any]:
    return read_object(path) if path.exists() else {}
