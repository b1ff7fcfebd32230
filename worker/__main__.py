"""``python -m worker``: the same as ``trunkline worker``.

The command line is the roof's; this file is its second door and the only one here that knows it.
"""

import sys

from trunkline.cli import main

if __name__ == "__main__":
    sys.exit(main(["worker", *sys.argv[1:]]))
