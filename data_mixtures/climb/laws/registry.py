"""All laws by name, and which one to use for which table."""

from collections.abc import Callable

from data_mixtures.climb.laws.base import Law
from data_mixtures.climb.laws.parametric import MSL, Climb, Isolated, MixingLaw
from data_mixtures.climb.laws.regressors import GaussianProcess, LightGBM, Linear, Ridge
from data_mixtures.climb.laws.structured_gp import StructuredProcess
from data_mixtures.climb.proxy_table import ProxyRuns

_ALL = (Climb, StructuredProcess, Isolated, MSL, MixingLaw, Linear, Ridge, LightGBM, GaussianProcess)
LAWS: dict[str, Callable[[], Law]] = {law.name: law for law in _ALL}


def default_law(runs: ProxyRuns) -> Law:
    """The Climb law where N or D vary and every target is a language of the mixture, else the structured process.

    That is what predicted held-out runs best in our measurements (benchmarks/RESULTS.md); only the former extrapolates
    to other N and D.
    """
    return Climb() if runs.varies and (runs.own >= 0).all() else StructuredProcess()
