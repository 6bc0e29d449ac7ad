"""Training rows of a Video-LLM: frames of a video, and questions on subsets of them."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from mlx_pretrain.data.loader import Batch, Mixture, MixtureSampler
from mlx_pretrain.data.token_store import PAD_ID
from mlx_pretrain.errors import InputError
from video.decode import FrameStore
from video.llm.prompts import Prompts
from video.questions import Question


@dataclasses.dataclass(frozen=True)
class ClipProvenance:
    """Where a row comes from."""

    video: str
    epoch: int


def showing(question: Question, times: np.ndarray) -> list[np.ndarray]:
    """For each span of a question's evidence, and its clip, the candidates in it, or the nearest one."""
    found = []
    for start, end in (*question.evidence, *([question.clip] if question.clip else [])):
        inside = np.flatnonzero((times >= start) & (times < end))
        found.append(inside if len(inside) else np.argmin(np.abs(times - (start + end) / 2))[None])
    return found


class ClipSource:
    """Batches by number: a random-access data source for Grain.

    A row is a video, so many of its candidates in the order of time, and so many questions, each on a subset of them:
    a frame goes through the vision tower once for all questions. Where a question has evidence, a share of its
    subsets are sure to have what they can of it, as clips cut for a question have.
    """

    def __init__(
        self,
        store: FrameStore,
        questions: Sequence[Question],
        prompts: Prompts,
        *,
        frames: int,
        questions_per_row: int,
        informed: float,
        length: int,
        mixture: Mixture,
        rows: np.ndarray | None = None,
    ):
        """Tokenizes the questions.

        Args:
          store: frames of all videos.
          questions: to learn from.
          prompts: of the model.
          frames: of each row.
          questions_per_row: drawn from those on the video.
          informed: share of the subsets that contain the evidence.
          length: of a sequence, question, frames and answer.
          mixture, rows: see `loader.BatchSource`; the one source of the mixture is the videos that have questions.

        Raises:
          InputError: a video without frames, more frames than candidates, or a question that is too long.
        """
        if frames > store.candidates:
            raise InputError(f"{frames} frames of each video, but the store has {store.candidates}")
        self._store, self._prompts = store, prompts
        self._frames, self._per_row, self._informed, self._length = frames, questions_per_row, informed, length
        words, answers = prompts.words([q.question for q in questions]), prompts.answers([q.answer for q in questions])
        self._members: dict[str, list[tuple[Question, tuple, np.ndarray]]] = {}
        everything = len(prompts.frames(range(frames)))
        for question, one, answer in zip(questions, words, answers):
            if question.video in store.rejected:
                continue
            longest = len(one[0]) + len(one[1]) + everything + len(answer)
            if longest > length + 1:
                raise InputError(f"question {question.id}: {longest} tokens with {frames} frames and the answer, "
                                 f"sequences have {length}")
            self._members.setdefault(question.video, []).append((question, one, answer))
        self._videos = list(self._members)
        self._rows_of = [store.row(video) for video in self._videos]
        self._mixture, self._stream, self._rows = mixture, MixtureSampler(mixture), rows

    def __len__(self) -> int:
        # Grain wants a length; no run reads this many batches.
        return 1 << 48

    def __repr__(self) -> str:
        return f"ClipSource({self._mixture})"

    def __getitem__(self, batch: int) -> Batch:
        """This host's rows of a batch.

        Returns:
          frames: uint8 `[rows, frames, size, size, 3]`.
          tokens: int32 `[rows, questions, length + 1]`; frames stand as `Prompts.frames` says.
          answers: int32 `[rows, questions, 2]`: the answer's first token and the one after its last.
        """
        _, videos, epochs = self._stream.locate(batch, self._rows)
        chosen, tokens, answers = [], [], []
        for video, epoch in zip(videos, epochs):
            rng = np.random.default_rng([self._mixture.seed, int(video), int(epoch)])
            places, sequences, spans = self._row(self._videos[video], rng)
            chosen.append(places)
            tokens.append(sequences)
            answers.append(spans)
        found = self._store.frames([self._rows_of[video] for video in videos])
        return {"frames": np.stack([frames[places] for frames, places in zip(found, chosen)]),
                "tokens": np.stack(tokens), "answers": np.array(answers, np.int32)}

    def _row(self, video: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, list]:
        members, times = self._members[video], self._store.times[self._store.row(video)]
        picked = [members[i] for i in rng.choice(len(members), self._per_row, replace=len(members) < self._per_row)]
        # One frame of every moment that matters to some question, as far as there is room; the rest at random.
        wanted = {int(rng.choice(places)) for question, _, _ in picked for places in showing(question, times)}
        wanted = rng.permutation(sorted(wanted))[: self._frames]
        others = rng.permutation(np.setdiff1d(np.arange(self._store.candidates), wanted))
        places = np.sort(np.concatenate([wanted, others[: self._frames - len(wanted)]]).astype(int))
        sequences = np.full((self._per_row, self._length + 1), PAD_ID, np.int32)
        spans = []
        for sequence, (question, words, answer) in zip(sequences, picked):
            size = int(rng.integers(1, self._frames + 1))
            needed = []
            if rng.random() < self._informed:
                needed = [int(rng.choice(here)) for span in showing(question, times)
                          if len(here := np.flatnonzero(np.isin(places, span)))]
            rest = np.arange(self._frames)
            if question.clip:
                (span,) = showing(question, times)
                rest = np.flatnonzero(np.isin(places, span))
                # Where others took all the room, the nearest that is there.
                rest = rest if len(rest) else np.argmin(np.abs(places - span.mean()))[None]
            rest = rng.permutation(np.setdiff1d(rest, needed))
            subset = np.unique(np.concatenate([needed, rest[: max(size - len(needed), 0)]]).astype(int))
            context = self._prompts.context(words, subset)
            sequence[: len(context) + len(answer)] = np.concatenate([context, answer])
            spans.append((len(context), len(context) + len(answer)))
        return places, sequences, spans

    def provenance(self, batch: int) -> list[ClipProvenance]:
        """Where every row of the global batch comes from, for error reports."""
        _, videos, epochs = self._stream.locate(batch)
        return [ClipProvenance(self._videos[video], int(epoch)) for video, epoch in zip(videos, epochs)]
