"""Run a whole federation: `python scripts/run_rounds.py federation.yaml`."""

import sys

from hf_fedlarge.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
