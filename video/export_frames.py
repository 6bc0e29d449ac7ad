"""Writes the chosen frames as short videos: `python -m video.export_frames --gin_file=gin/video/export_frames.gin`.

Other programs evaluate their Video-LLMs on whole videos, from which they take frames by rules of their own. A short
video that holds nothing but the chosen frames gives a Video-LLM these, whatever the program and the model:

    OUT/index.json        {"provenance", "videos": {video: [{"question_id", "question", "file"}]}}
    OUT/videos/<id>.mp4   the frames chosen for a question, upright and in their own size, one a second

The order of the frames is kept, their times in the whole video are not. `video.lmms_eval_plugin` reads this folder.
"""

import dataclasses

import gin
from etils import epath
from tqdm import tqdm

from mlx_pretrain import command_line
from mlx_pretrain.artifacts import is_current, new_folder, provenance, read_folder_record
from mlx_pretrain.data.workers import Workers
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import read_json, sha256, write_json
from mlx_pretrain.parallel.cluster import log
from video.frames.writing import write_item
from video.select import sheet_name

INDEX = "index.json"


@gin.configurable("export_frames")
@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportFramesConfig:
    """Settings of `video.export_frames`.

    Attributes:
      selected: folder that `video.select` wrote.
      videos: folder of the videos that it chose from.
      output: folder; kept where it was made from the same choice.
      overwrite: replaces an output of another choice, which is an error otherwise.
      processes: number of processes that decode and encode.
    """

    selected: str = gin.REQUIRED
    videos: str = gin.REQUIRED
    output: str = gin.REQUIRED
    overwrite: bool = False
    processes: int = 2


def main(config: ExportFramesConfig) -> None:
    """Writes the frames chosen for each question as a short video.

    Raises:
      InputError: there is no choice of frames, a video cannot be decoded, or the output was made from another choice.
    """
    chosen = epath.Path(config.selected) / "selected.json"
    by_video = read_json(chosen, "choice of frames")
    if not all("numbers" in entry for entries in by_video.values() for entry in entries):
        raise InputError(f"{chosen}: has no numbers of frames; choose them again with video.select")
    made_from = provenance("video.export_frames", {"videos": config.videos}, {"selected": sha256(chosen)})
    if is_current(config.output, read_folder_record(config.output, INDEX), made_from, overwrite=config.overwrite,
                  contents=(INDEX, "videos")):
        return
    index, items = {}, []
    with new_folder(config.output, INDEX) as output:
        (output / "videos").mkdir()
        for video, entries in by_video.items():
            index[video] = [{"question_id": entry["question_id"], "question": entry["question"],
                             "file": f"videos/{sheet_name(entry['question_id'])}.mp4"} for entry in entries]
            items += [(video, (str(epath.Path(config.videos) / video), entry["numbers"], str(output / line["file"])))
                      for entry, line in zip(entries, index[video])]
        with Workers(write_item, config.processes) as workers:
            for _ in tqdm(workers.map(items), "questions", len(items), disable=None):
                pass
        write_json(output / INDEX, {"provenance": made_from, "videos": index})
    log(f"{config.output}: short videos for {len(items):,} questions on {len(index):,} videos")


if __name__ == "__main__":
    command_line.run(main, ExportFramesConfig, "video.export_frames")
