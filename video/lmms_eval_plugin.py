"""Model of lmms-eval that shows another model of lmms-eval the frames that `video.select` chose, and nothing else.

    python -m lmms_eval --tasks videomme --model chosen_frames \
      --model_args frames=runs/video/exported,model=qwen2_5_vl,pretrained=Qwen/Qwen2.5-VL-7B-Instruct,max_num_frames=8

`frames` is a folder that `video.export_frames` wrote, `model` a name in lmms-eval; other arguments are that model's.
The task stays as it is, with its prompts and its metrics. Where it gives the model the path of a video, the model gets
the short video that has the frames chosen for the task's question, so it should take as many frames as these have.

lmms-eval finds this module by the entry point `lmms_eval.models`. It needs nothing but lmms-eval, so that this package
can be installed beside it without its requirements (`pip install --no-deps`).
"""

import collections
import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from mlx_pretrain.errors import InputError

MANIFEST = ModelManifest("chosen_frames", simple_class_path="video.lmms_eval_plugin.ChosenFrames")
_METHODS = ("generate_until", "generate_until_multi_round", "loglikelihood")


class ShortVideos:
    """The short videos in a folder that `video.export_frames` wrote."""

    def __init__(self, folder: str):
        """Reads the folder's list; raises InputError where there is none, or two videos and questions look the same."""
        self._folder = pathlib.Path(folder)
        try:
            videos = json.loads((self._folder / "index.json").read_text())["videos"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self._folder}: no folder of video.export_frames ({error})") from None
        self._by_name: dict[str, dict[str, tuple[str, str]]] = collections.defaultdict(dict)
        for video, entries in videos.items():
            for entry in entries:
                other, _ = self._by_name[_name(video)].setdefault(entry["question"], (video, entry["file"]))
                if other != video:
                    raise InputError(f"{self._folder}: {video} and {other} have the same name and question")

    def find(self, video: str, question: str) -> str:
        """Returns the path of the short video for a question on a video; raises InputError where it has none.

        Args:
          video: path of the whole video; its folder and suffix may be others than those the frames were chosen from.
          question: text; lines behind the question, such as a list of options, don't count.
        """
        files = self._by_name.get(_name(video), {})
        asked = max((text for text in files if f"{question}\n".startswith(f"{text}\n")), key=len, default=None)
        if asked is None:
            raise InputError(f"{self._folder}: no frames were chosen from {video} for {question!r}")
        return str(self._folder / files[asked][1])


class ChosenFrames(lmms):
    """Makes a model of lmms-eval that sees short videos; no instances of this class itself are made."""

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> lmms:
        """Returns the model that the arguments name, with its requests changed.

        Args:
          arg_string: "frames=FOLDER,model=NAME" and the model's own arguments.
          additional_config: passed on to the model.

        Raises:
          InputError: `frames` or `model` is missing, or the folder is wrong.
        """
        from lmms_eval.models import get_model  # that package imports this module while it is imported itself

        own = dict(part.split("=", 1) for part in arg_string.split(",") if part.startswith(("frames=", "model=")))
        if own.keys() != {"frames", "model"}:
            raise InputError("chosen_frames: --model_args needs frames=FOLDER and model=NAME")
        rest = ",".join(part for part in arg_string.split(",") if not part.startswith(("frames=", "model=")))
        short_videos = ShortVideos(own["frames"])
        model = get_model(own["model"]).create_from_arg_string(rest, additional_config)
        for name in _METHODS:
            setattr(model, name, _with_short_videos(model, getattr(model, name), short_videos))
        return model

    def generate_until(self, requests):
        raise NotImplementedError

    generate_until_multi_round = loglikelihood = generate_until


def _with_short_videos(model: lmms, method: Callable, short_videos: ShortVideos) -> Callable:
    """Returns a model's method, given requests that show the short videos."""
    # A task's requests hold a function from its documents to media, or to messages with media, which the model calls.
    place = 2 if model.is_simple else 1

    def changed(requests: list[Instance]) -> Any:
        shown = []
        for request in requests:
            arguments = list(request.args)
            arguments[place] = _Shown(arguments[place], short_videos)
            shown.append(dataclasses.replace(request, arguments=tuple(arguments)))
        for request in shown:  # before the first answer: it may take hours to reach a question without frames
            *_, document, task, split = request.args
            request.args[place](model.task_dict[task][split][document])
        return method(shown)

    return changed


@dataclasses.dataclass(frozen=True)
class _Shown:
    """A task's function from documents to media, with the short video in place of the whole one."""

    original: Callable
    short_videos: ShortVideos

    def __call__(self, document: dict[str, Any], *args, **kwargs) -> Any:
        media = self.original(document, *args, **kwargs)
        found: list[str] = []
        media = self._replaced(media, document["question"], found)
        if not found:
            raise InputError("chosen_frames: the task gives no path of a video, only pictures or text")
        return media

    def _replaced(self, part: Any, question: str, found: list[str]) -> Any:
        if isinstance(part, (list, tuple)):
            return type(part)(self._replaced(inner, question, found) for inner in part)
        if isinstance(part, dict) and part.get("type") == "video":
            return {"type": "video", "url": self._replaced(part["url"], question, found)}
        if isinstance(part, dict) and isinstance(part.get("content"), list):
            return part | {"content": self._replaced(part["content"], question, found)}
        if isinstance(part, str):
            found.append(self.short_videos.find(part, question))
            return found[-1]
        return part


def _name(video: str) -> str:
    return pathlib.PurePath(video).stem
