"""The report of an allocation shows the numbers of the file, and stops with one line on bad input."""

import copy
import json
import math
import pathlib
import re
import subprocess
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import matplotlib
import matplotlib.image
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_mixtures.climb.allocation_file import read_allocation
from data_mixtures.climb.plot_parts import LogScale, thinning
from data_mixtures.climb.plots import Plots
from data_mixtures.climb.report import ReportConfig, main, share
from mlx_pretrain.errors import InputError
from mlx_pretrain.reports.figures import ACCENT, RULE, WARM, plot_style

LANGUAGES = ["fi", "ru", "et", "uk"]
RELATIVES = [{"fi", "et"}, {"ru", "uk"}]
FIGURES = {"ratios", "losses", "epochs", "transfer", "effective", "predictions"}
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;</p></body>"


def make_method(rng: np.random.Generator, ratios: np.ndarray, interval: bool) -> dict:
    losses = 3 + rng.random(4)
    return {
        "ratios": ratios.tolist(), "losses": losses.tolist(), "effective": (ratios + 0.1 * rng.random(4)).tolist(),
        "epochs": (ratios * 5).tolist(), "weighted_loss": float(losses.mean()), "mean_loss": float(losses.mean()),
        "ratio_low": (ratios * 0.8).tolist() if interval else None,
        "ratio_high": (ratios * 1.3).tolist() if interval else None,
        "loss_low": (losses - 0.02).tolist() if interval else None,
        "loss_high": (losses + 0.03).tolist() if interval else None, "kkt": 2.5e-9 if interval else None,
        "joint_gap": 0.00321 if interval else None, "binding": [],
    }


def make_allocation() -> dict:
    """Four languages in two pairs of relatives, 12 proxy runs at two token counts."""
    rng = np.random.default_rng(0)
    natural = np.array([0.1, 0.55, 0.03, 0.32])
    methods = {"climb": np.array([0.2, 0.4, 0.0123, 0.3877]), "climb-joint": np.array([0.21, 0.39, 0.02, 0.38]),
               "natural": natural, "uniform": np.full(4, 0.25), "my own": np.array([0.5, 0.5, 0, 0])}
    methods = {name: make_method(rng, ratios, name == "climb") for name, ratios in methods.items()}
    for name, loss in (("climb", 3.2), ("natural", 3.4)):
        methods[name]["weighted_loss"] = loss
    # Better beyond the 90 % interval, better within it, worse within it, worse beyond it.
    methods["natural"]["losses"] = np.add(methods["climb"]["losses"], [0.05, 0.01, -0.01, -0.1]).tolist()
    methods["climb"]["binding"] = [["et", "max_epochs"], ["fi", "floor"]]
    related = [[any({a, b} == pair for pair in RELATIVES) for b in LANGUAGES] for a in LANGUAGES]
    values = [[None if a == b else (0.4 if related[i][j] else -0.02) for j, b in enumerate(LANGUAGES)]
              for i, a in enumerate(LANGUAGES)]
    measured, ratio = 3 + rng.random((24, 4)), rng.dirichlet(np.full(4, 0.3), 24)
    tokens = [1e6, 4e6] * 12
    return {
        "format": "mlx-allocation", "version": 1, "languages": LANGUAGES, "targets": LANGUAGES, "n_params": 1.2e9,
        "tokens": 3e10, "unique_tokens": dict.fromkeys(LANGUAGES, 10**9), "natural": natural.tolist(),
        "weights": [0.25] * 4, "weights_name": "reference", "interval": [0.05, 0.95],
        "method": "climb", "methods": methods,
        "constraints": {"floor": 0.01, "max_epochs": 4, "fixed": {}},
        "law": {"name": "climb", "family": "saturating", "notes": ["the pair fi and ru is told apart by one run"]},
        "transfer": {"values": values, "low": None, "high": None, "meaning": "Gain per unit of ratio.",
                     "identified": [[a != b and {a, b} != {"fi", "ru"} for b in LANGUAGES] for a in LANGUAGES]},
        "validation": {"climb": {"r2": [0.9, 0.8, 0.7, 0.6], "mae": [0.01] * 4, "spearman": [0.99] * 4, "seconds": 61},
                       "mixing_law": {"r2": [0.5] * 4, "mae": [0.07] * 4, "spearman": [None] * 4, "seconds": None}},
        "predictions": {"run": [f"r{k // 2}" for k in range(24)], "n_params": [1e7] * 24, "tokens": tokens,
                        "measured": measured.tolist(), "predicted": (measured * 1.02).tolist()},
        "effective": {"ratio": ratio.tolist(), "effective": (ratio + 0.01).tolist(),
                      "predicted": (ratio + 0.012).tolist(), "tokens": tokens},
        "proxies": {"runs": 12, "rows": 24, "path": "proxies/runs.csv"},
        "provenance": {"command": "python -m something", "started": "2026-01-02T03:04:05+00:00", "version": "0.1.0"},
    }


