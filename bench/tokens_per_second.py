"""Tokens/s against naive decoding: `python -m bench.tokens_per_second`, which is `genarm bench` in a checkout."""

import sys

from genarm.cli.app import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
