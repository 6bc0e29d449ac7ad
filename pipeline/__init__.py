"""The whole way from a corpus to a report, by the commands of the five packages: `python -m pipeline`."""
