"""The paper's tables and figures, each a program: `python -m experiments.NAME --help`."""
