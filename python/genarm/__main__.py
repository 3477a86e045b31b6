"""`python -m genarm`: the command line."""

from .cli import main

main()
