"""Measures the default model: size, speed, start-up, evaluation, drawing and memory.

Run by hand on an otherwise idle machine: `make benchmark ARGS=--data-dir=FOLDER`.
"""

import contextlib
import io
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
START = time.time()

import numpy as np

import data
import main
from main import tf

STEPS = 400


def seconds(function, *args):
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def matmul_rate(size=2048):
    """The rate of TensorFlow's own matrix product with all threads, in operations a second."""
    matrix = tf.Variable(tf.random.normal([size, size]))
    product = tf.matmul(matrix, matrix).op
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        return 2 * size ** 3 / np.median([seconds(session.run, product) for _ in range(15)])


def step_operations(session, model, feeds):
    """Floating-point operations of a step's matrix products and convolutions, from their shapes."""
    graph = tf.get_default_graph()
    needed = tf.graph_util.extract_sub_graph(graph.as_graph_def(), [model.optimize.name])
    operations = [graph.get_operation_by_name(node.name) for node in needed.node]
    shapes = []  # Of each, a tensor, and what each of its numbers sums over.
    for op in operations:
        if op.type == 'MatMul':
            inner = op.inputs[0].shape[0 if op.get_attr('transpose_a') else 1].value
            shapes.append((op.outputs[0], [inner or len(feeds['images:0']) // 2]))
        elif op.type.startswith('Conv2D'):
            # The convolution from the large map to the small: its output times what each sums over.
            kernel = op.outputs[0] if op.type == 'Conv2DBackpropFilter' else op.inputs[1]
            shapes.append((op.outputs[0] if op.type == 'Conv2D' else op.inputs[2],
                           kernel.shape.as_list()[:3]))
    sizes = session.run([tf.size(small) for small, _ in shapes], feeds)
    return sum(2 * size * np.prod(summed) for size, (_, summed) in zip(sizes, shapes))


def run(folder):
    main.keep_freed_memory()
    args = main.parse_arguments([*sys.argv[1:], '--output-dir', folder, '--epochs', '1'])
    dataset = data.load(args.data_dir, args.dataset)
    model = main.build(args, dataset)
    batches = data.batches(dataset.train_images, args.batch_size, 0, 1)
    with tf.Session(config=main.SESSION_CONFIG) as session:
        session.run(tf.global_variables_initializer())

        def step():
            session.run([model.optimize, model.elbo, model.reg],
                        {'images:0': data.to_float(next(batches)), 'learning_rate:0': 1e-4})
        step()
        start_up = time.time() - START
        times = np.array([seconds(step) for _ in range(STEPS)])
        evaluation = seconds(main.evaluate, session, model, dataset.test_images)
        record = {'log_dir': 'logs', 'history': [dict(epoch=1, validation_negative_elbo=1.)],
                  'test': {}}
        with contextlib.redirect_stdout(io.StringIO()):
            report = seconds(main.report, args, dataset, model, session, record, {}, lambda: None)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        operations = step_operations(session, model, {
            'images:0': data.to_float(next(batches)), 'learning_rate:0': 0.})
    # In a process of its own, since the first session sets the threads of all.
    peak = float(subprocess.check_output([sys.executable, __file__, 'matmul']))
    low, median, high = np.percentile(times, [10, 50, 90])
    for name, value in [
            ('TensorFlow, Python', '%s, %s' % (tf.VERSION, platform.python_version())),
            ('parameters', '%d' % sum(int(np.prod(v.shape)) for v in tf.trainable_variables())),
            ('operations a step', '%.2f GFLOP' % (operations / 1e9)),
            ('step of %d images' % args.batch_size,
             '%.1f ms (10%%: %.1f, 90%%: %.1f)' % (1e3 * median, 1e3 * low, 1e3 * high)),
            ('training', '%.0f images/s' % (args.batch_size / median)),
            ('rate', '%.0f GFLOP/s' % (operations / median / 1e9)),
            ('matmul 2048 x 2048', '%.0f GFLOP/s' % (peak / 1e9)),
            ('rate / matmul', '%.0f %%' % (100 * operations / median / peak)),
            ('start to first step', '%.1f s' % start_up),
            ('evaluation of %d images' % len(dataset.test_images), '%.1f s' % evaluation),
            ('drawing the last figures', '%.1f s' % (report - evaluation)),
            ('peak memory', '%.0f MB' % memory)]:
        print('%-28s %s' % (name, value))


if __name__ == '__main__':
    if sys.argv[1:] == ['matmul']:
        print(matmul_rate())
    else:
        with tempfile.TemporaryDirectory() as folder:
            run(folder)
