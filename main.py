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

if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # No traceback out of an import.

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
from model import Network

WARM_UP = .2  # Share of the steps in which the learning rate rises.
CHUNK = 1000  # Images evaluated at once, to bound the memory.
MODEL, STATE = 'new_model.ckpt', 'training_state'  # Names of checkpoints.
LOG_STEPS = 50  # Steps between two points in TensorBoard.
# The graph has two halves; each has half of the cores for its operations.
SESSION_CONFIG = tf.ConfigProto(inter_op_parallelism_threads=2,
                                intra_op_parallelism_threads=max(1, (os.cpu_count() or 1) // 2))
COLORS = ['#cc6677', '#332288', '#ddaa33', '#117733', '#88ccee',  # Of the digits, told apart by
          '#882255', '#44aa99', '#999933', '#aa4499', '#000000']  # colour-blind readers too.


class RunError(Exception):
    """What ends the run: one line that says what is wrong and what to do."""


received = []  # Signals that ask the run to end, since training began.


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
    add('--data-dir', default='MNIST_data', help='folder of the four IDX files')
    add('--dataset', default='auto', choices=['auto', 'mnist', 'synthetic'],
        help='mnist: the files of the data folder, else download MNIST into it; auto: the same, '
             'else draw synthetic digits; synthetic: draw them at once')
    add('--output-dir', default='.', help='folder of everything that is written')
    add('--epochs', type=number(1, 10 ** 6), default=12,
        help='passes over the training images')
    add('--batch-size', type=number(1, 10 ** 6), default=128, help='images a step')
    add('--learning-rate', type=number(1e-12, 1e12), default=1e-2,
        help='the highest step size of Adam: it is warmed up and then decays to zero')
    add('--code-size', type=number(1, 10 ** 4), default=14, help='dimensions of the code')
    add('--mixture-components', type=number(1, 10 ** 5), default=1,
        help='Gaussians in a learned prior; 1: the prior is the standard normal')
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


def run(args):
    """Does all that the command does. Returns its exit code. If it fails, what an earlier run, or
    this one's last whole epoch, has written is still good."""
    start = time.time()
    keep_freed_memory()
    os.makedirs(args.output_dir, exist_ok=True)
    dataset = data.load(args.data_dir, args.dataset)
    metrics = load_metrics(args, dataset) if args.resume else {
        'history': [], 'log_dir': time.strftime('logs/%Y-%m-%d-%H%M%S-') + str(os.getpid())}
    history = metrics['history']
    metrics.update(
        settings={key: value for key, value in vars(args).items() if key != 'resume'},
        dataset=dataset.name, fingerprint=dataset.fingerprint,
        versions={'python': platform.python_version(), 'tensorflow': tf.VERSION,
                  'numpy': np.__version__, 'matplotlib': matplotlib.__version__})

    model = build(args, dataset)
    print('Model: %s parameters.' % format(sum(
        int(np.prod(v.shape)) for v in tf.trainable_variables()), ','))

    # With the step, as the noise depends on it: a restored model gives the same ELBO.
    saver = tf.train.Saver(tf.trainable_variables() + [tf.train.get_global_step()],
                           save_relative_paths=True)
    meta_graph = saver.export_meta_graph(strip_default_attrs=True)
    for node in meta_graph.graph_def.node:  # Of TensorFlow 2.21, and of `model.py`.
        for name in {'grad_a', 'grad_b', '_gradient_op_type'}.intersection(node.attr):
            del node.attr[name]
    state_saver = tf.train.Saver(max_to_keep=2, save_relative_paths=True)
    with contextlib.suppress(ValueError):  # The list of states is damaged; it serves only for this.
        states = tf.train.get_checkpoint_state(args.output_dir, STATE)
        if states:  # Of an earlier run, or of this one before it was killed: removed in turn.
            state_saver.recover_last_checkpoints(states.all_model_checkpoint_paths)

    received.clear()
    for signum in signal.SIGINT, signal.SIGTERM:
        signal.signal(signum, interrupt)
    log_dir = os.path.join(args.output_dir, metrics['log_dir'])
    with tf.Session(config=SESSION_CONFIG) as session, \
            tf.summary.FileWriter(os.path.join(log_dir, 'training')) as log, \
            tf.summary.FileWriter(os.path.join(log_dir, 'validation')) as validation_log:
        session.run(tf.global_variables_initializer())
        if not history:
            log.add_graph(session.graph)
        else:
            restore(args, state_saver, session, '%s-%d' % (STATE, len(history)))
            # Perhaps the run was killed before these.
            if best_epoch(history) == len(history):
                save_model(args, saver, session, meta_graph)
            draw_training_curves(args, dataset, history)
        try:
            while len(history) < args.epochs and len(history) - best_epoch(history) < args.patience:
                metrics.pop('test', None)
                entry = train_epoch(args, dataset, model, session, len(history) + 1, log,
                                    validation_log)
                # A state is whole before `metrics.json` counts its epoch, and the one before is
                # still there: whenever the run is killed, it can be resumed.
                save(args, state_saver, session, STATE, global_step=entry['epoch'],
                     latest_filename=STATE)
                history.append(entry)
                save_metrics(args, metrics)
                if best_epoch(history) == len(history):
                    save_model(args, saver, session, meta_graph)
                draw_training_curves(args, dataset, history)
            restore(args, saver, session, MODEL)
            report(args, dataset, model, session, metrics)
            print('Done in %.0f s.' % (time.time() - start))
        except KeyboardInterrupt:
            if not history:
                print('\nInterrupted before the end of the first epoch: nothing is saved.')
            else:
                restore(args, saver, session, MODEL)
                print('\nInterrupted. The best model so far is in %s, its samples in %s.' % (
                    os.path.join(args.output_dir, MODEL),
                    draw_samples(args, dataset, session.run(model.samples))))
                print('Go on with: %s --resume' % ' '.join(
                    shlex.quote(a) for a in [sys.executable, *sys.argv] if a != '--resume'))
            return 128 + received[0]
    if dataset.warning:
        print(dataset.warning, file=sys.stderr)
    return 0


def keep_freed_memory():
    """Has the C library keep for the next step what one step frees. With TensorFlow 1.14 a step
    takes 15% less time than with giving it back to the system and getting it again."""
    with contextlib.suppress(OSError, AttributeError):  # Not the GNU C library.
        mallopt = ctypes.CDLL('libc.so.6').mallopt
        mallopt(-1, 2 ** 30)  # M_TRIM_THRESHOLD, in bytes.
        mallopt(-3, 2 ** 25)  # M_MMAP_THRESHOLD, in bytes, at its upper limit.


def interrupt(signum, frame):
    """Asks the run to end at the next call of `end_if_interrupted`, since an exception at any point
    could be lost, or leave a lock that is waited for. A second signal ends the process."""
    if received:
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)
    received.append(signum)


def end_if_interrupted():
    if received:
        raise KeyboardInterrupt


def build(args, dataset):
    """Builds the graph, to be fed by `images:0` and `learning_rate:0`."""
    images = tf.placeholder(tf.float32, [None, 28, 28], 'images')
    rate = tf.placeholder(tf.float32, [], 'learning_rate')
    tf.constant(dataset.name, name='dataset')  # For who wonders what a checkpoint was trained on.
    # A pixel that is never inked has a mean of 0; half a grey level keeps its logit finite.
    mean = (dataset.train_images.mean(0) + .5) / 256
    network = Network(args.code_size, args.mixture_components, logits=np.log(mean / (1 - mean)),
                      seed=args.seed)
    return network.optimization(images, rate)


# ------------------------------------------------------------------------ Training and evaluation


def learning_rate(step, steps, peak):
    """Rises linearly from zero to `peak` in the first steps, then falls linearly to zero."""
    progress = (step + .5) / steps
    return peak * min(progress / WARM_UP, (1 - progress) / (1 - WARM_UP))


def train_epoch(args, dataset, model, session, epoch, log, validation_log):
    """Trains one epoch, evaluates it on the validation images, and returns its entry in the
    history."""
    start, totals = time.time(), np.zeros(2)
    batches = math.ceil(len(dataset.train_images) / args.batch_size)
    terminal = sys.stdout.isatty()
    if terminal:
        print('Epoch %d/%d' % (epoch, args.epochs))
    bar = tf.keras.utils.Progbar(batches, verbose=int(terminal))
    for i, images in enumerate(data.batches(
            dataset.train_images, args.batch_size, args.seed, epoch)):
        end_if_interrupted()
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
    validation_log.flush()
    seconds = time.time() - start
    print('Epoch %d/%d: -ELBO %.2f training, %.2f validation; divergence %.2f nats; %.1f s'
          % (epoch, args.epochs, training_loss, negative_elbo, divergence, seconds))
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
    """The mean negative ELBO and divergence of uint8 `images` `[n, 28, 28]`, in nats per image, and
    the means of their posteriors, `[n, code_size]`."""
    totals, codes = np.zeros(2), []
    for chunk in np.split(images, range(CHUNK, len(images), CHUNK)):
        elbo, divergence, mu = session.run([model.elbo, model.reg, 'mu:0'],
                                           {'images:0': data.to_float(chunk)})
        totals += [-elbo * len(chunk), divergence.sum()]
        codes.append(mu)
    return (*totals / len(images), np.concatenate(codes))


def log_likelihood(session, images, count):
    """Estimates log p(x) of uint8 images `[n, 28, 28]`, binarised: a pixel becomes 1 with its grey
    value as probability.

    log p(x) = log E_q(z|x)[w] with w = p(x|z) p(z) / q(z|x), and thus about the log of the mean of
    `count` such weights; from below, on average (Y. Burda et al., 2015, arXiv:1509.00519, eq. 8).
    Returns means over images, in nats: of -log p(x), its standard error, and of the negative ELBO.
    """
    rng = np.random.RandomState(0)  # Of its own: figures of different runs can be compared.
    images = np.float32(rng.random_sample(images.shape) < images / 255)
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
            end_if_interrupted()
            noise = [rng.standard_normal(mu.shape) for mu, _ in posteriors]
            weights = np.concatenate(list(pool.map(log_weights, chunks, posteriors, noise)))
            log_sum = np.logaddexp(log_sum, weights)
            total += weights
            bar.update(i + 1)
    log_p = log_sum - math.log(count)
    return -log_p.mean(), log_p.std() / math.sqrt(len(log_p)), -total.mean() / count


def report(args, dataset, model, session, metrics):
    """Evaluates the best model on the test images and draws it."""
    history = metrics['history']
    negative_elbo, divergence, codes = evaluate(session, model, dataset.test_images)
    print('Test: -ELBO %.2f nats per image = %.2f reconstruction + %.2f divergence (epoch %d of %d)'
          % (negative_elbo, negative_elbo - divergence, divergence,
             best_epoch(history), len(history)))
    metrics.setdefault('test', {}).update(
        negative_elbo=negative_elbo, divergence=divergence,
        reconstruction=negative_elbo - divergence)
    save_metrics(args, metrics)
    draw_samples(args, dataset, session.run(model.samples))
    draw_reconstructions(args, dataset, session)
    draw_latent_space(args, dataset, session, codes)
    end_if_interrupted()
    if args.importance_samples:
        likelihood, error, negative_elbo = log_likelihood(
            session, dataset.test_images, args.importance_samples)
        print('Test, binarised: -log p(x) %.2f nats per image (standard error %.2f) from %d codes '
              'each; -ELBO %.2f' % (likelihood, error, args.importance_samples, negative_elbo))
        metrics['test'].update(
            negative_log_likelihood=likelihood, standard_error=error,
            importance_samples=args.importance_samples, binarised_negative_elbo=negative_elbo)
        save_metrics(args, metrics)
    print('Wrote %s' % ', '.join(os.path.join(args.output_dir, name) for name in [
        'checkpoint', 'new_model.ckpt.*', 'new_images.png', 'training_curves.png',
        'reconstructions.png', 'latent_space.png', 'metrics.json', metrics['log_dir'],
        'training_state*']))


# ---------------------------------------------------------------------------------------- Files


def save(args, saver, session, name, **options):
    """As `saver.save`, and leaves no parts of what failed or, the last time, was killed."""
    path = os.path.join(args.output_dir, name)
    try:
        saver.save(session, path, write_meta_graph=False, **options)
    except ValueError as error:  # The folder is gone.
        raise OSError(str(error)) from error
    finally:
        for part in glob.glob(glob.escape(path) + '*.tempstate*'):
            os.remove(part)


def save_model(args, saver, session, meta_graph):
    """Writes the checkpoint that users restore: weights and graph."""
    save(args, saver, session, MODEL)
    replace(args, MODEL + '.meta', meta_graph.SerializeToString())


def restore(args, saver, session, name):
    path = os.path.join(args.output_dir, name)
    try:
        saver.restore(session, path)
    except (tf.errors.OpError, ValueError) as error:
        raise RunError('%s: cannot be restored (%s); leave --resume out to start anew'
                       % (path, reason(error))) from error


def reason(error):
    """What went wrong, out of all that TensorFlow says of it."""
    return str(error).split('\n\t [[')[0].split('\n')[-1]


def replace(args, name, content):
    """Has a file in the output folder hold these bytes: it changes at once or, if that fails, not
    at all. Returns its path."""
    path = os.path.join(args.output_dir, name)
    try:
        with open(path + '.unfinished', 'wb') as file:
            file.write(content)
        os.replace(path + '.unfinished', path)
    except OSError:
        with contextlib.suppress(OSError):
            os.remove(path + '.unfinished')
        raise
    return path


def save_metrics(args, metrics):
    """Writes the settings, the history and the results, for programs to read."""
    metrics['best_epoch'] = best_epoch(metrics['history'])
    replace(args, 'metrics.json', (json.dumps(metrics, indent=2) + '\n').encode())


def load_metrics(args, dataset):
    """Reads what `save_metrics` wrote, and refuses to go on from another kind of run."""
    path = os.path.join(args.output_dir, 'metrics.json')
    try:
        with open(path) as file:
            metrics = json.load(file)
        if not best_epoch(metrics['history']) or not metrics['log_dir']:
            raise ValueError('no epoch is in it')
        for flag in 'code_size', 'mixture_components', 'batch_size', 'learning_rate', 'seed':
            if getattr(args, flag) != metrics['settings'][flag]:
                raise RunError('--%s: the run in %s had another (%s); give the same flags, or '
                               'leave --resume out to start anew' % (
                                   flag.replace('_', '-'), args.output_dir,
                                   metrics['settings'][flag]))
        if metrics['fingerprint'] != dataset.fingerprint:
            raise RunError('--data-dir or --dataset: the run in %s had other images (%s); give the '
                           'same, or leave --resume out to start anew'
                           % (args.output_dir, metrics['dataset']))
        if len(metrics['history']) > args.epochs:
            raise RunError('--epochs: the run in %s has trained for %d already; give that many or '
                           'more' % (args.output_dir, len(metrics['history'])))
    except FileNotFoundError as error:
        raise RunError('--resume: there is no %s to go on from; leave --resume out, or name the '
                       "run's folder with --output-dir" % path) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError('%s: cannot be read (%s: %s); leave --resume out to start anew'
                       % (path, type(error).__name__, error)) from error
    return metrics


# ------------------------------------------------------------------------------------- Pictures


def mosaic(images, columns=10):
    """Lays images `[n, 28, 28]` out in rows, with white lines between them."""
    images = np.pad(images, [(0, 0), (0, 1), (0, 1)], 'constant', constant_values=1)
    grid = images.reshape(-1, columns, 29, 29).swapaxes(1, 2).reshape(-1, columns * 29)
    return grid[:-1, :-1]


def png(image, **options):
    """The bytes of a PNG file of an image `[height, width]` from 0 to 1."""
    file = io.BytesIO()
    matplotlib.image.imsave(file, image, cmap='gray', vmin=0, vmax=1, format='png', **options)
    return file.getvalue()


def draw_samples(args, dataset, samples):
    """Writes `new_images.png`: 10 x 10 samples and nothing else. Returns its path."""
    return replace(args, 'new_images.png', png(np.kron(mosaic(samples), np.ones([4, 4])),
                                               metadata={'Source': dataset.name}))


def save_figure(args, name, figure):
    file = io.BytesIO()
    figure.savefig(file, format='png', dpi=100)
    replace(args, name, file.getvalue())


def draw_training_curves(args, dataset, history):
    """Writes `training_curves.png`: the negative ELBO and the divergence of each epoch."""
    epochs = [entry['epoch'] for entry in history]
    best = best_epoch(history)
    figure = Figure(figsize=(9, 4), tight_layout=True)
    for axes, key, title in zip(figure.subplots(1, 2), ['negative_elbo', 'divergence'],
                                ['Negative ELBO', 'Divergence from the prior']):
        for kind, color, marker in ('training', COLORS[4], 's'), ('validation', COLORS[1], 'o'):
            values = [entry['%s_%s' % (kind, key)] for entry in history]
            axes.plot(epochs, values, color=color, marker=marker, markersize=4, label=kind)
        axes.axvline(best, color='0.5', linestyle='--', label='best epoch (%d)' % best)
        axes.set(title='%s (%s)' % (title, dataset.name), xlabel='epoch', ylabel='nats per image')
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=.3)
        axes.legend()
    save_figure(args, 'training_curves.png', figure)


