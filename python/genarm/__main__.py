"""`python -m genarm`: the command line."""

from .cli.app import main

main()
