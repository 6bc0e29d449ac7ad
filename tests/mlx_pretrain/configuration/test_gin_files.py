"""Gin files: values reach the constructors, and a mistake is one line that names its place."""

import glob

import gin
import pytest

import mlx_pretrain.train  # noqa: F401  its configurables, and those of the next three
import raters.languages
import raters.rater_plugins.existing_scores
import raters.score  # noqa: F401
from mlx_pretrain.configuration import gin_files
from mlx_pretrain.errors import InputError
from mlx_pretrain.models.decoder import DecoderConfig


@pytest.fixture(autouse=True)
def clean_gin():
    yield
    gin.clear_config()


def test_files_and_overrides_reach_the_constructor(tmp_path):
    file = tmp_path / "a.gin"
    file.write_text("include 'gin/models/base_1p2b.gin'\nDecoderConfig.n_layers = 2\n")
    gin_files.parse_gin([str(file)], ["DecoderConfig.vocab_size = 1000"])
    config = DecoderConfig()
    assert (config.n_layers, config.vocab_size, config.mlp_dim) == (2, 1000, 5504)


@pytest.mark.parametrize(
    "text, message",
    [
        ("DecoderConfg.n_layers = 2", r"a\.gin:1: .*DecoderConfg"),
        ("\nDecoderConfig.n_layer = 2", r"a\.gin:?.*n_layer"),
        ("DecoderConfig.n_layers 2", r"a\.gin"),
        ("include 'nowhere.gin'", r"nowhere\.gin"),
        ("import no_such_module", r"no_such_module"),
    ],
)
def test_gin_typos_name_file_and_cause(tmp_path, text, message):
    file = tmp_path / "a.gin"
    file.write_text(text + "\n")
    with pytest.raises(InputError, match=message) as error:
        gin_files.parse_gin([str(file)], [])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("binding, message", [
    ("DecoderConfig.rope_theta = 'x'", "DecoderConfig.rope_theta = 'x': must be a number"),
    ("DecoderConfig.n_layers = 2.0", "DecoderConfig.n_layers = 2.0: must be an integer"),
    ("DecoderConfig.n_layers = True", "DecoderConfig.n_layers = True: must be an integer"),
    ("DecoderConfig.n_layers = None", "DecoderConfig.n_layers = None: must be an integer"),
    ("DecoderConfig.tie_embeddings = 1", "DecoderConfig.tie_embeddings = 1: must be True or False"),
    ("DecoderConfig.dtype = 32", "DecoderConfig.dtype = 32: must be a string"),
    ("QualityConfig.pooling = 3", "QualityConfig.pooling = 3: must be a string"),
    ("QualityConfig.norm_epsilon = 'small'", "QualityConfig.norm_epsilon = 'small': must be a number"),
    ("warmup_cosine.peak = 'high'", "warmup_cosine.peak = 'high': must be a number"),
    ("other/warmup_cosine.peak = 'high'", "other/warmup_cosine.peak = 'high': must be a number"),
    ("warmup_cosine.warmup_steps = %STEPS", "warmup_cosine.warmup_steps = 1.5: must be an integer"),
    ("train.eval_every = 'often'", "train.eval_every = 'often': must be an integer or None"),
    ("train.run_dir = @adamw", "train.run_dir = @adamw: must be a string"),
    ("train.model = 'small'", r"train.model = 'small': must be a DecoderConfig, e.g. @DecoderConfig\(\)"),
    ("train.model = @QualityConfig()", "train.model = @QualityConfig.*: must be a DecoderConfig"),
    ("make_mesh.fsdp = '8'", "make_mesh.fsdp = '8': must be an integer"),
    ("Corpus.languages = ['a', 3]", "Corpus.languages = .*: must be a list"),
    ("score.rater = 'mine'", "score.rater = 'mine': must be a QualityScorer"),
])
def test_a_value_of_another_type_is_one_line_that_names_the_parameter(binding, message):
    with pytest.raises(InputError, match=message) as error:
        gin_files.parse_gin([], [binding] + ["STEPS = 1.5"] * ("%STEPS" in binding))
    assert "\n" not in str(error.value)


