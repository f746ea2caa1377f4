"""Measures the default model: size, speed, start-up, evaluation, drawing and memory.

Run by hand on an otherwise idle machine: `make benchmark ARGS=--data-dir=FOLDER`.
"""

import gc
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
START = time.time()
gc.disable()  # As `main.py` does until training starts.

import main
import data
import numpy as np
import tensorflow.compat.v1 as tf

STEPS = 200


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


def step_operations(model, batch):
    """Floating-point operations of a step's matrix products and convolutions, from their shapes."""
    session = tf.get_default_session()
    graph = tf.get_default_graph()
    needed = tf.graph_util.extract_sub_graph(graph.as_graph_def(), [model.optimize.name])
    operations = [graph.get_operation_by_name(node.name) for node in needed.node]
    products = [op for op in operations if op.type == 'MatMul']
    convolutions = [op for op in operations if op.type.startswith('Conv2D')]

    def shapes(tensors):
        return session.run([tf.shape(t) for t in tensors], {'images:0': data.to_float(batch),
                                                            'learning_rate:0': 0.})
    total = 0
    for op, a, out in zip(products, shapes([op.inputs[0] for op in products]),
                          shapes([op.outputs[0] for op in products])):
        total += 2 * np.prod(out) * a[0 if op.get_attr('transpose_a') else 1]
    for op in convolutions:
        # The convolution from the large map to the small: its output times what each sums over.
        kernel = op.outputs[0] if op.type == 'Conv2DBackpropFilter' else op.inputs[1]
        small = op.outputs[0] if op.type == 'Conv2D' else op.inputs[2]
        kernel, small = shapes([kernel, small])
        total += 2 * np.prod(small) * np.prod(kernel[:3])
    return total


def run():
    main.keep_freed_memory()
    args = main.parse_arguments(sys.argv[1:])
    args.output_dir = tempfile.mkdtemp()
    dataset = data.load(args.data_dir, args.dataset)
    model = main.build(args, dataset)
    main.Checkpoint(os.path.join(args.output_dir, 'new_model.ckpt'))
    batches = data.batches(dataset.train_images, args.batch_size, 0, 1)
    with tf.Session(config=main.TWO_CORES) as session:
        session.run(tf.global_variables_initializer())

        def step():
            session.run([model.optimize, model.elbo, model.reg],
                        {'images:0': data.to_float(next(batches)), 'learning_rate:0': 1e-4})
        step()
        start_up = time.time() - START
        gc.freeze()
        gc.enable()
        times = np.array([seconds(step) for _ in range(STEPS)])
        evaluation = seconds(main.evaluate, session, model, dataset.test_images)
        state = {'history': [dict(
            epoch=1, training_negative_elbo=1., training_divergence=1.,
            validation_negative_elbo=1., validation_divergence=1.)]}
        codes = np.random.normal(size=(len(dataset.test_images), args.code_size))

        def draw():
            main.draw_samples(args, dataset, session.run(model.samples))
            main.draw_training_curves(args, dataset, state['history'])
            main.draw_reconstructions(args, dataset, session)
            main.draw_latent_space(args, dataset, session, codes)
        drawing = seconds(draw)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        operations = step_operations(model, next(batches))
    # In a process of its own, since the first session sets the threads of all.
    peak = float(subprocess.check_output([sys.executable, __file__, 'matmul']))
    low, median, high = np.percentile(times, [10, 50, 90])
    parameters = sum(int(np.prod(v.shape)) for v in tf.trainable_variables())
    for name, value in [
            ('parameters', '%d' % parameters),
            ('operations a step', '%.2f GFLOP' % (operations / 1e9)),
            ('step of %d images' % args.batch_size,
             '%.1f ms (10%%: %.1f, 90%%: %.1f)' % (1e3 * median, 1e3 * low, 1e3 * high)),
            ('training', '%.0f images/s' % (args.batch_size / median)),
            ('rate', '%.0f GFLOP/s' % (operations / median / 1e9)),
            ('matmul 2048 x 2048', '%.0f GFLOP/s' % (peak / 1e9)),
            ('rate / matmul', '%.0f %%' % (100 * operations / median / peak)),
            ('start to first step', '%.1f s' % start_up),
            ('evaluation of %d images' % len(dataset.test_images), '%.1f s' % evaluation),
            ('drawing all figures', '%.1f s' % drawing),
            ('peak memory', '%.0f MB' % memory)]:
        print('%-28s %s' % (name, value))
    shutil.rmtree(args.output_dir)


if __name__ == '__main__':
    if sys.argv[1:] == ['matmul']:
        print(matmul_rate())
    else:
        run()
