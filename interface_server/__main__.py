"""``python -m interface_server``: the same as ``trunkline interface``.

The command line is the roof's; this file is its second door and the only one here that knows it.
"""

import sys

from trunkline.cli import main

if __name__ == "__main__":
    sys.exit(main(["interface", *sys.argv[1:]]))