def write(folder: pathlib.Path, allocation: dict) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "allocation.json").write_text(json.dumps(allocation))
    return folder


class Page(HTMLParser):
    """Tags with attributes, text, and the cells of each table by its id, keyed by their first word."""

    def __init__(self, source: str):
        super().__init__()
        self.source, self.text, self.tags, self.tables, self.facts = source, "", [], {}, {}
        self._open, self._row, self._term = [], [], ""
        self.feed(source)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self._open.append((tag, dict(attrs), len(self.text)))

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self._open and self._open[-1][0] != "style":
            self.text += data

    def handle_endtag(self, tag):
        opened, _, start = self._open.pop()
        assert opened == tag, f"<{opened}> closed by </{tag}>"
        text = " ".join(self.text[start:].split())
        if tag == "dt":
            self._term = text
        elif tag == "dd":
            self.facts.setdefault(self._term, []).append(text)
        elif tag in ("td", "th"):
            self._row.append(text)
        elif tag == "tr":
            table = next(a for name, a, _ in reversed(self._open) if name == "table").get("id")
            self.tables.setdefault(table, {})[self._row[0]] = self._row[1:]
            self._row = []


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    folder = write(tmp_path_factory.mktemp("allocations") / "demo", make_allocation())
    main(ReportConfig(folder))
    return folder


@pytest.fixture(scope="module")
def page(folder) -> Page:
    return Page((folder / "report.html").read_text())


def test_every_figure_stands_alone_on_white_at_300_dpi(folder):
    files = {f"{name}.{ending}" for name in FIGURES for ending in ("svg", "png")}
    assert {path.name for path in (folder / "figures").iterdir()} == files
    for name in FIGURES:
        source = (folder / "figures" / f"{name}.svg").read_text()
        root = ElementTree.fromstring(source)
        assert root.tag == "{http://www.w3.org/2000/svg}svg" and len(root.findall(".//{*}text")) > 4
        assert root.find("{*}rect").attrib == {"width": "100%", "height": "100%", "fill": "#ffffff"}
        # A page's colours and another machine's fonts would not come along.
        assert "var(" not in source and "@import" not in source
        assert all("sans-serif" in family for family in re.findall(r"font-family: [^;\"]*", source))
        image = matplotlib.image.imread(folder / "figures" / f"{name}.png")
        width = float(root.get("width").removesuffix("pt"))
        assert image.shape[1] == pytest.approx(width / 72 * 300, abs=1.5)
        assert (image[[0, 0, -1, -1], [0, -1, 0, -1]] == 1).all()
        assert image[..., :3].min() < 0.3


def test_the_table_of_the_mixture_holds_the_numbers_of_the_file(page):
    a = make_allocation()
    best, natural = a["methods"]["climb"], a["methods"]["natural"]
    names = {"fi": "fi Suomi Finnish", "ru": "ru Русский Russian", "et": "et Eesti Estonian",
             "uk": "uk Українська Ukrainian"}
    assert list(page.tables["languages"])[1:] == [names[code] for code in ("ru", "uk", "fi", "et")]
    for k, code in enumerate(LANGUAGES):
        assert page.tables["languages"][names[code]] == [
            f"{100 * a['natural'][k]:.2f}",
            f"{100 * best['ratios'][k]:.2f} {100 * best['ratio_low'][k]:.2f} to {100 * best['ratio_high'][k]:.2f}",
            f"{100 * best['effective'][k]:.2f}", f"{best['epochs'][k]:.2f}",
            f"{best['losses'][k]:.3f} {best['loss_low'][k]:.3f} to {best['loss_high'][k]:.3f}",
            f"{100 * (best['losses'][k] / natural['losses'][k] - 1):+.2f} %".replace("-", "−"),
            {"et": "epoch cap", "fi": "floor"}.get(code, "")]


