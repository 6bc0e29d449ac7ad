"""Makes training rows of a Video-LLM: frames of a video, and questions on subsets of them."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from mlx_pretrain.data.loader import Batch, Mixture, MixtureSource
from mlx_pretrain.data.token_store import PAD_ID
from mlx_pretrain.errors import InputError
from video.frames.frame_store import FrameStore
from video.llm.prompts import Prompts
from video.questions import Question


@dataclasses.dataclass(frozen=True)
class ClipProvenance:
    """Origin of a row."""

    video: str
    epoch: int


def evidence_frames(question: Question, times: np.ndarray) -> list[np.ndarray]:
    """Finds the candidates that show a question's evidence.

    Args:
      question: a question with spans of evidence, or a clip, or neither.
      times: float `[candidates]`, seconds.

    Returns:
      For each span of the evidence, and then for the clip, the indices of the candidates in it, or of the nearest one.
    """
    spans = []
    for start, end in (*question.evidence, *([question.clip] if question.clip else [])):
        inside = np.flatnonzero((times >= start) & (times < end))
        spans.append(inside if len(inside) else np.argmin(np.abs(times - (start + end) / 2))[None])
    return spans


def with_evidence(question: Question, times: np.ndarray, frames: np.ndarray, num_frames: int) -> np.ndarray:
    """Replaces frames by those that show a question's evidence, the middle one of each span.

    Args:
      question, times: see `evidence_frames`.
      frames: int `[frames]`, candidates, of which the first fill up where there are fewer spans.
      num_frames: frames to return at most.

    Returns:
      int64 `[chosen]`, ascending.
    """
    shown = [int(span[len(span) // 2]) for span in evidence_frames(question, times)][:num_frames]
    rest = [index for index in frames.tolist() if index not in shown]
    return np.unique([*shown, *rest[: num_frames - len(set(shown))]]).astype(np.int64)


class ClipSource(MixtureSource):
    """Batches of videos with questions.

    A row is a video: `frames` of its candidates in the order of time, and `questions_per_row` questions, each on a
    subset of these frames. So a frame goes through the vision tower once for all questions. With probability
    `evidence_prob` a question's subset contains a frame of each span of its evidence of which the row has one.
    """

    def __init__(
        self,
        store: FrameStore,
        questions: Sequence[Question],
        prompts: Prompts,
        *,
        frames: int,
        questions_per_row: int,
        evidence_prob: float,
        length: int,
        mixture: Mixture,
        rows: np.ndarray | None = None,
    ):
        """Tokenizes the questions.

        Args:
          store: frames of all videos.
          questions: questions to learn from.
          prompts: builder of the model's sequences.
          frames: number of frames of a row.
          questions_per_row: number of questions of a row, drawn from those on the video.
          evidence_prob: probability that a question's subset contains its evidence.
          length: tokens of a sequence: question, frames and answer.
          mixture, rows: see `MixtureSource`; the mixture has one source, the videos that have questions.

        Raises:
          InputError: a video is not in the store, a row has more frames than a video has candidates, or a question is
            too long.
        """
        if frames > store.candidates:
            raise InputError(f"{frames} frames of each video, but the store has {store.candidates}")
        self._store, self._prompts = store, prompts
        self._frames, self._per_row, self._length = frames, questions_per_row, length
        self._evidence_prob = evidence_prob
        words, answers = prompts.words([q.question for q in questions]), prompts.answers([q.answer for q in questions])
        self._by_video: dict[str, list[tuple[Question, tuple, np.ndarray]]] = {}
        frame_tokens = len(prompts.frames(range(frames)))
        for question, (before, behind), answer in zip(questions, words, answers):
            if question.video in store.rejected:
                continue
            tokens = len(before) + len(behind) + frame_tokens + len(answer)
            if tokens > length + 1:
                raise InputError(f"question {question.id}: {tokens} tokens with {frames} frames and the answer, "
                                 f"sequences have {length}")
            self._by_video.setdefault(question.video, []).append((question, (before, behind), answer))
        self._videos = list(self._by_video)
        self._rows_of = [store.row(video) for video in self._videos]
        super().__init__(mixture, rows)

    def __getitem__(self, batch: int) -> Batch:
        """Returns this host's rows of a batch.

        Returns:
          frames: uint8 `[rows, frames, size, size, 3]`.
          times: float32 `[rows, frames]`, seconds.
          tokens: int32 `[rows, questions, length + 1]`; the ids of frames are those of `Prompts.frames`.
          answers: int32 `[rows, questions, 2]`: positions of the answer's first token and of the one behind its last.
        """
        _, videos, epochs = self.sampler.locate(batch, self.rows)
        indices, tokens, answers = [], [], []
        for video, epoch in zip(videos, epochs):
            rng = np.random.default_rng([self.mixture.seed, int(video), int(epoch)])
            frame_indices, sequences, spans = self._row(self._videos[video], rng)
            indices.append(frame_indices)
            tokens.append(sequences)
            answers.append(spans)
        candidates = self._store.frames([self._rows_of[video] for video in videos])
        times = [self._store.times[self._rows_of[video]][chosen] for video, chosen in zip(videos, indices)]
        return {"frames": np.stack([frames[chosen] for frames, chosen in zip(candidates, indices)]),
                "times": np.stack(times).astype(np.float32), "tokens": np.stack(tokens),
                "answers": np.array(answers, np.int32)}

    def _row(self, video: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, list]:
        """Draws a row: indices of its frames, sequences `[questions, length + 1]`, (start, end) of the answers."""
        on_video, times = self._by_video[video], self._store.times[self._store.row(video)]
        drawn = [on_video[i] for i in rng.choice(len(on_video), self._per_row, replace=len(on_video) < self._per_row)]
        # At most `frames`: one frame of every span of evidence of the drawn questions first, the rest at random.
        evidence = {int(rng.choice(span)) for question, _, _ in drawn for span in evidence_frames(question, times)}
        evidence = rng.permutation(sorted(evidence))[: self._frames]
        others = rng.permutation(np.setdiff1d(np.arange(self._store.candidates), evidence))
        indices = np.sort(np.concatenate([evidence, others[: self._frames - len(evidence)]]).astype(int))
        sequences = np.full((self._per_row, self._length + 1), PAD_ID, np.int32)
        spans = []
        for sequence, (question, words, answer) in zip(sequences, drawn):
            size = int(rng.integers(1, self._frames + 1))
            needed = []
            if rng.random() < self._evidence_prob:
                needed = [int(rng.choice(inside)) for span in evidence_frames(question, times)
                          if len(inside := np.flatnonzero(np.isin(indices, span)))]
            rest = np.arange(self._frames)
            if question.clip:
                (span,) = evidence_frames(question, times)
                rest = np.flatnonzero(np.isin(indices, span))
                # If the evidence of other questions left no frame of the clip in the row, the nearest frame.
                rest = rest if len(rest) else np.argmin(np.abs(indices - span.mean()))[None]
            rest = rng.permutation(np.setdiff1d(rest, needed))
            subset = np.unique(np.concatenate([needed, rest[: max(size - len(needed), 0)]]).astype(int))
            context = self._prompts.context(words, subset)
            sequence[: len(context) + len(answer)] = np.concatenate([context, answer])
            spans.append((len(context), len(context) + len(answer)))
        return indices, sequences, spans

    def provenance(self, batch: int) -> list[ClipProvenance]:
        """Returns the origins of the rows of a global batch, for error reports."""
        _, videos, epochs = self.sampler.locate(batch)
        return [ClipProvenance(self._videos[video], int(epoch)) for video, epoch in zip(videos, epochs)]
