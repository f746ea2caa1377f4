"""Trains an LSTM variational autoencoder on MNIST, saves it and draws from it.

Read it top to bottom: the flags, the run, training and evaluation, files, pictures. The network is
in `model.py`, the images come from `data.py`.
"""

import argparse
import concurrent.futures
import contextlib
import ctypes
import glob
import io
import json
import math
import os
import platform
import shlex
import signal
import sys
import time
import warnings
import zipfile

if __name__ == '__main__':  # No traceback out of an import.
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)

import matplotlib
import matplotlib.image
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')  # No word on this processor's features.
stderr = os.dup(2)
os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # TensorFlow 2 writes there whatever the level.
try:
    import tensorflow.compat.v1 as tf
finally:
    os.dup2(stderr, 2)
tf.logging.set_verbosity(tf.logging.ERROR)

import data
from data import RunError
from model import Network

if __name__ == '__main__':
    signal.signal(signal.SIGINT, handler)

WARM_UP = .2  # Share of the steps in which the learning rate rises.
VALIDATION_SEED, TEST_SEED = 1, 0  # Of binarised pixels, the same in every run.
CHUNK = 1000  # Images evaluated at once, to bound the memory.
MODEL, STATE = 'new_model.ckpt', 'training_state.npz'
LOGS, LOG_STEPS = ('training', 'validation'), 50  # For TensorBoard: a point every 50 steps.
CORES = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
# The graph has two halves; each has half of the cores for its operations.
SESSION_CONFIG = tf.ConfigProto(inter_op_parallelism_threads=2,
                                intra_op_parallelism_threads=max(1, CORES // 2))
COLORS = ['#cc6677', '#332288', '#ddaa33', '#117733', '#88ccee',  # Of ten classes, told apart by
          '#882255', '#44aa99', '#999933', '#aa4499', '#000000']  # colour-blind readers too.


class Interrupted(Exception):
    """A signal asks the run to end; its number is the argument."""


def parse_arguments(arguments=None):
    def number(low, high):
        def parse(text):
            value = type(low)(text)
            if not low <= value <= high:
                raise ValueError
            return value
        parse.__name__ = '%s from %s to %s' % (type(low).__name__, low, high)
        return parse

    parser = argparse.ArgumentParser(
        description=__doc__.split('\n')[0], allow_abbrev=False,
        usage=argparse.SUPPRESS,  # An error is one line.
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add('--data-dir', default='MNIST_data', help='folder or .npz file of images (see README.md)')
    add('--dataset', default='auto', choices=['auto', 'mnist', 'synthetic'],
        help='mnist: the images of the data folder or, if it is empty, MNIST, downloaded into it; '
             'auto: the same, else draw synthetic digits; synthetic: draw them at once')
    add('--output-dir', default='.', help='folder of everything that is written')
    add('--epochs', type=number(1, 10 ** 6), default=12,
        help='passes over the training images')
    add('--batch-size', type=number(1, 10 ** 6), default=128, help='images a step')
    add('--learning-rate', type=number(1e-12, 1e12), default=1e-2,
        help='the highest step size of Adam: it is warmed up and then decays to zero')
    add('--code-size', type=number(1, 10 ** 4), default=14, help='dimensions of the code')
    add('--mixture-components', type=number(1, 10 ** 5), default=1,
        help='Gaussians in a learned prior; 1: the prior is the standard normal')
    add('--binarise', action='store_true',
        help='train and evaluate on pixels that are black or white at random, with their grey '
             'values as probabilities, as papers do')
    add('--training-codes', type=number(1, 1000), default=1,
        help='codes of each image in training; above 1 it raises a bound of log p(x) that is '
             'tighter than the ELBO')
    add('--weight-decay', type=number(0., 1e12), default=0.,
        help='factor of half the sum of the squared weights, which is taken from the objective; '
             'makes long runs overfit less')
    add('--importance-samples', type=number(0, 10 ** 6), default=0,
        help="codes of each test image's posterior from which log p(x) is estimated at the end; "
             '0: it is not')
    add('--patience', type=number(1, 10 ** 6), default=10,
        help='epochs without a better validation ELBO after which training ends')
    add('--seed', type=number(0, 2 ** 31 - 1), default=0,
        help='of the weights, the noise and the order of the images')
    add('--resume', action='store_true',
        help='go on with the run in the output folder, given the same flags; '
             'a larger --epochs trains a finished run on')
    return parser.parse_args(arguments)


def run(arguments):
    """Does all that the command does. Returns its exit code. If it fails, what an earlier run, or
    this one's last whole epoch, has written is still good.

    The truth about a run is its state: a record, and the variables as they are after the last epoch
    and, those of the model, after the best one. All else in the output folder is derived from it.
    """
    start = time.time()
    args = parse_arguments(arguments)
    folder = args.output_dir
    keep_freed_memory()
    with writing(folder):
        os.makedirs(folder, exist_ok=True)
    dataset = data.load(args.data_dir, args.dataset)
    if args.binarise:  # The training images are, anew for each batch.
        dataset = dataset._replace(
            name=dataset.name + ', binarised',
            validation_images=data.binarise(dataset.validation_images, VALIDATION_SEED),
            test_images=data.binarise(dataset.test_images, TEST_SEED))
    record, arrays = {
        'settings': {key: value for key, value in vars(args).items() if key != 'resume'},
        'dataset': dataset.name, 'fingerprint': dataset.fingerprint,
        'versions': {'python': platform.python_version(), 'tensorflow': tf.VERSION,
                     'numpy': np.__version__, 'matplotlib': matplotlib.__version__},
        'log_dir': time.strftime('logs/%Y-%m-%d-%H%M%S-') + str(os.getpid()),
        'history': [], 'test': {}}, {}
    if args.resume:
        arrays = load_state(folder, record)
    history = record['history']

    model = build(args, dataset)
    print('Model: %s parameters.' % format(sum(
        int(np.prod(v.shape)) for v in tf.trainable_variables()), ','), flush=True)
    # With the step, as the noise depends on it: a restored model gives the same ELBO.
    model_variables = tf.trainable_variables() + [tf.train.get_global_step()]
    saver = tf.train.Saver(model_variables, save_relative_paths=True)
    meta_graph = portable_meta_graph(saver, model_variables)
    # By their names in the state.
    last = {'last/' + v.op.name: v for v in tf.global_variables()}
    best = {'best/' + v.op.name: v for v in model_variables}
    if args.resume and {key: array.shape for key, array in arrays.items()} != {
            key: tuple(v.shape.as_list()) for key, v in {**last, **best}.items()}:
        raise RunError('%s: is of another version of this program; leave --resume out to start anew'
                       % os.path.join(folder, STATE))

    log_dirs = [os.path.join(folder, record['log_dir'], kind) for kind in LOGS]
    with writing(log_dirs[0]):
        logs = [tf.summary.FileWriter(log_dir) for log_dir in log_dirs]

    with deferred_signals() as end_if_asked, tf.Session(config=SESSION_CONFIG) as session, \
            logs[0], logs[1]:
        session.run(tf.global_variables_initializer())
        if history:
            assign(session, best, arrays)
            save_model(folder, saver, session, meta_graph)
            assign(session, last, arrays)
        else:
            logs[0].add_graph(session.graph)
        try:
            while True:
                best_so_far = best_epoch(history)
                if history:  # What is derived from the state, in which a run may have been killed.
                    if best_so_far == len(history):
                        save_model(folder, saver, session, meta_graph)
                    write_metrics(folder, record)
                    write(folder, 'training_curves.png', curves_png(history, dataset.name))
                if len(history) == args.epochs:
                    break
                if len(history) - best_so_far >= args.patience:
                    print('No better validation ELBO in %d epochs (--patience): training ends.'
                          % (len(history) - best_so_far))
                    break
                history.append(train_epoch(args, dataset, model, session, len(history) + 1, logs,
                                           end_if_asked))
                arrays.update(session.run(last))
                if best_epoch(history) == len(history):
                    arrays.update(session.run(best))
                save_state(folder, record, arrays)
            assign(session, best, arrays)
            report(args, dataset, model, session, record, arrays, end_if_asked)
        except Interrupted as interrupted:
            signum, = interrupted.args
            if not history:
                print('\nInterrupted before the end of the first epoch: nothing is saved.')
            else:
                assign(session, best, arrays)
                samples = samples_png(session.run(model.samples), dataset.name)
                print('\nInterrupted. The best model so far is in %s, its samples in %s.' % (
                    os.path.join(folder, MODEL), write(folder, 'new_images.png', samples)))
                command = [sys.executable, __file__, *arguments]
                print('Go on with: %s --resume' % ' '.join(
                    shlex.quote(part) for part in command if part != '--resume'))
            return 128 + signum
    print('Done in %.0f s.' % (time.time() - start))
    return 0


def keep_freed_memory():
    """Has the C library keep for the next step what one step frees. With TensorFlow 1.14 a step
    takes 15% less time than with giving it back to the system and getting it again."""
    with contextlib.suppress(OSError, AttributeError):  # Not the GNU C library.
        mallopt = ctypes.CDLL('libc.so.6').mallopt
        mallopt(-1, 2 ** 30)  # M_TRIM_THRESHOLD, in bytes.
        mallopt(-3, 2 ** 25)  # M_MMAP_THRESHOLD, in bytes, at its upper limit.


@contextlib.contextmanager
def deferred_signals():
    """Gives a function that raises `Interrupted` if SIGINT or SIGTERM has come in the meantime: an
    exception at any point could be lost, or leave a lock that is waited for. A second signal does
    what it would have done without this."""
    received = []

    def defer(signum, frame):
        if received:
            signal.signal(signum, handlers[signum])
            os.kill(os.getpid(), signum)
        received.append(signum)

    def end_if_asked():
        if received:
            raise Interrupted(received[0])
    handlers = {signum: signal.signal(signum, defer) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield end_if_asked
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


def build(args, dataset):
    """Builds the graph, to be fed by `images:0` and `learning_rate:0`."""
    shape = dataset.train_images.shape[1:]
    images = tf.placeholder(tf.float32, [None, *shape], 'images')
    rate = tf.placeholder(tf.float32, [], 'learning_rate')
    tf.constant(dataset.name, name='dataset')  # For who wonders what a checkpoint was trained on.
    # A pixel that is never inked has a mean of 0; half a grey level keeps its logit finite.
    mean = (dataset.train_images.mean(0) + .5) / 256
    network = Network(args.code_size, args.mixture_components, shape,
                      training_codes=args.training_codes, weight_decay=args.weight_decay,
                      logits=np.log(mean / (1 - mean)), seed=args.seed)
    return network.optimization(images, rate)


def portable_meta_graph(saver, variables):
    """The graph as any TensorFlow from 1.14 on, and the tools around it, read it: without what 2.21
    adds or calls otherwise and what is known in `model.py` alone; of variables it lists those that
    are saved, as whoever saves it again takes all others for missing."""
    meta_graph = saver.export_meta_graph(strip_default_attrs=True)
    for node in meta_graph.graph_def.node:
        if node.op == 'AddV2':  # 1.14 has no gradient of it.
            node.op = 'Add'
        for name in {'grad_a', 'grad_b', '_gradient_op_type'}.intersection(node.attr):
            del node.attr[name]
    listed = meta_graph.collection_def['variables'].bytes_list.value
    listed[:] = [v.to_proto().SerializeToString() for v in variables]
    return meta_graph


def assign(session, variables, arrays):
    """Gives the variables, a dictionary, the values that `arrays` has under the same keys."""
    session.run([v.initializer for v in variables.values()],
                {v.initial_value: arrays[key] for key, v in variables.items()})


# ------------------------------------------------------------------------ Training and evaluation


def learning_rate(step, steps, peak):
    """Rises linearly from zero to `peak` in the first steps, then falls linearly to zero."""
    progress = (step + .5) / steps
    return peak * min(progress / WARM_UP, (1 - progress) / (1 - WARM_UP))


def train_epoch(args, dataset, model, session, epoch, logs, end_if_asked):
    """Trains one epoch, evaluates it on the validation images, and returns its entry in the
    history."""
    start, totals = time.time(), np.zeros(2)
    batches = math.ceil(len(dataset.train_images) / args.batch_size)
    log, validation_log = logs
    terminal = sys.stdout.isatty()
    if terminal:
        print('Epoch %d/%d' % (epoch, args.epochs))
    bar = tf.keras.utils.Progbar(batches, verbose=int(terminal))
    for i, images in enumerate(data.batches(
            dataset.train_images, args.batch_size, args.seed, epoch)):
        end_if_asked()
        if args.binarise:
            images = data.binarise(images, args.seed, epoch, i)
        step = (epoch - 1) * batches + i
        rate = learning_rate(step, args.epochs * batches, args.learning_rate)
        _, elbo, divergence = session.run(
            [model.optimize, model.elbo, model.reg],
            {'images:0': data.to_float(images), 'learning_rate:0': rate})
        divergence = divergence.mean()
        totals += len(images) * np.array([-elbo, divergence])
        bar.update(i + 1, [('-ELBO', -elbo), ('divergence', divergence)])
        if step % LOG_STEPS == 0:
            log.add_summary(summary(-elbo, divergence, rate), step + 1)
    training_loss, training_divergence = totals / len(dataset.train_images)
    negative_elbo, divergence, _ = evaluate(session, model, dataset.validation_images)
    if not math.isfinite(negative_elbo):
        raise RunError('--learning-rate: training diverged in epoch %d (the ELBO is %s); try a '
                       'lower one' % (epoch, -negative_elbo))
    samples = png(mosaic(session.run(model.samples)))
    validation_log.add_summary(summary(negative_elbo, divergence, rate, samples), epoch * batches)
    with writing(validation_log.get_logdir()):
        validation_log.flush()
    seconds = time.time() - start
    print('Epoch %d/%d: -ELBO %.2f training, %.2f validation; divergence %.2f nats; %.1f s' % (
        epoch, args.epochs, training_loss, negative_elbo, divergence, seconds), flush=True)
    return {'epoch': epoch, 'seconds': seconds, 'training_negative_elbo': training_loss,
            'training_divergence': training_divergence, 'validation_negative_elbo': negative_elbo,
            'validation_divergence': divergence}


def summary(negative_elbo, divergence, rate, samples=None):
    """A point for TensorBoard, under the same names for training and validation."""
    values = {'negative_ELBO': negative_elbo, 'divergence': divergence,
              'reconstruction': negative_elbo - divergence, 'learning_rate': rate}
    result = tf.Summary(value=[tf.Summary.Value(tag=tag, simple_value=value)
                               for tag, value in values.items()])
    if samples is not None:
        result.value.add(tag='samples', image=tf.Summary.Image(encoded_image_string=samples))
    return result


def best_epoch(history):
    """The epoch of the highest validation ELBO, the first one being 1; 0 if there is none."""
    return min(history, key=lambda entry: entry['validation_negative_elbo'],
               default={'epoch': 0})['epoch']


def evaluate(session, model, images):
    """The mean negative ELBO and divergence of uint8 images `[n, height, width]`, in nats per
    image, and the means of their posteriors, `[n, code_size]`."""
    totals, codes = np.zeros(2), []
    for chunk in np.split(images, range(CHUNK, len(images), CHUNK)):
        elbo, divergence, mu = session.run([model.elbo, model.reg, 'mu:0'],
                                           {'images:0': data.to_float(chunk)})
        totals += [-elbo * len(chunk), divergence.sum()]
        codes.append(mu)
    return (*totals / len(images), np.concatenate(codes))


def log_likelihood(session, images, count, end_if_asked):
    """Estimates log p(x) of uint8 images `[n, height, width]`, binarised: a pixel becomes 1 with
    its grey value as probability.

    log p(x) = log E_q(z|x)[w] with w = p(x|z) p(z) / q(z|x), and thus about the log of the mean of
    `count` such weights; from below, on average (Y. Burda et al., 2015, arXiv:1509.00519, eq. 8).
    Returns means over images, in nats: of -log p(x), its standard error, and of the negative ELBO.
    """
    rng = np.random.RandomState(0)  # Of its own: figures of different runs can be compared.
    images = data.to_float(data.binarise(images, TEST_SEED))
    chunks = np.split(images, range(CHUNK, len(images), CHUNK))
    posteriors = [session.run(['mu:0', 'sigma:0'], {'images:0': chunk}) for chunk in chunks]

    def log_weights(chunk, posterior, noise):
        mu, sigma = posterior
        return session.run('log_weight:0', {'images:0': chunk, 'mu:0': mu, 'sigma:0': sigma,
                                            'code:0': mu + sigma * noise})
    log_sum, total = np.full(len(images), -np.inf), np.zeros(len(images))  # In float64.
    bar = tf.keras.utils.Progbar(count, verbose=int(sys.stdout.isatty()))
    with concurrent.futures.ThreadPoolExecutor(2) as pool:  # A fed code is decoded in one piece.
        for i in range(count):
            end_if_asked()
            noise = [rng.standard_normal(mu.shape) for mu, _ in posteriors]
            weights = np.concatenate(list(pool.map(log_weights, chunks, posteriors, noise)))
            log_sum = np.logaddexp(log_sum, weights)
            total += weights
            bar.update(i + 1)
    log_p = log_sum - math.log(count)
    return -log_p.mean(), log_p.std() / math.sqrt(len(log_p)), -total.mean() / count


def report(args, dataset, model, session, record, arrays, end_if_asked):
    """Evaluates the model in the session, that of the best epoch, on the test images, and draws it.
    """
    folder, name, best = args.output_dir, dataset.name, best_epoch(record['history'])

    def save(**figures):
        record['test'].update(figures)
        save_state(folder, record, arrays)
        write_metrics(folder, record)
    negative_elbo, divergence, codes = evaluate(session, model, dataset.test_images)
    print('Test (%s): -ELBO %.2f nats per image = %.2f reconstruction + %.2f divergence (epoch %d '
          'of %d)' % (name, negative_elbo, negative_elbo - divergence, divergence, best,
                      len(record['history'])), flush=True)
    if record['test'].get('epoch') != best:  # Else an earlier log p(x) is of this model, too.
        record['test'] = {'epoch': best}
    save(negative_elbo=negative_elbo, divergence=divergence,
         reconstruction=negative_elbo - divergence)

    classes, rows, caption = class_rows(dataset.test_labels, name)
    pairs = []
    for row in rows:
        images = data.to_float(dataset.test_images[row[:10]])
        pairs.append((images, session.run('reconstruction:0', {'images:0': images})))
    grid = code_plane(codes) if args.code_size == 2 else interpolations(codes, rows)
    decoded = session.run('reconstruction:0', {'code:0': grid.reshape(-1, args.code_size)})
    pictures = [
        ('new_images.png', samples_png(session.run(model.samples), name)),
        ('reconstructions.png', reconstructions_png(pairs, classes, caption)),
        ('latent_space.png', latent_space_png(grid, decoded, codes, dataset.test_labels, classes,
                                              session.run('prior_mean:0'), caption))]
    for picture in pictures:
        write(folder, *picture)
    end_if_asked()
    if args.importance_samples:
        likelihood, error, negative_elbo = log_likelihood(
            session, dataset.test_images, args.importance_samples, end_if_asked)
        print('Test, binarised: -log p(x) %.2f nats per image (standard error %.2f) from %d codes '
              'each; -ELBO %.2f' % (likelihood, error, args.importance_samples, negative_elbo))
        save(negative_log_likelihood=likelihood, standard_error=error,
             importance_samples=args.importance_samples, binarised_negative_elbo=negative_elbo)
    print('Wrote %s' % ', '.join(os.path.join(folder, name) for name in [
        'checkpoint', MODEL + '.*', 'training_curves.png', *(name for name, _ in pictures),
        'metrics.json', record['log_dir'], STATE]))


# ---------------------------------------------------------------------------------------- Files


def reason(error):
    """What went wrong, out of all that TensorFlow says of it."""
    return getattr(error, 'strerror', None) or str(error).split('\n\t [[')[0].split('\n')[-1]


@contextlib.contextmanager
def writing(path):
    """Tells the user in one line what keeps `path` from being written within."""
    try:
        yield
    except (OSError, tf.errors.OpError, ValueError) as error:  # The last if a folder is gone.
        raise RunError('%s: cannot be written (%s); make room, or choose another folder with '
                       '--output-dir' % (path, reason(error))) from error


def write(folder, name, content):
    """Has a file hold these bytes: it changes at once or, if that fails, not at all. Returns its
    path."""
    path = os.path.join(folder, name)
    with writing(path):
        try:
            with open(path + '.unfinished', 'wb') as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(path + '.unfinished', path)
        except OSError:
            with contextlib.suppress(OSError):
                os.remove(path + '.unfinished')
            raise
    return path


def write_metrics(folder, record):
    """Writes the settings, the history and the results, for programs to read."""
    content = json.dumps(dict(record, best_epoch=best_epoch(record['history'])), indent=2)
    write(folder, 'metrics.json', (content + '\n').encode())


def save_model(folder, saver, session, meta_graph):
    """Writes the checkpoint that users restore: weights and graph."""
    path = os.path.join(folder, MODEL)
    try:
        with writing(path):
            saver.save(session, path, write_meta_graph=False)
    finally:  # Parts of what failed or, the last time, was killed.
        for part in glob.glob(glob.escape(path) + '*.tempstate*'):
            os.remove(part)
    write(folder, MODEL + '.meta', meta_graph.SerializeToString())


def save_state(folder, record, arrays):
    file = io.BytesIO()
    np.savez(file, record=json.dumps(record), **arrays)
    write(folder, STATE, file.getbuffer())


def load_state(folder, record):
    """Reads what `save_state` wrote: puts what has happened into the record of a run, if that is of
    the same kind, and returns the arrays."""
    path = os.path.join(folder, STATE)
    try:
        # The first verifies all checksums, the second never unpickles.
        with zipfile.ZipFile(path) as whole, np.load(path) as file:
            if whole.testzip():
                raise ValueError('a checksum is wrong')
            arrays = dict(file)
        earlier = json.loads(str(arrays.pop('record')))
        settings = earlier['settings']
        record.update({key: earlier[key] for key in ('log_dir', 'history', 'test')})
    except FileNotFoundError as error:
        raise RunError("--resume: there is no %s to go on from; leave --resume out, or name the "
                       "run's folder with --output-dir" % path) from error
    except Exception as error:  # Whatever may be in a file.
        raise RunError('%s: is not the whole state of a run (%s); leave --resume out to start anew'
                       % (path, error)) from error
    for flag in ('code_size', 'mixture_components', 'batch_size', 'learning_rate', 'binarise',
                 'training_codes', 'weight_decay', 'seed'):
        if record['settings'][flag] != settings.get(flag):
            raise RunError('--%s: the run in %s had another (%s); give the same flags, or leave '
                           '--resume out to start anew'
                           % (flag.replace('_', '-'), folder, settings.get(flag)))
    if record['fingerprint'] != earlier.get('fingerprint'):
        raise RunError('--data-dir or --dataset: the run in %s had other images (%s); give the '
                       'same, or leave --resume out to start anew'
                       % (folder, earlier.get('dataset')))
    if len(record['history']) > record['settings']['epochs']:
        raise RunError('--epochs: the run in %s has trained for %d already; give that many or more'
                       % (folder, len(record['history'])))
    return arrays


# ------------------------------------------------------------------------------------- Pictures


def class_rows(labels, name):
    """Which classes pictures show: the 26 largest.

    Returns them, sorted; for each row of a picture the places of its images, those of a class, or
    of a part of a single class; and the data set's name with a word on what is not shown.
    """
    classes, counts = np.unique(labels, return_counts=True)
    shown = np.sort(classes[np.argsort(-counts, kind='stable')[:26]])
    if len(shown) < len(classes):
        name += ', the %d largest of %d classes' % (len(shown), len(classes))
    rows = [np.flatnonzero(labels == label) for label in shown]
    if len(rows) == 1:
        rows = np.array_split(rows[0], min(10, len(labels)))
    return shown, rows, name


def code_plane(codes):
    """A grid of 20 x 20 codes of two dimensions, as dense as `codes`: `[20, 20, 2]`."""
    x, y = np.percentile(codes, 5 * (np.arange(20) + .5), axis=0).T
    return np.stack(np.meshgrid(x, y[::-1]), -1)


def interpolations(codes, rows):
    """Ten rows of 11 codes from that of an image to that of an image of the next class: the first
    of each, then the second. Returns `[10, 11, code_size]`."""
    picked = [rows[i % len(rows)] for i in range(11)]
    ends = codes[[row[i // len(rows) % len(row)] for i, row in enumerate(picked)]]
    shares = np.linspace(0, 1, 11)[:, None]
    return np.stack([a + shares * (b - a) for a, b in zip(ends, ends[1:])])


def mosaic(images, columns=10):
    """Lays images `[n, height, width]` out in rows, with white lines between them."""
    images = np.pad(images, [(0, 0), (0, 1), (0, 1)], 'constant', constant_values=1)
    _, height, width = images.shape
    grid = images.reshape(-1, columns, height, width).swapaxes(1, 2)
    return grid.reshape(-1, columns * width)[:-1, :-1]


def png(image, **options):
    """The bytes of a PNG file of an image `[height, width]` from 0 to 1."""
    file = io.BytesIO()
    matplotlib.image.imsave(file, image, cmap='gray', vmin=0, vmax=1, format='png', **options)
    return file.getvalue()


def figure_png(figure):
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # Of letters in a folder's name that the font lacks.
        figure.savefig(file, format='png', dpi=100)
    return file.getvalue()


def show(axes, images, columns, extent):
    """Shows a mosaic with square pixels in axes of this extent."""
    image = mosaic(images, columns)
    left, right, bottom, top = extent
    aspect = image.shape[0] / image.shape[1] * abs((right - left) / (top - bottom))
    axes.imshow(image, cmap='gray', vmin=0, vmax=1, extent=extent, aspect=aspect)


def title(text, name):
    """A title with the data set's name, in which a dollar sign is no mathematics."""
    return '%s\n(%s)' % (text, name.replace('$', r'\$'))


def samples_png(samples, name):
    """10 x 10 samples `[100, height, width]` and nothing else, each about 112 pixels wide."""
    zoom = max(1, 112 // max(samples.shape[1:]))
    return png(np.kron(mosaic(samples), np.ones([zoom, zoom])), metadata={'Source': name})


def curves_png(history, name):
    """The negative ELBO and the divergence of each epoch."""
    epochs = [entry['epoch'] for entry in history]
    best = best_epoch(history)
    figure = Figure(figsize=(9, 4), tight_layout=True)
    for axes, key, text in zip(figure.subplots(1, 2), ['negative_elbo', 'divergence'],
                               ['Negative ELBO', 'Divergence from the prior']):
        for kind, color, marker in ('training', COLORS[4], 's'), ('validation', COLORS[1], 'o'):
            values = [entry['%s_%s' % (kind, key)] for entry in history]
            axes.plot(epochs, values, color=color, marker=marker, markersize=4, label=kind)
        axes.axvline(best, color='0.5', linestyle='--', label='best epoch (%d)' % best)
        axes.set(title=title(text, name), xlabel='epoch', ylabel='nats per image')
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=.3)
        axes.legend()
    return figure_png(figure)


def reconstructions_png(pairs, classes, name):
    """Test images above their reconstructions: `pairs` has both for each row, `[<= 10, height,
    width]`, and each row is a class, or all are of the only one."""
    pairs = np.stack([np.pad(pair, [(0, 0), (0, 10 - len(pair[0])), (0, 0), (0, 0)], 'constant',
                             constant_values=1) for pair in map(np.stack, pairs)])
    rows, _, _, height, width = pairs.shape
    figure = Figure(figsize=(6, 1 + rows * (height + 1) / (width + 1)), tight_layout=True)
    axes = figure.subplots()
    show(axes, pairs.reshape(-1, height, width), 10, [0, 10, rows - .5, -.5])
    axes.set(title=title('Test images, and below each its reconstruction', name), xticks=[])
    if len(classes) > 1:
        axes.set(yticks=range(rows), yticklabels=classes, ylabel='class')
    else:
        axes.set(yticks=[])
    return figure_png(figure)


def latent_space_png(grid, decoded, codes, labels, classes, prior_mean, name):
    """Decoded codes beside the codes of the test images.

    Args:
        grid: `[rows, columns, code_size]`, from `code_plane` or `interpolations`.
        decoded: `[rows * columns, height, width]`, what is decoded from these.
        codes: `[n, code_size]`, of the test images, whose `labels` are `[n]`.
        classes: the labels to show.
        prior_mean: `[components, code_size]`, shown for codes of two dimensions.
    """
    shown = np.isin(labels, classes)
    codes, labels = codes[shown], labels[shown]
    rows, columns, size = grid.shape
    figure = Figure(figsize=(13.5, 6.5), tight_layout=True)
    left, right = figure.subplots(1, 2)
    if size == 2:
        points, places = codes, np.arange(20) + .5
        show(left, decoded, columns, [0, 20, 0, 20])
        left.set(title=title('Decoded codes, as dense as those of the test images', name),
                 xlabel='code, dimension 1', ylabel='code, dimension 2',
                 xticks=places[::3], xticklabels=['%.1f' % x for x in grid[0, ::3, 0]],
                 yticks=places[::3], yticklabels=['%.1f' % y for y in grid[::-3, 0, 1]])
        right.set(title='Codes (posterior means) of the test images;\n'
                        "crosses: the means of the prior's components",
                  xlabel='code, dimension 1', ylabel='code, dimension 2')
        right.scatter(*prior_mean.T, s=20, color='black', marker='+', linewidths=.6, zorder=2)
    else:
        show(left, decoded, columns, [-.05, 1.05, rows, 0])
        left.set(title=title('Decoded codes between pairs of test images', name),
                 xlabel="share of the second image's code", yticks=[])
        points, right_share = linear_discriminants(codes, labels)
        text, axis = '; the nearest class centre\nin this plane is right for %.0f%%' % (
            100 * right_share), 'linear discriminant'
        if len(classes) == 1:
            text, axis = ',\nseen from where they are farthest apart', 'principal component'
        right.set(title='Codes (posterior means) of the test images' + text,
                  xlabel=axis + ' 1', ylabel=axis + ' 2')
    colors = COLORS
    if len(classes) > len(COLORS):
        colors = matplotlib.cm.gist_rainbow(np.linspace(0, 1, len(classes)))
        colors[1::2, :3] *= .55  # Neighbours are told apart.
    for label, color in zip(classes, colors):
        right.scatter(*points[labels == label].T, s=3, color=color, label=label, linewidths=0,
                      alpha=.6)
    if len(classes) > 1:
        right.legend(title='class', markerscale=4, loc='center left', bbox_to_anchor=(1, .5))
    return figure_png(figure)


def linear_discriminants(points, labels):
    """Projects points `[n, d]` on the plane in which their classes are farthest apart, measured by
    the spread within classes (R. A. Fisher, 1936); of a single class, in which the points are.

    Returns:
        The projections `[n, 2]` and the share of them whose nearest class centre is their own.
    """
    _, classes = np.unique(labels, return_inverse=True)
    points = points.astype(np.float64)  # Else rounding takes more than what is added below.
    centres = np.stack([points[classes == k].mean(0) for k in range(classes.max() + 1)])
    if len(centres) > 1:
        within = (points - centres[classes]).T @ (points - centres[classes]) / len(points)
        # White within classes; dimensions that the model does not use have next to no spread.
        white = np.linalg.inv(np.linalg.cholesky(within + 1e-6 * np.eye(len(within))))
        between = white @ (centres - points.mean(0)).T
    else:
        white, between = np.eye(points.shape[1]), (points - centres).T
    between = between @ between.T
    plane = np.linalg.eigh(between)[1][:, :-3:-1].T @ white
    plane = np.pad(plane, [(0, 2 - len(plane)), (0, 0)], 'constant')  # Of a single dimension.
    projections, centres = points @ plane.T, centres @ plane.T
    nearest = ((projections[:, None] - centres) ** 2).sum(2).argmin(1)
    return projections, (nearest == classes).mean()


def main(arguments=None):
    """Runs the command with these arguments, by default the process's. Returns its exit code."""
    try:
        with tf.Graph().as_default():
            return run(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:  # Nobody reads any more what it prints.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except RunError as error:
        message = str(error)
    except (MemoryError, tf.errors.ResourceExhaustedError) as error:
        message = ('memory is short (%s); lower --mixture-components, --code-size or --batch-size'
                   % reason(error))
    print('Error: ' + message, file=sys.stderr)
    return 1


if __name__ == '__main__':
    sys.exit(main())
