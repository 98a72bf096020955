"""`python -m modeling_querit`: the command line, where the script `querit` is not on the path."""

from .cli import main

main()
