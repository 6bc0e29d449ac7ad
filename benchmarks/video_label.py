"""Compares prefix trees with one sequence per combination, for the losses of combinations of frames.

    python benchmarks/video_label.py [--model=RUN --frame_store=DIR --questions=FILE] [--candidates=16] [--frames=4]
        [--combinations=64 [--one_by_one]] [--quick]

Both compute the loss of the answers to the same questions for all combinations of T of M frames, or for a sample,
nested or drawn one by one. The naive loop encodes the T frames and runs the whole sequence for each combination, in
batches of the same number of tokens; programs are compiled before the clock starts. Without a model it takes random
weights of the nano Video-LLM of gin/video/nano.gin and noise for frames. The last line is JSON:
{"ratio", "max_abs_diff", ...}.
"""

import argparse
import dataclasses
import json
import time

import jax
import jax.numpy as jnp
import numpy as np

from mlx_pretrain.models.decoder import DecoderConfig, token_logits
from mlx_pretrain.models.decoder import logits as all_logits
from mlx_pretrain.models.vision import VisionConfig
from mlx_pretrain.parallel import hardware, partitioning
from mlx_pretrain.training.train_state import abstract_params
from video.frame_choice.rules import even
from video.frames.frame_store import FrameStore
from video.llm.answer_scoring import AnswerScorer
from video.llm.loading import load_video_llm
from video.llm.model import VideoLLMConfig, encode_frames, hidden_states
from video.llm.prompts import Prompts
from video.questions import Question, read_questions
from video.voyager.combinations import combinations

TOKENS = {"cpu": 1024}  # in a batch of the naive loop


def random_video_llm(size: str):
    """Makes a Video-LLM with random weights: (config, params, mesh, prompts)."""
    vision = VisionConfig(image_size=48, patch_size=8, embed_dim=96, n_layers=3, n_heads=3, mlp_dim=384, unroll=3)
    decoder = DecoderConfig(vocab_size=512, embed_dim=128, n_layers=4, n_heads=4, n_kv_heads=4, head_dim=32,
                            mlp_dim=352, max_length=256, tie_embeddings=True, unroll=4)
    if size == "small":  # SigLIP-like proportions: the tower is as large as the decoder
        vision = VisionConfig(image_size=112, patch_size=14, embed_dim=256, n_layers=8, n_heads=4, mlp_dim=1024)
        decoder = dataclasses.replace(decoder, embed_dim=320, n_layers=8, n_heads=5, n_kv_heads=5, head_dim=64,
                                      mlp_dim=864, unroll=8)
    config = VideoLLMConfig(vision, decoder, pooled_side=2)
    mesh = partitioning.make_mesh()
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda like: jax.device_put(
        rng.normal(0, 0.08, like.shape).astype(np.float32) + (like.ndim == 1), like.sharding),
        abstract_params(config, mesh))
    encode = lambda texts: [np.frombuffer(text.encode(), np.uint8).astype(np.int32) + 4 for text in texts]  # noqa: E731
    return config, params, mesh, Prompts(config, (3,), 1, encode)


def naive(config, params, prompts, frames, times, question, all_combinations, batch):
    """Returns the answer's mean loss for each combination: float64 `[combinations]`."""
    words = prompts.words([question.question])[0]
    (answer,) = prompts.answers([question.answer])
    context = prompts.context(words, range(all_combinations.shape[1]))
    tokens = np.concatenate([context, answer])[:-1]
    run = _program(config, len(context), batch)
    losses = []
    for start in range(0, len(all_combinations), batch):
        part = all_combinations[np.minimum(np.arange(start, start + batch), len(all_combinations) - 1)]
        losses.append(run(params, frames[part], times[part], np.tile(tokens, (batch, 1)), answer))
    return np.concatenate([np.asarray(x) for x in losses])[: len(all_combinations)]


_programs = {}


