"""Climb: from small proxy runs to the share of each language in the training mixture (arXiv 2509.15556)."""

# Of allocation.json, which `allocate` writes and `report` reads.
ALLOCATION_FORMAT, ALLOCATION_VERSION = "mlx-allocation", 1
