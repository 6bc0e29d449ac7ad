"""Tables of proxy runs: three layouts, and nothing dropped silently."""

import numpy as np
import pytest

from data_mixtures.climb.proxy_table import make_runs, olmix_runs, outliers, proxy_runs, regmix_runs
from mlx_pretrain.errors import InputError

OURS = """run,step,n_params,tokens,ratio/fi,ratio/sv,loss/fi,loss/sv
a,10,1000,5000,0.25,0.75,3.5,3.25
a,20,1000,10000,0.25,0.75,3.0,2.75
b,10,1000,5000,1.0,0.0,3.1,5.5
"""


@pytest.fixture
def write(tmp_path):
    def write(name, text):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def test_our_layout(write):
    runs = proxy_runs(write("runs.csv", OURS))
    assert runs.languages == runs.targets == ("fi", "sv")
    assert list(runs.run) == ["a", "a", "b"]
    np.testing.assert_array_equal(runs.tokens, [5000, 10000, 5000])
    np.testing.assert_array_equal(runs.ratios, [[0.25, 0.75], [0.25, 0.75], [1, 0]])
    np.testing.assert_array_equal(runs.losses[2], [3.1, 5.5])
    assert runs.varies and not runs.rows(runs.run == "b").varies
    np.testing.assert_array_equal(runs.own_columns, [0, 1])


@pytest.mark.parametrize("where", ["", "*.csv", "[ab].csv"])
def test_many_files_are_one_table(write, tmp_path, where):
    """Columns may be in any order; .json files, hidden files and folders beside the tables are ignored."""
    header, *rows = OURS.splitlines()
    write("a.csv", "\n".join([header, *rows[:2]]))
    write("b.csv", "run,n_params,epochs,tokens,ratio/sv,ratio/fi,loss/fi,loss/sv\nb,1000,2,5000,0.0,1.0,3.1,5.5\n")
    write("settings.json", "{}")
    write(".c.csv", "half a li")
    runs, alone = proxy_runs(tmp_path / where), proxy_runs(write("all", OURS))
    assert list(runs.run) == ["a", "a", "b"] and runs.languages == alone.languages == ("fi", "sv")
    np.testing.assert_array_equal(runs.ratios, alone.ratios)
    np.testing.assert_array_equal(runs.losses, alone.losses)
    assert list(proxy_runs(tmp_path / "b*.csv").run) == ["b"]


@pytest.mark.parametrize("second, cause", [
    (OURS, "b.csv:2: run 'a': appears twice with 5000 tokens ({folder}/a.csv:2 too)"),
    (OURS.replace("a,", "c,").replace("sv", "en"),
     "b.csv:1: its columns are not those of {folder}/a.csv: only {folder}/a.csv has 'ratio/sv'"),
    ("run,step,n_params,tokens,ratio/fi,ratio/sv,loss/fi,loss/sv,loss/en\n",
     "b.csv:1: its columns are not those of {folder}/a.csv: only {folder}/b.csv has 'loss/en'"),
    ("run,n_params\n", "b.csv:1: no column 'tokens'"),
    (OURS.replace("a,10,1000,5000,0.25", "c,10,1000,5000,x"), "b.csv:2: ratio/fi is 'x', not a number"),
])
def test_files_that_do_not_belong_together_are_named(write, tmp_path, second, cause):
    write("a.csv", OURS)
    write("b.csv", second)
    with pytest.raises(InputError) as error:
        proxy_runs(tmp_path)
    assert str(error.value).splitlines()[0] == f"{tmp_path}/{cause}".format(folder=tmp_path)


def test_a_folder_or_pattern_without_tables(write, tmp_path):
    write("settings.json", "{}")
    with pytest.raises(InputError, match="no such table of proxy runs: no CSV file in it"):
        proxy_runs(tmp_path)
    with pytest.raises(InputError, match="no such table of proxy runs: no CSV file matches"):
        proxy_runs(tmp_path / "mix-*.csv")


def test_rows_that_nearly_sum_to_one_are_renormalised(write):
    runs = proxy_runs(write("runs.csv", OURS.replace("0.25,0.75", "0.249,0.745")))
    np.testing.assert_allclose(runs.ratios.sum(axis=1), 1, rtol=0, atol=1e-15)
    np.testing.assert_allclose(runs.ratios[0, 0], 0.249 / 0.994)


