"""`python -m aiouffd.native`: compile the C files where they lie, for an editable install or a late compiler."""

import sys
from pathlib import Path

from aiouffd.native import build

try:
    build.build(Path(build.HERE, build.NAME))
except build.BuildError as _error:
    sys.exit(str(_error))
