"""Options without a number, and which tables a new language leaves as they are."""

import json

import numpy as np
import pyarrow as pa
import pytest

from evals.scoring.item_tables import choices_of, count_unscored, table_of_scores
from evals.scoring.results import compute_results, format_results, results_json
from evals.tasks.alignment import AlignedItems
from evals.tasks.task_files import Item, Task
from mlx_pretrain.inference.scoring import Score

TASK = Task("StoryClozeDataset", "lighteval")
ITEMS = tuple(Item(str(n), "a", ("bb", "c"), n % 2, " ") for n in range(4))


def table(likelihoods, unconditional=False) -> pa.Table:
    scores = [Score(np.array([x], np.float32), False, 0) for x in np.ravel(likelihoods)]
    return table_of_scores(ITEMS, scores + scores[::-1] * unconditional, unconditional)


RIGHT = [[-1, -2], [-2, -1], [-1, -2], [-2, -1]]


@pytest.mark.parametrize("unconditional", [False, True])
def test_an_option_that_is_no_number_is_wrong_and_said_so(unconditional):
    broken = np.array(RIGHT, float)
    broken[2, 1] = np.nan
    found = compute_results(TASK, AlignedItems(("en", "de"), {"en": ITEMS, "de": ITEMS}, (), {}),
                     {"en": table(RIGHT, unconditional), "de": table(broken, unconditional)})
    assert {"acc", "acc_norm", "acc_bytes", "acc_tokens"} <= set(found.choices)
    assert ("acc_mutual_info" in found.choices) == unconditional
    assert found.choices["acc"].tolist() == [[0, 1, 0, 1], [0, 1, -1, 1]]
    assert found.accuracy.shape == (2,) and found.unscored == {"en": 0, "de": 1}
    entries = results_json([found], {"few_shot": 0})
    assert entries["results"][f"{TASK.name}_de"]["acc,none"] == 0.75
    assert entries["left_out"][TASK.name]["unscored"] == {"de": 1}
    assert "  1 items wrong for an option whose log-likelihood is not a number" in format_results([found])
    json.dumps(entries)


def test_a_model_that_gives_no_numbers_at_all():
    nothing = table(np.full((4, 2), np.nan))
    assert count_unscored(nothing) == 4 and (choices_of(nothing)["acc"] == -1).all()
