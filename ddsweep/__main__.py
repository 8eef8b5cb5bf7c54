"""``python -m ddsweep``."""

from ddsweep.cli import main

main()