@pytest.mark.parametrize(
    "old, new, cause",
    [
        ("3.5,3.25", "3.5,", ":2: no value for 'loss/sv'"),
        ("3.5,3.25", "3.5", ":2: 7 cells where the header has 8"),
        ("3.5,3.25", "3.5,high", ":2: loss/sv is 'high', not a number"),
        ("3.5,3.25", "3.5,nan", ":2: loss/sv is nan, not a finite number"),
        ("3.5,3.25", "3.5,-1", ":2: run 'a': the loss of 'sv' is not positive"),
        ("0.25,0.75,3.0", "0.25,0.70,3.0", ":3: run 'a': the ratios sum to 0.9500, not to 1 within 0.01"),
        ("1.0,0.0", "1.2,-0.2", ":4: run 'b': the ratio of 'sv' is negative"),
        ("a,20,1000,10000", "a,20,1000,5000", ":3: run 'a': appears twice with 5000 tokens ({path}:2 too)"),
        ("b,10,1000", "b,10,0", ":4: run 'b': n_params is 0.0, not a positive number"),
        ("n_params,tokens", "n_params,d", ":1: no column 'tokens'"),
        ("ratio/sv", "ratio/fi", ":1: column 'ratio/fi' appears twice"),
        ("loss/", "x/", ": no loss columns"),
    ],
)
def test_bad_tables_name_the_line(write, old, new, cause):
    path = write("runs.csv", OURS.replace(old, new))
    with pytest.raises(InputError) as error:
        proxy_runs(path)
    assert str(error.value).startswith(path + cause.format(path=path))


def test_an_empty_or_missing_table(write, tmp_path):
    with pytest.raises(InputError, match="no column"):
        proxy_runs(write("runs.csv", ""))
    with pytest.raises(InputError, match="no runs"):
        proxy_runs(write("runs.csv", OURS.splitlines()[0]))
    with pytest.raises(InputError, match="no such table"):
        proxy_runs(tmp_path / "none.csv")


@pytest.mark.parametrize("row, column, loss", [(2, 0, 11000.0), (2, 1, 40.0), (9, 1, 0.01)])
def test_rows_far_outside_the_others_are_named(row, column, loss):
    """A foreign loss of 9 next to 3 is no outlier; ten runs, the last two of one language each."""
    rng = np.random.default_rng(0)
    ratios = np.concatenate([rng.dirichlet([5, 5], 8), np.eye(2)])
    losses = 3 * (ratios + 1e-3) ** -0.15
    runs = make_runs("t", ("fi", "sv"), ("fi", "sv"), range(10), [1e6] * 10, [5e6] * 10, ratios, losses)
    assert outliers(runs) == []
    losses[row, column] = loss
    losses[0] += 50 * (loss > 50)  # a second diverged run hides neither
    messages = outliers(make_runs("t", ("fi", "sv"), ("fi", "sv"), range(10), [1e6] * 10, [5e6] * 10, ratios, losses))
    start = f"run '{row}' at 5,000,000 tokens: the loss of '{('fi', 'sv')[column]}' is {loss:.4g}, far outside"
    assert sum(line.startswith(start) for line in messages) == 1 and len(messages) == (3 if loss > 50 else 1)


def test_olmix_layout_is_joined_on_run(write):
    ratios = write("ratios.csv", "run,name,index,web,code\nr1,first,0,0.4,0.6\nr2,second,1,1,0\n")
    metrics = write("metrics.csv", "run,name,index,arc,mbpp\nr2,second,1,3,4\nr1,first,0,1,2\n")
    runs = olmix_runs(ratios, metrics, n_params=1e6, tokens=1e8)
    assert runs.languages == ("web", "code") and runs.targets == ("arc", "mbpp")
    np.testing.assert_array_equal(runs.losses, [[1, 2], [3, 4]])
    assert not runs.varies
    np.testing.assert_array_equal(runs.own_columns, [-1, -1])


def test_regmix_layout_names_targets_as_domains(write):
    mixtures = write("mix.csv", "index,train_the_pile_arxiv,train_the_pile_cc\n1,0.5,0.5\n2,0.1,0.9\n")
    losses = write("loss.csv", "index,metric/the_pile_cc_val_loss\n1,5\n2,4\n")
    runs = regmix_runs(mixtures, losses)
    assert runs.languages == ("the_pile_arxiv", "the_pile_cc") and runs.targets == ("the_pile_cc",)
    np.testing.assert_array_equal(runs.own_columns, [1])


@pytest.mark.parametrize("mixtures, losses, cause", [
    ("index,train_a,train_b\n1,.5,.5\n2,.5,.5\n", "index,metric/a_val_loss\n1,5\n",
     "loss.csv: no index '2', which"),
    ("index,train_a,train_b\n1,.5,.5\n", "index,metric/a_val_loss\n1,5\n2,4\n", "mix.csv: no index '2', which"),
    ("index,train_a,train_b\n1,.5,.5\n1,.4,.6\n", "index,metric/a_val_loss\n1,5\n",
     "mix.csv:3: index '1' is on line 2 already"),
    ("run,train_a,train_b\n1,.5,.5\n", "index,metric/a_val_loss\n1,5\n", "mix.csv:1: no column 'index'"),
])
def test_rows_without_a_partner_are_not_dropped(write, mixtures, losses, cause):
    with pytest.raises(InputError) as error:
        regmix_runs(write("mix.csv", mixtures), write("loss.csv", losses))
    assert cause in str(error.value)
