"""`flowalign train` on several processes: `accelerate launch scripts/train.py RECIPE [KEY=VALUE ...] [--resume]`."""

import sys

from flowalign.cli.app import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