def draw_reconstructions(args, dataset, session):
    """Writes `reconstructions.png`: ten test images of each class above their reconstructions."""
    pairs = np.zeros([10, 2, 10, 28, 28])  # Stays black where a class has fewer images.
    for digit, (originals, reconstructions) in enumerate(pairs):
        images = data.to_float(dataset.test_images[dataset.test_labels == digit][:10])
        if len(images):
            originals[:len(images)] = images
            reconstructions[:len(images)] = session.run('reconstruction:0', {'images:0': images})
    figure = Figure(figsize=(6, 11.5), tight_layout=True)
    axes = figure.subplots()
    axes.imshow(mosaic(pairs.reshape(-1, 28, 28)), cmap='gray', extent=[0, 10, 9.5, -.5],
                aspect='auto')
    axes.set(title='Test images, and below each its reconstruction\n(%s)' % dataset.name,
             xticks=[], yticks=range(10), ylabel='class')
    save_figure(args, 'reconstructions.png', figure)


def draw_latent_space(args, dataset, session, codes):
    """Writes `latent_space.png`: decoded codes beside `codes`, those of the test images."""
    labels = dataset.test_labels
    figure = Figure(figsize=(13.5, 6.5), tight_layout=True)
    left, right = figure.subplots(1, 2)
    if args.code_size == 2:
        points, columns = codes, 20
        places = np.arange(20) + .5
        x, y = np.percentile(codes, 5 * places, axis=0).T
        grid, extent = np.stack(np.meshgrid(x, y[::-1]), -1), [0, 20, 0, 20]
        left.set(title='Decoded codes, as dense as those of the test images (%s)' % dataset.name,
                 xlabel='code, dimension 1', ylabel='code, dimension 2',
                 xticks=places[::3], xticklabels=['%.1f' % value for value in x[::3]],
                 yticks=places[::3], yticklabels=['%.1f' % value for value in y[::3]])
        right.set(title='Codes (posterior means) of the test images;\n'
                        "crosses: the means of the prior's components",
                  xlabel='code, dimension 1', ylabel='code, dimension 2')
        right.scatter(*session.run('prior_mean:0').T, s=20, color='black', marker='+',
                      linewidths=.6, zorder=2)
    else:
        points, right_share = linear_discriminants(codes, labels)
        columns, shares = 11, np.linspace(0, 1, 11)[:, None]
        # Between the first image of a class and the first of the next class.
        ends = codes[[np.argmax(labels == digit) for digit in [*range(10), 0]]]
        grid, extent = [a + shares * (b - a) for a, b in zip(ends, ends[1:])], [-.05, 1.05, 10, 0]
        left.set(title='Decoded codes between pairs of test images (%s)' % dataset.name,
                 xlabel="share of the second image's code", yticks=[])
        right.set(title='Codes (posterior means) of the test images; the nearest class centre\nin '
                        'this plane is right for %.0f%%' % (100 * right_share),
                  xlabel='linear discriminant 1', ylabel='linear discriminant 2')
    decoded = session.run('reconstruction:0', {'code:0': np.reshape(grid, [-1, args.code_size])})
    left.imshow(mosaic(decoded, columns), cmap='gray', extent=extent, aspect='auto')
    for digit, color in enumerate(COLORS):
        right.scatter(*points[labels == digit].T, s=3, color=color, label=digit, linewidths=0,
                      alpha=.6)
    right.legend(title='class', markerscale=4, loc='center left', bbox_to_anchor=(1, .5))
    save_figure(args, 'latent_space.png', figure)


