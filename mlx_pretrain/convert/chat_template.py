"""Chat templates: Jinja that makes one text of a conversation. Exports carry them unchanged; they are never run."""

from collections.abc import Mapping
from typing import Any

from etils import epath

from mlx_pretrain.convert.special_ids import TOKENIZER_CONFIG
from mlx_pretrain.errors import InputError

_FIELD, _FILE, _MORE = "chat_template", "chat_template.jinja", "additional_chat_templates"


def template_setting(folder: epath.PathLike, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the templates in the settings of a folder's tokenizer_config.json: {"chat_template": ...}, or {}.

    Raises:
      InputError: they are neither a text nor a list of named templates.
    """
    template = settings.get(_FIELD)
    if template is None:
        return {}
    named = template if isinstance(template, list) else [{"name": "default", "template": template}]
    if not all(isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("name", "template"))
               for entry in named):
        raise InputError(f"{epath.Path(folder) / TOKENIZER_CONFIG}: {_FIELD} is neither a text nor a list of objects "
                         "with a name and a template")
    return {_FIELD: template}


def template_files(folder: epath.PathLike) -> dict[str, bytes]:
    """Reads the templates of a Hugging Face folder that are separate files: path in the folder -> content."""
    folder = epath.Path(folder)
    more = sorted((folder / _MORE).glob("*.jinja")) if (folder / _MORE).is_dir() else []
    paths = [folder / _FILE] * (folder / _FILE).exists() + more
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}
