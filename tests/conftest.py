"""Lets the tests import the modules of the top level; `main` keeps TensorFlow quiet."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import main  # noqa: F401