def test_the_tables_of_methods_and_laws_hold_the_numbers_of_the_file(page):
    methods = make_allocation()["methods"]
    rows = page.tables["methods"]
    assert next(iter(rows)) == "Method"
    assert set(rows) == {"Method", "Climb", "Climb joint", "natural", "uniform", "my own"}
    losses = [float(row[0]) for row in list(rows.values())[1:]]
    assert losses == sorted(losses)
    worst = max(a / b for a, b in zip(methods["climb"]["losses"], methods["natural"]["losses"])) - 1
    assert rows["Climb"] == ["3.2000", "−5.88 %", f"{methods['climb']['mean_loss']:.4f}",
                             f"{100 * worst:+.2f} %".replace("-", "−"), "2.00", "2.5e−09", "+0.32 %", "2"]
    assert rows["my own"][4:] == ["2.50", "–", "–", "–"]
    assert page.tables["laws"]["Climb"] == ["0.7500", "0.600", "0.0100", "0.9900", "1 min 01 s"]
    assert page.tables["laws"]["mixing law"] == ["0.5000", "0.500", "0.0700", "–", "–"]


def test_the_first_lines_say_what_was_decided_and_how_sure_it_is(page):
    text = " ".join(page.text.split())
    assert "a model of 1.2B parameters and 30B training tokens, from 12 proxy runs, by Climb" in text
    assert "more to fi (10.0 → 20.0 %), uk (32.0 → 38.8 %) and less to ru (55.0 → 40.0 %), et (3.0 → 1.2 %)" in text
    assert "5.88 % lower than with the natural mixture" in text
    assert "2 of 4 languages get better, 1 of them beyond the 90 % interval of the prediction" in text
    assert "off by 2.00 % of the loss on average, less than that gain" in text
    assert "beyond the proxies: 120 times the parameters and 7.5k times the tokens" in text
    assert "the pair fi and ru is told apart by one run" in text
    assert "epoch cap (4) for et; floor (1.00 %) for fi." in text
    assert page.facts["Gap to the joint optimum"] == ["+0.32 %", "of the weighted loss"]
    assert page.facts["Weighted loss against natural"][0] == "−5.88 %"
    assert not re.search(r"\bNone\b|\bnan\b", page.text)


def test_a_mixture_that_is_no_better_is_called_so(tmp_path):
    a = make_allocation()
    a["methods"]["climb"]["weighted_loss"] = 3.5
    a["predictions"].update(n_params=[1.2e9] * 24, tokens=[3e10] * 24)
    main(ReportConfig(write(tmp_path, a)))
    text = " ".join(Page((tmp_path / "report.html").read_text()).text.split())
    assert "No gain is expected: the weighted loss is 2.94 % higher than with the natural mixture" in text
    assert "than that gain" not in text and "beyond the proxies" not in text


def test_the_page_loads_and_runs_nothing_and_its_plots_take_its_colours(page):
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "img", "iframe", "object", "embed", "base", "image"), tag
        assert not any(name.startswith("on") or name in ("src", "srcset") for name in attributes)
        assert attributes.get("href", "#").startswith("#")
    assert not re.search(r"@import|url\((?!#)|https?:", page.source)
    drawings = "".join(re.findall(r"<svg.*?</svg>", page.source, re.DOTALL))
    assert page.source.count("<svg") == len(FIGURES)
    assert not re.search(r"#[0-9a-f]{6}|rgb|font-family", drawings)
    assert set(re.findall(r"var\((--\w+)\)", drawings)) <= set(re.findall(r"(--\w+):", page.source))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"(?:href=\"|url\()#([^\")]*)", page.source)) <= set(ids)


def test_names_from_the_file_are_never_markup(tmp_path):
    text = json.dumps(make_allocation()).replace('"et"', json.dumps(HOSTILE))
    a = json.loads(text.replace('"my own"', json.dumps(HOSTILE)).replace('"mixing_law"', json.dumps(HOSTILE)))
    a["provenance"]["command"] = a["proxies"]["path"] = a["weights_name"] = a["transfer"]["meaning"] = HOSTILE
    a["law"]["notes"] = [HOSTILE + "\u0000\ud800"]
    a["languages"][0] = a["targets"][0] = "a\u0001\nb $x^2$ \u202e"
    a["methods"]["climb"]["binding"] = []
    main(ReportConfig(write(tmp_path, a)))
    page = Page((tmp_path / "report.html").read_text())
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert HOSTILE in page.tables["languages"] and HOSTILE in page.tables["methods"] and HOSTILE in page.tables["laws"]
    for file in (tmp_path / "figures").glob("*.svg"):
        assert not {"script", "img"} & {element.tag.split("}")[1] for element in ElementTree.parse(file).iter()}


