"""Publish on the Hub: `python scripts/publish.py DIRECTORY OWNER/NAME`."""

import sys

from hf_fedlarge.cli import main

if __name__ == "__main__":
    sys.exit(main(["push", *sys.argv[1:]]))
