"""Fold an adapter into the full checkpoint: `python scripts/merge.py CHECKPOINT ADAPTER -o CHECKPOINT2`."""

import sys

from hf_fedlarge.cli import main

if __name__ == "__main__":
    sys.exit(main(["merge", *sys.argv[1:]]))