def test_values_that_fit_are_taken():
    gin_files.parse_gin([], [
        "DecoderConfig.rope_theta = 10000", "train.eval_every = None", "train.model = @DecoderConfig()",
        "train.optimizer = @adamw", "Corpus.files = ['a']", "score.corpus = @Corpus()",
        "score.rater = @ExistingScores()", "FOLDER = 'run'", "train.run_dir = %FOLDER",
        "languages.confusable = [('id', 'ms')]",
    ])


@pytest.fixture
def my_gin(tmp_path):
    """Copy of the sample's macros by a user, with a macro that another file of the user reads."""
    file = tmp_path / "my.gin"
    file.write_text("include 'gin/mixtures/sample.gin'\nTOKENIZER = 'mine'\nTEMPERATURE = 2.0\nEXPERTS = 4\n")
    (tmp_path / "other.gin").write_text("train.steps = %EXPERTS\n")
    return file


@pytest.mark.parametrize("binding, message", [
    ("VOCABSIZE = 305", r"--gin\.VOCABSIZE: nothing reads this macro; is VOCAB_SIZE meant\?"),
    ("vocab_size = 305", r"--gin\.vocab_size: nothing reads this macro; is VOCAB_SIZE meant\?"),
    ("TEMPERATURE = 3", r"--gin\.TEMPERATURE: nothing reads this macro"),  # of another command
    ("NEW = %VOCAB_SIZE", r"--gin\.NEW: nothing reads this macro"),
    ("a/VOCAB_SIZE = 3", r"--gin\.a/VOCAB_SIZE: nothing reads this macro"),
])
def test_a_macro_on_the_command_line_that_nothing_reads_is_refused(my_gin, binding, message):
    model = ["DecoderConfig.vocab_size = %VOCAB_SIZE", "DecoderConfig.max_length = %VOCAB_SIZE"]
    with pytest.raises(InputError, match=message):
        gin_files.parse_gin([str(my_gin)], [*model, binding])
    gin.clear_config()
    gin_files.parse_gin([str(my_gin)], [*model, "VOCAB_SIZE = %HALF", "HALF = 150"])


@pytest.mark.parametrize("binding, message", [
    ("DecoderConfig.n_layer = 2", r"--gin\.DecoderConfig\.n_layer = 2: Configurable 'DecoderConfig' doesn't have a "
                                  r"parameter named 'n_layer'; is n_layers meant\?"),
    ("Decoderconfig.n_layers = 2", r"--gin\.Decoderconfig.*No configurable matching 'Decoderconfig'; is Dec"),
])
def test_a_mistake_on_the_command_line_is_not_blamed_on_the_file(my_gin, binding, message):
    with pytest.raises(InputError, match=f"^{message}"):
        gin_files.parse_gin([str(my_gin)], ["DecoderConfig.max_length = 5", binding])


@pytest.mark.parametrize("fill_macros", [False, True])
def test_a_misspelled_macro_in_a_file_is_refused(my_gin, fill_macros):
    my_gin.write_text(my_gin.read_text() + "VOCABSIZE = 305\n")
    with pytest.raises(InputError, match=r"my\.gin:5: nothing reads the macro VOCABSIZE; is VOCAB_SIZE meant\?"):
        gin_files.parse_gin([str(my_gin)], [], fill_macros=fill_macros)


def test_a_macro_whose_reader_is_overridden_is_no_mistake_of_its_file(tmp_path):
    (tmp_path / "run.gin").write_text("MY_STEPS = 3\ntrain.steps = %MY_STEPS\n")
    gin_files.parse_gin([str(tmp_path / "run.gin")], ["train.steps = 5"])
    gin.clear_config()
    with pytest.raises(InputError, match=r"--gin\.MY_STEPS: nothing reads this macro"):
        gin_files.parse_gin([str(tmp_path / "run.gin")], ["train.steps = 5", "MY_STEPS = 4"])


def test_no_file_of_the_repository_sets_a_macro_that_none_reads():
    files = glob.glob(f"{gin_files.GIN_ROOT}/gin/**/*.gin", recursive=True)
    assert len(files) > 20
    gin_files._check_macros(files, [], [])
