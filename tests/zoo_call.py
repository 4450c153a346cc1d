"""Calls tools/zoo.py for the checkout of a test: ``python zoo_call.py CHECKOUT ARGUMENTS``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.zoo import origin
from tools.zoo.command import main

root = Path(sys.argv[1])
origin.IMPORTED = root
main(sys.argv[2:], root)
