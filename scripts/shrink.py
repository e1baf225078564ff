"""Shrink a checkpoint into a package: `python scripts/shrink.py CHECKPOINT -o PACKAGE`."""

import sys

from hf_fedlarge.cli import main

if __name__ == "__main__":
    sys.exit(main(["shrink", *sys.argv[1:]]))
