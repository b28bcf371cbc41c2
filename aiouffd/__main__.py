"""`python -m aiouffd`: the command line."""

from aiouffd.cli import run

if __name__ == "__main__":
    run()
