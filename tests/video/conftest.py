"""Small videos, a small Video-LLM on drawn weights, and frames of noise."""

import collections
import fractions
import pathlib

import av
import jax
import numpy as np
import pytest

from mlx_pretrain.models.decoder import DecoderConfig
from mlx_pretrain.models.vision import VisionConfig
from mlx_pretrain.parallel import partitioning
from mlx_pretrain.training.train_state import abstract_params
from video.llm.model import VideoLLMConfig
from video.llm.prompts import Prompts


def write_video(path, codec, times, *, width=96, height=64, key_frames=12, rotation=0, audio=False):
    """Frame i, shown from times[i] on, has red 3 i and, in its upper half, green 200."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = width, height, "yuv420p", key_frames
        stream.codec_context.time_base = fractions.Fraction(1, 30 if codec == "mpeg4" else 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        sound = container.add_stream("aac", rate=8000) if audio else None
        for number, time in enumerate(times):
            picture = np.zeros((height, width, 3), np.uint8)
            picture[..., 0] = 3 * number % 256
            picture[: height // 2, :, 1] = 200
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.time_base = stream.codec_context.time_base
            frame.pts = round(float(time) / frame.time_base)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound:
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
            samples.rate = 8000
            container.mux(sound.encode(samples))
            container.mux(sound.encode())
    return pathlib.Path(path)


def write_grey(path, codec, times, rate, units, *, b_frames=0, key_frames=12, options=None, container=None,
               audio=0, offset=0, levels=None):
    """Frame i, shown from times[i] + offset on, is grey: 20 + 4 i or levels[i]; `audio`: seconds of silence."""
    levels = 20 + 4 * np.arange(len(times)) if levels is None else levels
    with av.open(str(path), "w", container_options=container or {}) as output:
        stream = output.add_stream(codec, rate=rate, options={"threads": "1", "crf": "5", **(options or {})})
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size, stream.codec_context.max_b_frames = key_frames, b_frames
        stream.codec_context.time_base = fractions.Fraction(1, units)
        sound = output.add_stream("aac", rate=8000) if audio else None
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), levels[number], np.uint8), format="rgb24")
            frame.time_base = stream.codec_context.time_base
            frame.pts = round((time + offset) * units)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
        for place in range(0, int(audio * 8000), 1024):
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            samples.rate, samples.pts, samples.time_base = 8000, place, fractions.Fraction(1, 8000)
            output.mux(sound.encode(samples))
        if sound:
            output.mux(sound.encode())
    return pathlib.Path(path)


@pytest.fixture(scope="session")
def config():
    """Seven by seven patches averaged to two by two; the question is before the frames."""
    vision = VisionConfig(image_size=29, patch_size=4, embed_dim=16, n_layers=2, n_heads=2, mlp_dim=24)
    decoder = DecoderConfig(vocab_size=270, embed_dim=32, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=8, mlp_dim=48,
                            max_length=96)
    return VideoLLMConfig(vision, decoder, pooled_side=2, frame_times=True)


@pytest.fixture(scope="session")
def mesh():
    return partitioning.make_mesh(devices=jax.devices()[:2])


@pytest.fixture(scope="session")
def params(config, mesh):
    """Drawn wide, so that frames and words matter."""
    layout = abstract_params(config, mesh)
    rng = np.random.default_rng(0)
    draw = lambda like: jax.device_put(  # noqa: E731
        rng.normal(0, 0.25, like.shape).astype(np.float32) + (like.ndim == 1), like.sharding)
    return jax.tree.map(draw, layout)


def encode(texts):
    """A tokenizer of bytes."""
    return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) + 4 for text in texts]


@pytest.fixture(scope="session")
def prompts(config):
    return Prompts(config, (3,), 1, encode)


@pytest.fixture(scope="session")
def frames():
    """uint8 `[7, 29, 29, 3]`."""
    return np.random.default_rng(1).integers(0, 256, (7, 29, 29, 3)).astype(np.uint8)


def question_only_accuracy(questions):
    """Returns for every type of question (chance, accuracy of the best rule that sees no video, its standard error).

    The rules give the most frequent answer, the most frequent place among the options, or the most frequent answer to
    this very question, each counted on the first half of the questions of a type; the accuracy is that on the others.
    """
    results = {}
    for name in dict.fromkeys(question.type for question in questions):
        of_type = [question for question in questions if question.type == name]
        learnt, others = of_type[: len(of_type) // 2], of_type[len(of_type) // 2 :]
        rules = [(lambda q: "", lambda q: q.answer), (lambda q: "", lambda q: q.options.index(q.answer)),
                 (lambda q: q.question, lambda q: q.answer)]
        accuracies = []
        for key, answer in rules:
            counts = collections.defaultdict(collections.Counter)
            for question in learnt:
                counts[key(question)][answer(question)] += 1
            guesses = [counts[key(q)].most_common(1)[0][0] if key(q) in counts else None for q in others]
            accuracies.append(np.mean([guess == answer(q) for guess, q in zip(guesses, others)]))
        chance = np.mean([1 / len(question.options) for question in others])
        results[name] = chance, max(accuracies), (chance * (1 - chance) / len(others)) ** 0.5
    return results
