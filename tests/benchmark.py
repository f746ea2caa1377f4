"""Measures the default model: start-up, a training step, evaluation and memory.

Run by hand on an otherwise idle machine: `make benchmark ARGS=--data-dir=FOLDER`.
"""

import os
import platform
import resource
import sys
import time

START = time.time()
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np

import data
import main
from main import tf

STEPS = 200


def run():
    main.keep_freed_memory()
    args = main.parse_arguments()
    dataset = data.load(args.data_dir)
    optimize = main.build(args, dataset)
    batches = data.batches(dataset.train_images, args.batch_size, args.seed, 1)
    with tf.Session(config=main.SESSION_CONFIG) as session:
        session.run(tf.global_variables_initializer())
        seconds = []
        for _ in range(STEPS):
            images = data.to_float(next(batches))
            step_start = time.perf_counter()
            session.run([optimize, 'elbo:0', 'divergence:0'],
                        {'images:0': images, 'learning_rate:0': 1e-4,
                         'num_codes:0': args.training_codes})
            seconds.append(time.perf_counter() - step_start)
            if len(seconds) == 1:
                start_up = time.time() - START
        evaluation_start = time.perf_counter()
        main.evaluate(session, dataset.test_images)
        evaluation = time.perf_counter() - evaluation_start
    low, median, high = 1e3 * np.percentile(seconds[20:], [10, 50, 90])
    print('TensorFlow %s, Python %s' % (tf.VERSION, platform.python_version()))
    print('start to first step: %.1f s' % start_up)
    print('step of %d images: median %.1f ms (10th and 90th percentile: %.1f, %.1f)'
          % (args.batch_size, median, low, high))
    print('evaluation of %d images: %.1f s' % (len(dataset.test_images), evaluation))
    print('peak memory: %d MB' % (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


if __name__ == '__main__':
    run()