def linear_discriminants(points, labels):
    """Projects points `[n, d]` on the plane in which their classes are farthest apart, measured by
    the spread within classes (R. A. Fisher, 1936).

    Returns:
        The projections `[n, 2]` and the share of them whose nearest class centre is their own.
    """
    _, classes = np.unique(labels, return_inverse=True)
    centres = np.stack([points[classes == k].mean(0) for k in range(classes.max() + 1)])
    within = (points - centres[classes]).T @ (points - centres[classes]) / len(points)
    # White within classes; dimensions that the model does not use have next to no spread.
    white = np.linalg.inv(np.linalg.cholesky(within + 1e-6 * np.eye(len(within))))
    between = white @ (centres - points.mean(0)).T
    between = between @ between.T
    plane = np.linalg.eigh(between)[1][:, :-3:-1].T @ white
    plane = np.pad(plane, [(0, 2 - len(plane)), (0, 0)], 'constant')  # Of a single dimension.
    projections, centres = points @ plane.T, centres @ plane.T
    nearest = ((projections[:, None] - centres) ** 2).sum(2).argmin(1)
    return projections, (nearest == classes).mean()


def main():
    sys.stdout.reconfigure(line_buffering=True)  # Into a file or a pipe, too.
    args = parse_arguments()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return run(args)
    except KeyboardInterrupt:  # Before training: a download may leave files to clear away.
        return 128 + signal.SIGINT
    except BrokenPipeError:  # Nobody reads any more what it prints.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except (RunError, data.DataError) as error:
        message = str(error)
    except (OSError, tf.errors.OpError) as error:  # All else that is opened is to be written.
        message = '%s: cannot be written (%s); make room, or choose another folder with ' \
            '--output-dir' % (getattr(error, 'filename', None) or args.output_dir,
                              getattr(error, 'strerror', None) or reason(error))
    print('Error: ' + message, file=sys.stderr)
    return 1


if __name__ == '__main__':
    sys.exit(main())
