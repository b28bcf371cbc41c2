"""`python -m aiouffd`: the command line."""

import sys

from aiouffd.cli import main

if __name__ == "__main__":
    sys.exit(main())