def test_relatives_stand_together_in_the_matrix_and_unidentified_pairs_have_no_colour(folder):
    root = ElementTree.parse(folder / "figures" / "transfer.svg").getroot()
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    order = [text for text in texts if text in LANGUAGES]
    assert order[:4] == order[4:] and {frozenset(order[:2]), frozenset(order[2:4])} == set(map(frozenset, RELATIVES))
    assert texts.count("0.40") == 4 and texts.count("−0.02") == 8 and "not identified" in texts
    with plot_style():
        axes = Plots(read_allocation(folder / "allocation.json")).transfer().axes[0]
    gains, losses, unknown, hatched, _ = axes.collections
    # Two of the eight pairs of unrelated languages are not identified.
    assert [len(cells.get_offsets()) for cells in axes.collections] == [4, 6, 2, 2, 4]
    assert matplotlib.colors.to_hex(gains.get_facecolor()[0]) == ACCENT
    assert matplotlib.colors.to_hex(losses.get_facecolor()[0]) == WARM
    assert gains.get_facecolor()[0, 3] > 10 * losses.get_facecolor()[0, 3]
    assert matplotlib.colors.to_hex(unknown.get_facecolor()[0]) == RULE and hatched.get_hatch()
    pairs = {(order[int(y)], order[int(x)]) for x, y in unknown.get_offsets()}
    assert pairs == {("fi", "ru"), ("ru", "fi")}


def test_what_a_law_does_not_have_is_left_out(tmp_path):
    a = make_allocation()
    a.update(transfer=None, effective=None, unique_tokens=None, natural=None, constraints={}, validation={},
             targets=["fi", "web"], weights=[1.0, 0.0], predictions=None, proxies={"runs": 3, "rows": 3})
    a["methods"] = {"regmix": make_method(np.random.default_rng(1), np.array([0.5, 0.5, 0.0, 0.0]), False)}
    a["methods"]["regmix"].update(losses=[3.1, 3.2], epochs=None, effective=None)
    a["constraints"] = {"floor": {"fi": 0.1}, "max_epochs": None, "fixed": {}}
    a.update(method="regmix", law={"name": "regmix", "family": None, "notes": []})
    main(ReportConfig(write(tmp_path, a)))
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {"ratios", "losses"}
    page = Page((tmp_path / "report.html").read_text())
    assert page.tables["languages"] == {"Name": ["Ratio", "Expected loss"], "fi Suomi Finnish": ["50.00", "3.100"],
                                        "ru Русский Russian": ["50.00", "–"], "et Eesti Estonian": ["0", "–"],
                                        "uk Українська Ukrainian": ["0", "–"], "web": ["–", "3.200"]}
    assert not re.search(r"\bNone\b|\bnan\b|What languages give", page.text)


def test_a_rerun_gives_the_same_files_whatever_the_global_plot_settings(folder, tmp_path):
    write(tmp_path / "demo", make_allocation())
    with matplotlib.rc_context({"axes.facecolor": "red", "font.size": 30, "svg.fonttype": "path"}):
        before = dict(matplotlib.rcParams)
        main(ReportConfig(tmp_path / "demo"))
        assert dict(matplotlib.rcParams) == before
    for file in [folder / "report.html", *(folder / "figures").iterdir()]:
        assert (tmp_path / "demo" / file.relative_to(folder)).read_bytes() == file.read_bytes(), file


def damaged(*path: str | int, value: object = "gone") -> dict:
    """The allocation with the value at `path` replaced, or removed."""
    a = copy.deepcopy(make_allocation())
    at = a
    for key in path[:-1]:
        at = at[key]
    if value == "gone":
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return a


