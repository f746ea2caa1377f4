"""Lets the tests import the modules of the repository's top level, and keeps TensorFlow quiet."""

import os
import sys

os.environ['TF_CPP_MIN_LOG_LEVEL'] = '3'  # Read when TensorFlow is first imported.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import tensorflow.compat.v1 as tf

tf.logging.set_verbosity('ERROR')
tf.disable_v2_behavior()
