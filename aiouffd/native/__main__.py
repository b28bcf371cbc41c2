"""`python -m aiouffd.native`: compile the C files where they lie, for an editable install or a late compiler."""

import sys

from aiouffd.native import build

try:
    build.build(build.HERE / build.NAME)
except build.BuildError as error:
    sys.exit(str(error))
