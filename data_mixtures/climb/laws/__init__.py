"""Laws: how the held-out losses of a mixture depend on its ratios, the model size N and the training tokens D.

A law is a class with a `name` and a method `fit(runs, seed)` that returns a `base.FittedLaw`, which predicts losses;
`base` defines the interface of both. Every law, or family of similar laws, has its own file here:

    climb.py           Climb: an isolated law at effective ratios, with transfer between languages (transfer.py)
    structured_gp.py   StructuredGP: a Gaussian process with the structure of mixtures
    isolated.py        Isolated: every language for itself
    msl.py             MSL: a law separable in N, D and the language's ratio
    mixing_law.py      MixingLaw: exponentials of linear combinations of the ratios
    regressors.py      Linear, Ridge, LightGBM, GaussianProcess: regressions from libraries

What parametric laws share: formulas.py (formulas of one target), parametric.py (their fit) and fitting.py (the
optimizer). To add a law, write its file and add a line to `LAWS`:

    @gin.configurable
    class Mean:
        name = "mean"

        def fit(self, runs: ProxyRuns, seed: int = 0) -> FittedMean: ...
"""

from collections.abc import Callable

from data_mixtures.climb.laws.base import Law
from data_mixtures.climb.laws.climb import Climb
from data_mixtures.climb.laws.isolated import Isolated
from data_mixtures.climb.laws.mixing_law import MixingLaw
from data_mixtures.climb.laws.msl import MSL
from data_mixtures.climb.laws.regressors import GaussianProcess, LightGBM, Linear, Ridge
from data_mixtures.climb.laws.structured_gp import StructuredGP
from data_mixtures.climb.proxy_table import ProxyRuns

# Add your law here: its name, as `allocate.compared` and result files have it, and its class.
LAWS: dict[str, Callable[[], Law]] = {
    "climb": Climb,
    "structured_gp": StructuredGP,
    "isolated": Isolated,
    "msl": MSL,
    "mixing_law": MixingLaw,
    "linear": Linear,
    "ridge": Ridge,
    "lightgbm": LightGBM,
    "gaussian_process": GaussianProcess,
}


def default_law(runs: ProxyRuns) -> Law:
    """Returns the law that predicted held-out runs best in our measurements (benchmarks/RESULTS.md) on such tables.

    That is Climb where N or D vary and every target is a language of the mixture, else StructuredGP. Climb alone
    extrapolates to other N and D.
    """
    return Climb() if runs.varies and (runs.own_columns >= 0).all() else StructuredGP()
