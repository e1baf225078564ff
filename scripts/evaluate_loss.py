"""Print the held-out loss of a model: `python scripts/evaluate_loss.py MODEL --data DATA`."""

import sys

from hf_fedlarge.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
