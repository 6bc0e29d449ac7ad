"""HTML reports: the history of a run, figures, and parts of pages."""
