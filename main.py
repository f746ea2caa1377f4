"""Trains an LSTM variational autoencoder on images, saves it and samples from it.

    python main.py                                                # MNIST, the default model
    python main.py --mixture-components 500                       # better samples: a learned prior
    python main.py --data-dir mine.npz --output-dir runs/mine     # your own images
    python main.py --resume --output-dir runs/mine --epochs 24    # continue a run

The network is in `model.py`; the images come from `data.py`.
"""

import argparse
import concurrent.futures
import contextlib
import ctypes
import io
import json
import math
import os
import pathlib
import sys
import time
import warnings

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')  # Silence TensorFlow's C++ log.
saved_stderr = os.dup(2)  # Importing TensorFlow 2 writes to stderr, whatever the log level.
os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
try:
    import tensorflow.compat.v1 as tf
finally:
    os.dup2(saved_stderr, 2)
tf.logging.set_verbosity(tf.logging.ERROR)
warnings.filterwarnings('ignore', 'Glyph .* missing')  # Letters in a title that the font lacks.

import data
from data import RunError, write_atomically
from model import Network

MODEL, STATE = 'new_model.ckpt', 'training_state.npz'
WARM_UP = .1  # Share of the steps in which the learning rate rises; then it falls to zero.
TEST_SEED, VALIDATION_SEED = 0, 1  # For binarising: fixed, so that results are comparable.
CHUNK = 1000  # Images evaluated at once.
CORES = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
# Two operations at a time, as the halves of a batch are independent (see model._in_halves).
SESSION_CONFIG = tf.ConfigProto(inter_op_parallelism_threads=2,
                                intra_op_parallelism_threads=max(1, CORES // 2))
# A palette that is safe for colour-blind readers.
COLORS = ['#cc6677', '#332288', '#ddaa33', '#117733', '#88ccee',
          '#882255', '#44aa99', '#999933', '#aa4499', '#000000']


def parse_arguments(arguments=None, **settings):
    """Returns the flags. Their defaults may come from the settings of a run to resume."""
    def number(low, high):
        def parse(text):
            value = type(low)(text)
            if not low <= value <= high:
                raise ValueError
            return value
        parse.__name__ = '%s from %s to %s' % (type(low).__name__, low, high)  # Shown in errors.
        return parse

    parser = argparse.ArgumentParser(
        description=__doc__.split('\n')[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False, usage=argparse.SUPPRESS)  # Errors without the usage text.
    add = parser.add_argument
    add('--data-dir', default='MNIST_data', type=os.path.abspath,
        help='folder or .npz file of shuffled images; MNIST is downloaded into a new folder')
    add('--output-dir', default='.', help='folder for all results')
    add('--epochs', type=number(1, 10 ** 6), default=12, help='passes over the training images')
    add('--batch-size', type=number(1, 10 ** 6), default=256, help='images per step')
    add('--learning-rate', type=number(0., 1e6), default=.012,
        help='highest step size of Adam; it rises to this, then falls linearly to zero')
    add('--code-size', type=number(2, 10 ** 4), default=14, help='dimensions of the latent code')
    add('--mixture-components', type=number(1, 10 ** 5), default=1,
        help='Gaussians in a learned prior; 1 is the standard normal')
    add('--binarise', action='store_true', help='draw black or white pixels from the grey values')
    add('--training-codes', type=number(1, 1000), default=1,
        help='codes per image in training; several give a tighter bound than the ELBO')
    add('--weight-decay', type=number(0., 1e6), default=0.,
        help='L2 penalty for long runs: this times half the sum of all squared kernels')
    add('--importance-samples', type=number(0, 10 ** 6), default=0,
        help='codes per test image for estimating log p(x); 0 skips this')
    add('--seed', type=number(0, 2 ** 31 - 1), default=0, help='seed of weights, noise and order')
    add('--resume', action='store_true',
        help='continue the run in --output-dir with its flags and images; --epochs and '
             '--importance-samples may change. With more epochs the learning rate jumps up again.')
    parser.set_defaults(**settings)
    args = parser.parse_args(arguments)
    free = 'data_dir', 'epochs', 'importance_samples'
    # The settings are the defaults: a value that differs was given on the command line.
    for name, value in settings.items():
        if getattr(args, name) != value and name not in free:
            parser.error('--%s: the run to resume has %s' % (name.replace('_', '-'), value))
    return args


def run(arguments):
    """Trains, evaluates and draws a model.

    The state file holds all that a resumed run needs: a record in JSON, and the variables after the
    last and the best epoch. It is replaced after each epoch: a killed run loses at most one epoch.
    """
    start = time.time()
    args = parse_arguments(arguments)
    folder = pathlib.Path(args.output_dir)
    record = {  # Of a new run; that of a run to resume replaces it.
        'log_dir': time.strftime('logs/%Y-%m-%d-%H%M%S-') + str(os.getpid()),
        'versions': {'python': sys.version.split()[0], 'tensorflow': tf.VERSION,
                     'numpy': np.__version__, 'matplotlib': matplotlib.__version__},
        'history': [], 'test': {}}
    values = {}  # 'last/NAME' and 'best/NAME': each variable after the last and the best epoch.
    if args.resume:
        record, values = load_state(folder)
        args = parse_arguments(arguments, **record['settings'])  # Now with the run's own defaults.
    history = record['history']  # The same list: what the loop appends is in the record, too.
    dataset = data.load(args.data_dir)
    if args.resume and record['fingerprint'] != dataset.fingerprint:
        raise RunError('--data-dir: the run to resume has other data (%s)' % record['dataset'])
    if args.binarise:  # The training images are binarised anew for each batch.
        dataset = dataset._replace(
            name=dataset.name + ', binarised',
            validation_images=data.binarise(dataset.validation_images, VALIDATION_SEED),
            test_images=data.binarise(dataset.test_images, TEST_SEED))
    record.update(dataset=dataset.name, fingerprint=dataset.fingerprint, settings={
        name: value for name, value in vars(args).items() if name not in ('output_dir', 'resume')})

    optimize = build(args, dataset)
    sizes = [v.shape.num_elements() for v in tf.trainable_variables()]
    print('Model: {:,} parameters.'.format(sum(sizes)), flush=True)
    # The checkpoint has no variables of Adam, but has the step, which seeds the noise.
    saved = tf.trainable_variables() + [tf.train.get_global_step()]
    saver = tf.train.Saver(saved, save_relative_paths=True)
    meta_graph = portable_graph(saver, saved)
    folder.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()
    with tf.Session(config=SESSION_CONFIG) as session, \
            tf.summary.FileWriter(str(folder / record['log_dir']), flush_secs=1) as log:

        def publish():
            """Writes what is derived from the last epoch, which the session holds: curves, log and,
            if it is the best epoch, the model and samples."""
            samples = samples_png(session.run('samples:0'))
            if best_epoch(history) == history[-1]['epoch']:
                saver.save(session, str(folder / MODEL), write_meta_graph=False)
                write_atomically(folder / (MODEL + '.meta'), meta_graph)
                write_atomically(folder / 'new_images.png', samples)
            write_atomically(folder / 'training_curves.png', curves_png(history, dataset.name))
            log.add_summary(summary(history[-1], samples), len(history))

        session.run(tf.global_variables_initializer())
        if history:
            assign(session, values, 'last/')
            publish()  # Again, as a killed run may have saved its state and nothing else.
        else:
            log.add_graph(session.graph)
        steps = math.ceil(len(dataset.train_images) / args.batch_size)
        for epoch in range(len(history) + 1, args.epochs + 1):
            epoch_start, totals = time.time(), np.zeros(2)
            bar = tf.keras.utils.Progbar(steps, verbose=int(sys.stdout.isatty()))
            for i, images in enumerate(data.batches(
                    dataset.train_images, args.batch_size, args.seed, epoch)):
                if args.binarise:
                    images = data.binarise(images, args.seed, epoch, i)
                progress = (epoch - 1 + (i + .5) / steps) / args.epochs
                rate = args.learning_rate * min(progress / WARM_UP, (1 - progress) / (1 - WARM_UP))
                _, elbo, divergence = session.run(
                    [optimize, 'elbo:0', 'divergence:0'],
                    {'images:0': data.to_float(images), 'learning_rate:0': rate,
                     'num_codes:0': args.training_codes})
                totals += [-elbo * len(images), divergence.sum()]
                bar.update(i + 1, [('-ELBO', -elbo), ('divergence', divergence.mean())])
            training = totals / len(dataset.train_images)
            validation, _ = evaluate(session, dataset.validation_images)
            if not np.isfinite(validation[0]):
                raise RunError('--learning-rate: training diverged in epoch %d' % epoch)
            history.append({
                'epoch': epoch, 'seconds': time.time() - epoch_start,
                'training_negative_elbo': training[0], 'training_divergence': training[1],
                'validation_negative_elbo': validation[0], 'validation_divergence': validation[1]})
            print('Epoch %d/%d: -ELBO %.2f training, %.2f validation; divergence %.2f nats; %.1f s'
                  % (epoch, args.epochs, training[0], *validation, history[-1]['seconds']),
                  flush=True)
            values.update(session.run(variables('last/')))
            if best_epoch(history) == epoch:
                values.update(session.run(variables('best/')))
            save_state(folder, record, values)
            publish()
        assign(session, values, 'best/')
        report(args, dataset, session, record, values)
    print('Done in %.0f s. All results are in %s.' % (time.time() - start, folder.resolve()))


def main(arguments=None):
    """Runs the command with these arguments, by default the process's. Returns its exit code."""
    try:
        with tf.Graph().as_default():
            run(arguments)
        return 0
    except KeyboardInterrupt:
        message, code = 'Interrupted. --resume goes on after the last saved epoch, if any.', 130
    except (RunError, OSError, MemoryError, tf.errors.NotFoundError,
            tf.errors.PermissionDeniedError, tf.errors.ResourceExhaustedError) as error:
        # TensorFlow's messages have many lines: the one above "[[node ..." says what happened.
        line = str(error).split('\n\t [[')[0].split('\n')[-1]
        message, code = 'Error: %s' % (line or repr(error)), 1
    print(message, file=sys.stderr)
    return code


def build(args, dataset):
    """Builds the graph. Returns the training operation, which is fed `learning_rate:0`. All other
    tensors that are fetched or fed by name are listed in README.md."""
    shape = dataset.train_images.shape[1:]
    images = tf.placeholder(tf.float32, [None, *shape], 'images')
    rate = tf.placeholder(tf.float32, [], 'learning_rate')
    # A pixel that is always 0 has a mean of 0. Half a grey level keeps its logit finite.
    mean = (dataset.train_images.mean(0) + .5) / 256
    network = Network(args.code_size, args.mixture_components, shape,
                      weight_decay=args.weight_decay, seed=args.seed,
                      initial_logits=np.log(mean / (1 - mean)))
    return network.optimization(images, rate).optimize


def keep_freed_memory():
    """Makes malloc reuse freed memory in the next step: 15% faster on TensorFlow 1.14."""
    with contextlib.suppress(OSError, AttributeError):  # Not the GNU C library.
        mallopt = ctypes.CDLL('libc.so.6').mallopt
        mallopt(-1, 2 ** 30)  # M_TRIM_THRESHOLD, in bytes.
        mallopt(-3, 2 ** 25)  # M_MMAP_THRESHOLD, in bytes, at its upper limit.


# ------------------------------------------------------------------------ Training and evaluation


def best_epoch(history):
    """Returns the first epoch with the highest validation ELBO."""
    return min(history, key=lambda entry: entry['validation_negative_elbo'])['epoch']


def summary(entry, samples):
    """Returns an epoch's figures and samples (bytes of a PNG file) as a record for TensorBoard."""
    values = [tf.Summary.Value(tag=key, simple_value=value) for key, value in entry.items()]
    image = tf.Summary.Image(encoded_image_string=samples)
    return tf.Summary(value=[*values, tf.Summary.Value(tag='samples', image=image)])


def evaluate(session, images):
    """Evaluates uint8 images `[n, height, width]`. Returns the array [mean negative ELBO, mean
    divergence], in nats per image, and the means of the posteriors, `[n, code_size]`."""
    totals, codes = np.zeros(2), []
    for chunk in np.split(images, range(CHUNK, len(images), CHUNK)):
        elbo, divergence, mu = session.run(['elbo:0', 'divergence:0', 'mu:0'],
                                           {'images:0': data.to_float(chunk)})
        totals += [-elbo * len(chunk), divergence.sum()]
        codes.append(mu)
    return totals / len(images), np.concatenate(codes)


def log_likelihood(session, images, count):
    """Binarises uint8 images `[n, height, width]` and estimates log p(x) by the log of the mean of
    `count` weights p(x|z) p(z) / r(z|x), z ~ r(z|x), where r is q with sigma times 1.2: in
    expectation a lower bound (Y. Burda et al., 2015, arXiv:1509.00519, eq. 8), tighter than with q.
    Returns the mean of -log p(x) and its standard error, in nats."""
    def estimate(chunk, rng):
        mu, sigma = session.run(['mu:0', 'sigma:0'], {'images:0': chunk})
        sigma *= 1.2
        log_sum = np.full(len(chunk), -np.inf)  # In float64.
        for _ in range(count):
            code = mu + sigma * rng.standard_normal(mu.shape)
            # As the sigma of r is fed, `log_weight` divides by r(z|x) instead of q(z|x).
            log_sum = np.logaddexp(log_sum, session.run('log_weight:0', {
                'images:0': chunk, 'mu:0': mu, 'sigma:0': sigma, 'code:0': code}))
        return log_sum - math.log(count)

    images = data.to_float(data.binarise(images, TEST_SEED))  # No change if they are binary.
    chunks = np.split(images, range(CHUNK // 4, len(images), CHUNK // 4))
    bar = tf.keras.utils.Progbar(len(chunks), verbose=int(sys.stdout.isatty()))
    with concurrent.futures.ThreadPoolExecutor(2) as pool:  # Two chunks; Ctrl-C waits for both.
        rngs = map(np.random.RandomState, range(len(chunks)))
        log_p = []
        for part in pool.map(estimate, chunks, rngs):
            log_p.extend(part)
            bar.add(1)
    return -np.mean(log_p), np.std(log_p) / math.sqrt(len(log_p))


def report(args, dataset, session, record, values):
    """Evaluates the model of the best epoch, which the session holds, on the test images."""
    folder, name, best = pathlib.Path(args.output_dir), dataset.name, best_epoch(record['history'])
    images, labels = dataset.test_images, dataset.test_labels
    (negative_elbo, divergence), codes = evaluate(session, images)
    reconstruction = negative_elbo - divergence
    print('Test (%s): -ELBO %.2f nats per image = %.2f reconstruction + %.2f divergence (epoch %d)'
          % (name, negative_elbo, reconstruction, divergence, best), flush=True)
    record['test'] = {'epoch': best, 'negative_elbo': negative_elbo,
                      'reconstruction': reconstruction, 'divergence': divergence}

    classes = np.unique(labels)[:26]  # More would not fit into a plot.
    pairs = np.ones([len(classes), 2, 10, *images.shape[1:]])
    for pair, label in zip(pairs, classes):
        originals = data.to_float(images[labels == label][:10])
        pair[0, :len(originals)] = originals
        pair[1, :len(originals)] = session.run('reconstruction:0', {'images:0': originals})
    write_atomically(folder / 'reconstructions.png', reconstructions_png(pairs, classes, name))

    centre, directions = class_plane(codes, labels, classes)
    points = (codes - centre) @ directions.T  # [n, 2]
    low, high = np.percentile(points, [1, 99], axis=0)
    x, y = np.linspace(low, high, 41)[1::2].T  # Centres of 20 columns and, from below, 20 rows.
    grid = centre + np.stack(np.meshgrid(x, y[::-1]), -1) @ directions  # [20, 20, code_size]
    decoded = session.run('reconstruction:0', {'code:0': grid.reshape(-1, codes.shape[1])})
    decoded = decoded.reshape(20, 20, *images.shape[1:])
    write_atomically(folder / 'latent_space.png', latent_space_png(
        decoded, [low[0], high[0], low[1], high[1]], points, labels, classes, name))

    if args.importance_samples:
        nll, error = log_likelihood(session, images, args.importance_samples)
        print('Test, binarised: -log p(x) %.2f nats per image (standard error %.2f) from %d codes '
              'each' % (nll, error, args.importance_samples))
        record['test'].update(negative_log_likelihood=nll, standard_error=error,
                              importance_samples=args.importance_samples)
    save_state(folder, record, values)


# ------------------------------------------------------------------------------------------ Files


def variables(prefix):
    """Returns all variables by their names in the state, which begin with 'last/' or 'best/'."""
    return {prefix + v.op.name: v for v in tf.global_variables()}


def assign(session, values, prefix):
    """Feeds values of the state to the initialisers: `Variable.load` for each would take 2 s."""
    targets = variables(prefix)
    try:
        session.run([v.initializer for v in targets.values()],
                    {v.initial_value: values[name] for name, v in targets.items()})
    except (KeyError, ValueError) as error:
        raise RunError('--resume: the saved variables do not fit (%s)' % error) from error


def save_state(folder, record, values):
    """Replaces the state, all that `--resume` reads, and metrics.json, for other programs."""
    file = io.BytesIO()
    np.savez(file, record=json.dumps(record), **values)
    write_atomically(folder / STATE, file.getvalue())
    metrics = dict(record, best_epoch=best_epoch(record['history']))
    write_atomically(folder / 'metrics.json', json.dumps(metrics, indent=2).encode())


def load_state(folder):
    """Returns the record and the values of a state."""
    try:
        with np.load(str(folder / STATE), allow_pickle=False) as file:
            values = dict(file)
        return json.loads(str(values.pop('record'))), values
    except Exception as error:  # Corrupt files can raise anything.
        raise RunError('--resume: %s cannot be read (%s)' % (folder / STATE, error)) from error


def portable_graph(saver, saved):
    """Returns the graph as bytes that TensorFlow 1.14 and later read. It lists only the variables
    that are saved, without Adam's, which a user's own `Saver` would not find in the checkpoint."""
    meta_graph = saver.export_meta_graph(strip_default_attrs=True)
    for node in meta_graph.graph_def.node:
        if node.op == 'AddV2':  # TensorFlow 1.14 cannot differentiate it, as fine-tuning must.
            node.op = 'Add'
        for name in {'grad_a', 'grad_b'}.intersection(node.attr):  # MatMul's, unknown to 1.14.
            del node.attr[name]
    listed = meta_graph.collection_def['variables'].bytes_list.value
    listed[:] = [v.to_proto().SerializeToString() for v in saved]
    return meta_graph.SerializeToString()


# ------------------------------------------------------------------------------------------ Plots


def class_plane(codes, labels, classes):
    """Returns the plane in which the classes' mean codes differ most: a point in it, `[code_size]`,
    and two orthonormal directions, `[2, code_size]`: arbitrary ones if classes are too few."""
    means = np.stack([codes[labels == label].mean(0) for label in classes])
    centre = means.mean(0)
    return centre, np.linalg.svd(means - centre)[2][:2]


def mosaic(grid):
    """Joins images `[rows, columns, height, width]` into one, with white lines between them."""
    grid = np.pad(grid, [(0, 0), (0, 0), (0, 1), (0, 1)], 'constant', constant_values=1)
    rows, columns, height, width = grid.shape
    return grid.swapaxes(1, 2).reshape(rows * height, columns * width)[:-1, :-1]


def show(axes, grid, extent):
    """Shows a grid of images as a mosaic of square pixels; `extent` gives the axis limits."""
    image = mosaic(grid)
    axes.imshow(image, cmap='gray', vmin=0, vmax=1, extent=extent, aspect='auto')
    axes.set_box_aspect(image.shape[0] / image.shape[1])


def figure_png(figure, name):
    """Returns a figure as the bytes of a PNG file, with the data set's name in its title."""
    file, axes = io.BytesIO(), figure.axes[0]
    axes.set_title('%s\n(%s)' % (axes.get_title(), name.replace('$', r'\$')))
    figure.savefig(file, format='png', dpi=100)
    return file.getvalue()


def samples_png(samples):
    """Shows 10 x 10 samples `[100, height, width]`; small ones are enlarged."""
    file, zoom = io.BytesIO(), max(1, 112 // max(samples.shape[1:]))
    image = np.uint8(255 * mosaic(samples.reshape(10, 10, *samples.shape[1:])) + .5)
    Image.fromarray(np.kron(image, np.ones([zoom, zoom], np.uint8))).save(file, 'png')
    return file.getvalue()


def curves_png(history, name):
    """Plots the negative ELBO and the divergence of each epoch."""
    epochs, best = [entry['epoch'] for entry in history], best_epoch(history)
    figure = Figure(figsize=(9, 4), tight_layout=True)
    for axes, key, title in zip(figure.subplots(1, 2), ['negative_elbo', 'divergence'],
                                ['Negative ELBO', 'Divergence from the prior']):
        for kind, color, marker in ('training', COLORS[4], 's'), ('validation', COLORS[1], 'o'):
            values = [entry['%s_%s' % (kind, key)] for entry in history]
            axes.plot(epochs, values, color=color, marker=marker, markersize=4, label=kind)
        axes.axvline(best, color='0.5', linestyle='--', label='best epoch (%d)' % best)
        axes.set(title=title, xlabel='epoch', ylabel='nats per image')
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.legend()
    return figure_png(figure, name)


def reconstructions_png(pairs, classes, name):
    """Shows `pairs`, `[classes, 2, 10, height, width]`: up to ten test images of each class
    above their reconstructions."""
    count, _, _, height, width = pairs.shape
    figure = Figure(figsize=(6, 1 + count * (height + 1) / (width + 1)), tight_layout=True)
    axes = figure.subplots()
    # The pair of class i lies from i - .5 to i + .5, so that its label stands beside it.
    show(axes, pairs.reshape(-1, 10, height, width), [0, 10, count - .5, -.5])
    axes.set(title='Test images, and below each its reconstruction', ylabel='class', xticks=[],
             yticks=range(count), yticklabels=classes)
    return figure_png(figure, name)


def latent_space_png(decoded, limits, points, labels, classes, name):
    """Shows images decoded from a plane, `[rows, columns, height, width]`, beside the codes of the
    test images in it, `[n, 2]`."""
    figure = Figure(figsize=(13.5, 6.9), tight_layout=True)
    left, right = figure.subplots(1, 2)
    show(left, decoded, limits)
    left.set(title='Images decoded from a plane of codes')
    for i, label in enumerate(classes):
        right.scatter(*points[labels == label].T, s=4, color=COLORS[i % 10], label=label,
                      marker='o^s'[i // 10], linewidths=0, alpha=.6)
    right.set(title='Codes of the test images, projected onto this plane')
    right.legend(title='class', markerscale=4, loc='center left', bbox_to_anchor=(1, .5))
    for axes in left, right:
        axes.set(xlabel='direction 1', ylabel='direction 2')
    return figure_png(figure, name)


if __name__ == '__main__':
    sys.exit(main())