@pytest.mark.parametrize("allocation, named", [
    ("{", "not a valid JSON allocation"),
    ([], "the file is not a JSON object"),
    (damaged("format", value="other"), "format 'other'"),
    (damaged("version", value=2), "version 2"),
    (damaged("tokens"), "tokens is missing"),
    (damaged("n_params", value=-1), "n_params is -1, not a positive number"),
    (damaged("n_params", value=True), "n_params is True"),
    (damaged("languages", value=["a", "a"]), "languages is not a list of different names"),
    (damaged("method", value="best"), "method 'best' is not one of methods"),
    (damaged("methods", "climb", "ratios"), "methods.climb.ratios is missing"),
    (damaged("methods", "climb", "ratios", value=[0.5, 0.5]), "methods.climb.ratios has the shape 2, not 4"),
    (damaged("methods", "climb", "ratios", 0, value=0.9), "methods.climb.ratios are negative or sum to 1.7"),
    (damaged("methods", "uniform", "losses", 1, value=math.nan), "uniform.losses has values that are not finite"),
    (damaged("methods", "uniform", "losses", 1, value="low"), "methods.uniform.losses is not an array of numbers"),
    (damaged("methods", "uniform", "losses", 1, value=-3), "methods.uniform.losses are not all positive"),
    (damaged("methods", "uniform", "binding", value=[["xx", "floor"]]), "uniform.binding holds ['xx', 'floor']"),
    (damaged("methods", "uniform", value=3), "methods.uniform is 3, not an object"),
    (damaged("constraints", "max_epochs", value="many"), "constraints.max_epochs is 'many'"),
    (damaged("transfer", "values", value=[[0.0] * 4] * 3), "transfer.values has the shape 3 x 4, not 4 x 4"),
    (damaged("transfer", "identified", 0, value=[True]), "transfer.identified is not an array of numbers"),
    (damaged("validation", "climb", "mae"), "validation.climb.mae is missing"),
    (damaged("predictions", "measured", 3, value=None), "predictions.measured is not an array of numbers"),
    (damaged("effective", "tokens", value=[1e6]), "effective.ratio has the shape 24 x 4, not 1 x 4"),
    (damaged("law", "notes", value="one"), "law.notes is 'one', not a list"),
    (damaged("proxies", value=None), "proxies is null, not an object"),
])
def test_bad_input_is_named_in_one_line_and_the_old_report_stays(tmp_path, allocation, named):
    file = tmp_path / "allocation.json"
    file.write_text(allocation if isinstance(allocation, str) else json.dumps(allocation))
    (tmp_path / "report.html").write_text("old")
    with pytest.raises(InputError) as error:
        main(ReportConfig(tmp_path))
    # gin adds a line to exceptions that pass through a configurable; commands drop it.
    message = str(error.value).splitlines()[0]
    assert message.startswith(f"{file}: ") and named in message
    assert {path.name for path in tmp_path.iterdir()} == {"allocation.json", "report.html"}
    assert (tmp_path / "report.html").read_text() == "old"


@given(st.lists(st.just(0.0) | st.floats(1e-12, 1), min_size=1, max_size=20), st.integers(2, 7))
def test_a_logarithmic_axis_has_a_place_for_every_value(values, max_ticks):
    values = np.array(values)
    scale = LogScale(values)
    placed = scale.place(values)
    assert (placed >= scale.low).all() and (placed <= scale.high).all() and scale.low > 0
    shown = values >= placed.max() / 1e3
    assert (placed[shown] == values[shown]).all() or not values.any()
    axes = matplotlib.figure.Figure().subplots()
    scale.apply(axes, "x", max_ticks=max_ticks)
    ticks = axes.get_xticks()
    assert len(ticks) <= max_ticks + 1 and (ticks >= scale.low).all() and (ticks <= scale.high).all()


@given(st.floats(1e-9, 1))
def test_ratios_keep_two_significant_digits(value):
    text = share(value)
    assert float(text) == pytest.approx(100 * value, rel=0.051, abs=1e-12) and len(text.split(".")[1]) >= 2
    assert (share(0), share(None)) == ("0", "–")


@pytest.mark.parametrize("rows, panels", [(1, 1), (24, 4), (100_000, 61)])
def test_points_left_out_are_counted(rows, panels):
    assert thinning(rows, panels) == min(rows, 6000 // panels)


def test_arrays_come_back_in_the_shapes_of_the_file(folder):
    a = read_allocation(folder / "allocation.json")
    assert a["baseline"] == "natural" and a["effective"]["ratio"].shape == (24, 4)
    assert np.isnan(np.diag(a["transfer"]["values"])).all() and not np.diag(a["transfer"]["identified"]).any()


def test_the_command_writes_the_report_or_says_in_one_line_why_not(tmp_path):
    write(tmp_path / "run", make_allocation())

    def command(*arguments):
        return subprocess.run([sys.executable, "-m", "data_mixtures.climb.report", *arguments], capture_output=True,
                              text=True)

    done = command(f"--gin.climb_report.folder={tmp_path / 'run'}")
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "run" / "report.html").exists()
    failed = command(f"--gin.climb_report.folder={tmp_path}")
    assert (failed.returncode, failed.stderr) == (1, f"error: {tmp_path}/allocation.json: no such allocation\n")
