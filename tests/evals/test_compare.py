"""The table of a comparison is kept, refused, replaced or made again."""

import json

import numpy as np
import pytest

from evals.compare import CompareConfig, main
from evals.scoring.item_tables import save, table_of_scores
from evals.tasks.task_files import Item
from mlx_pretrain.errors import InputError
from mlx_pretrain.inference.scoring import Score

ITEMS = [Item(str(n), "a", ("bb", "c"), n % 2, " ") for n in range(4)]


def evaluated(folder, right):
    """Writes the table of a run whose first `right` items are right."""
    values = [-1.0 if (choice == item.label) == (n < right) else -20.0
              for n, item in enumerate(ITEMS) for choice in range(2)]
    scores = [Score(np.array([value], np.float32), False, 0) for value in values]
    save(folder / "log_likelihoods/ARCEasyDataset_lighteval/en.parquet", table_of_scores(ITEMS, scores, False), {})
    return str(folder)


def test_a_comparison_of_other_runs_is_refused(tmp_path, capsys):
    output = tmp_path / "compared.json"
    settings = {"first": evaluated(tmp_path / "a", 1), "second": evaluated(tmp_path / "b", 3), "output": str(output)}
    (row,) = main(CompareConfig(**settings))
    assert (row.first, row.second) == (0.25, 0.75)
    content, time = output.read_bytes(), output.stat().st_mtime_ns
    assert json.loads(content)["compared"][0]["items"] == 4
    capsys.readouterr()
    assert main(CompareConfig(**settings)) == [row] and output.stat().st_mtime_ns == time
    assert capsys.readouterr().err == f"{output}: made before from the same inputs and settings, kept\n"
    for damaged in (content[:100], b"my notes"):
        output.write_bytes(damaged)
        with pytest.raises(InputError, match=r"compared\.json: has no record of what it was made from; set overwrite"):
            main(CompareConfig(**settings))
        assert output.read_bytes() == damaged
    main(CompareConfig(**settings, overwrite=True))
    assert output.read_bytes() == content
    evaluated(tmp_path / "b", 2)
    with pytest.raises(InputError, match="made with other inputs second ARCEasyDataset_lighteval/en; set overwrite"):
        main(CompareConfig(**settings))
    assert output.read_bytes() == content
    assert main(CompareConfig(**settings, overwrite=True))[0].second == 0.5
    assert json.loads(output.read_bytes())["compared"][0]["second"] == 0.5
