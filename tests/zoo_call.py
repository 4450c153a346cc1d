"""Calls tools/zoo.py for the checkout of a test: ``python zoo_call.py CHECKOUT ARGUMENTS``."""

import runpy
import sys
from pathlib import Path

from gplq_mm.zoo import checkout

root = Path(sys.argv[1])
checkout.IMPORTED = root
tool = Path(__file__).resolve().parents[1] / 'tools' / 'zoo.py'
runpy.run_path(str(tool))['main'](sys.argv[2:], root)
