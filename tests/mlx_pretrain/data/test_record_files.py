"""Files of records that commands write."""

import pytest

from mlx_pretrain.data.documents import Document
from mlx_pretrain.data.record_files import output_name, to_record


@pytest.mark.parametrize(("name", "output"), [
    ("a/x.jsonl.xz", "a/x.jsonl.gz"), ("x.parquet", "x.jsonl.gz"), ("x.txt", "x.jsonl.gz"),
    ("x.y.jsonl", "x.y.jsonl.gz"),
])
def test_outputs_are_named_after_inputs(name, output):
    assert output_name(name) == output


def test_records_have_no_empty_fields_and_no_language_that_nobody_knows():
    assert to_record(Document("a", "", "und", ""), score=1.0, url=None) == {"id": "a", "text": "", "score": 1.0}
    assert to_record(Document("a", "t", "de", "web")) == {"id": "a", "source": "web", "lang": "de", "text": "t"}
