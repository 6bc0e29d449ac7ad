"""Arrays in files without headers, of which only what is looked at is read."""

import numpy as np
from etils import epath

from mlx_pretrain import gcs


def map_array(path: epath.Path, dtype: np.dtype | type) -> np.ndarray:
    """Returns the values of a file `[values]`, mapped into memory where the file system can do that."""
    if gcs.is_gs(path):
        return np.frombuffer(path.read_bytes(), dtype)
    return np.asarray(np.memmap(path, dtype, "r")) if path.stat().length else np.zeros(0, dtype)
