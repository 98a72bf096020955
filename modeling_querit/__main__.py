"""`python -m modeling_querit`: the command line, where its script is not on the path."""

from .cli import run

run()
