"""aiouffd: an asyncio framework for Linux userfaultfd. Memory that fills itself on first touch."""

from aiouffd.errors import *  # noqa: F403
from aiouffd.kernel.abi import FaultFlag, Feature, Ioctl, RegisterMode
from aiouffd.kernel.region import Region
from aiouffd.kernel.userfaultfd import Capabilities, Userfaultfd, probe
from aiouffd.ranges import Range

__version__ = "0.1.0"