def _program(config, start, batch):
    @jax.jit
    def run(params, frames, times, tokens, answer):
        features = encode_frames(config, params, frames, times)
        hidden = hidden_states(config, params, features.reshape(batch, -1, features.shape[-1]), tokens)[:, start - 1 :]
        scores = all_logits(params["decoder"], hidden)
        own = token_logits(params["decoder"], hidden, jnp.broadcast_to(answer, hidden.shape[:2]))
        return jnp.mean(jax.nn.logsumexp(scores, axis=-1) - own, axis=-1)

    return _programs.setdefault((id(config), start, batch), run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a Video-LLM; default: random weights")
    parser.add_argument("--size", default="nano", choices=["nano", "small"], help="size of the random model")
    parser.add_argument("--frame_store")
    parser.add_argument("--questions")
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--frames", type=int, default=4)
    parser.add_argument("--combinations", type=int, help="size of the sample; default: all")
    parser.add_argument("--one_by_one", action="store_true", help="the sample is not nested")
    parser.add_argument("--count", type=int, default=4, help="number of questions")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, help="combinations in a batch of the naive loop; 1: one by one")
    parser.add_argument("--quick", action="store_true", help="a question, 8 candidates, one round: does it run?")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.count, arguments.rounds = 1, 1
        arguments.candidates = arguments.candidates if arguments.combinations else 8
    if arguments.model:
        llm = load_video_llm(arguments.model)
        config, params, mesh, prompts = llm.config, llm.params, llm.mesh, llm.prompts
        store, questions = FrameStore(arguments.frame_store), read_questions(arguments.questions)[: arguments.count]
        indices = even(store.candidates, arguments.candidates)
        videos = {q.video: [x[indices] for x in store.video(q.video)] for q in questions}
    else:
        config, params, mesh, prompts = random_video_llm(arguments.size)
        rng, size = np.random.default_rng(1), config.vision.image_size
        questions = [Question(str(n), f"{n // 2}.mp4", "Which came first, then?"[: 12 + 5 * (n % 3)], "left")
                     for n in range(arguments.count)]
        videos = {q.video: (rng.integers(0, 256, (arguments.candidates, size, size, 3)).astype(np.uint8),
                            np.arange(arguments.candidates, dtype=np.float32)) for q in questions}
    drawn = [combinations(arguments.candidates, arguments.frames, arguments.combinations, name=question.id,
                          nested=not arguments.one_by_one) for question in questions]
    length = len(prompts.context(prompts.words([questions[0].question])[0], range(arguments.frames)))
    batch = arguments.batch or max(TOKENS.get(jax.default_backend(), 16_384) // length, 1)
    batch = -(-len(drawn[0]) // -(-len(drawn[0]) // batch))  # so that the last batch is nearly full too
    answer_scorer = AnswerScorer(config, params, mesh, prompts)

    def trees():
        answered = answer_scorer(lambda video: answer_scorer.features(*videos[video]), questions, drawn, options=False)
        return [answers.losses for answers in answered]

    def loop():
        return [naive(config, params, prompts, *videos[q.video], q, rows, batch) for q, rows in zip(questions, drawn)]

    ours, theirs = trees(), [naive(config, params, prompts, videos[q.video], q, rows[:batch], batch)
                             for q, rows in zip(questions, drawn)]  # compiles
    scorer = answer_scorer.scorer
    fed, unshared = scorer.fed_tokens, scorer.naive_tokens
    seconds, cpu_seconds = {"trees": [], "naive": []}, {"trees": [], "naive": []}
    for _ in range(arguments.rounds):
        for name, run in (("trees", trees), ("naive", loop)):
            started, cpu_started = time.perf_counter(), time.process_time()
            losses = run()
            seconds[name].append(time.perf_counter() - started)
            cpu_seconds[name].append(time.process_time() - cpu_started)
            ours, theirs = (losses, theirs) if name == "trees" else (ours, losses)
            rate = sum(map(len, drawn)) / seconds[name][-1]
            print(f"{name}: {seconds[name][-1]:.2f} s, {rate:,.0f} combinations/s", flush=True)
    difference = max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs))
    print(json.dumps({
        "ratio": round(float(np.median(seconds["naive"]) / np.median(seconds["trees"])), 2),
        "cpu_ratio": round(float(np.median(cpu_seconds["naive"]) / np.median(cpu_seconds["trees"])), 2),
        "max_abs_diff": difference, "combinations": len(drawn[0]), "questions": len(questions),
        "naive_batch": batch,
        "seconds": {name: [round(x, 3) for x in values] for name, values in seconds.items()},
        "tokens_shared": round(1 - fed / unshared, 3), "fed_tokens": fed, "naive_tokens": unshared,
        "device": hardware.describe_devices(), "parameters": config.parameters()}))


if __name__ == "__main__":
    main()
