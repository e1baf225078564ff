"""What an adapter is worth on both models: `python scripts/transfer.py CHECKPOINT PACKAGE ADAPTER --data DATA`."""

import sys

from hf_fedlarge.cli import main

if __name__ == "__main__":
    sys.exit(main(["transfer", *sys.argv[1:]]))
