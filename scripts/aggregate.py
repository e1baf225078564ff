"""Aggregate updates into an adapter: `python scripts/aggregate.py UPDATE … --package PACKAGE -o ADAPTER`."""

import sys

from hf_fedlarge.cli import main

if __name__ == "__main__":
    sys.exit(main(["aggregate", *sys.argv[1:]]))
