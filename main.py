"""Trains an LSTM variational autoencoder on MNIST, saves it and draws from it.

Read it top to bottom: the settings, the run, training, files, pictures. The network is in
`model.py`, the images come from `data.py`.
"""

import argparse
import contextlib
import ctypes
import gc
import glob
import io
import itertools
import json
import math
import os
import platform
import shlex
import shutil
import signal
import sys
import time
import zipfile
import zlib

if __name__ == '__main__':
    # Imports and the graph make millions of objects and no garbage: to look for some in them takes
    # half a second until training starts, and another one when Python ends.
    gc.disable()
    # Until training has its own handler, a signal ends the run at once; what is being written then
    # does not have its name yet.
    for signum in signal.SIGINT, signal.SIGTERM:
        signal.signal(signum, lambda signum, frame: os._exit(128 + signum))
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')  # No word on this processor's features.

import matplotlib
import matplotlib.image
import numpy as np
import tensorflow.compat.v1 as tf
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import data
from model import Network

tf.logging.set_verbosity(tf.logging.ERROR)

WARM_UP = .2  # Share of the steps in which the learning rate rises.
CHUNK = 1000  # Images evaluated at once, to bound the memory.
LOG_STEPS = 50  # Steps between two points in TensorBoard.
# The graph has two halves, one for each core, and operations of one thread also give the same bits
# wherever they run. What is switched off here lengthens the start and makes no step faster.
TWO_CORES = tf.ConfigProto(
    intra_op_parallelism_threads=1, inter_op_parallelism_threads=2, graph_options={
        'rewrite_options': {'meta_optimizer_iterations': 'ONE',
                            'memory_optimization': 'NO_MEM_OPT'}})
COLORS = ['#cc6677', '#332288', '#ddaa33', '#117733', '#88ccee',  # Of the digits, told apart by
          '#882255', '#44aa99', '#999933', '#aa4499', '#000000']  # colour-blind readers too.


class RunError(Exception):
    """What ends the run: one line that says what is wrong and what to do."""


class Interrupted(BaseException):
    """The user or the system asks the run to end; holds the signal's number."""


def parse_arguments(arguments=None):
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            self.exit(2, '%s: error: %s; see --help\n' % (self.prog, message))

    def number(kind, low, high):
        def parse(text):
            value = kind(text)
            if not low <= value <= high:
                raise ValueError
            return value
        parse.__name__ = '%s from %s to %s' % (
            {int: 'whole number', float: 'number'}[kind], low, high)
        return parse

    parser = Parser(description=__doc__.split('\n')[0], allow_abbrev=False,
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add('--data-dir', default='MNIST_data', help='folder of the four IDX files')
    add('--dataset', default='auto', choices=['auto', 'mnist', 'synthetic'],
        help='mnist: the files of the data folder, else download MNIST into it; auto: the same, '
             'else draw synthetic digits; synthetic: draw them at once')
    add('--output-dir', default='.', help='folder of everything that is written')
    add('--epochs', type=number(int, 1, 10 ** 6), default=12,
        help='passes over the training images')
    add('--batch-size', type=number(int, 1, 10 ** 6), default=128, help='images a step')
    add('--learning-rate', type=number(float, 1e-12, 1e12), default=1e-2,
        help='the highest step size of Adam: it is warmed up and then decays to zero')
    add('--code-size', type=number(int, 1, 10 ** 4), default=14, help='dimensions of the code')
    add('--patience', type=number(int, 1, 10 ** 6), default=10,
        help='epochs without a better validation ELBO after which training ends')
    add('--seed', type=number(int, 0, 2 ** 31 - 1), default=0,
        help='of the weights, the noise and the order of the images')
    add('--resume', action='store_true',
        help='go on with the run in the output folder, given the same flags; '
             'a larger --epochs trains a finished run on')
    return parser.parse_args(arguments)


def run(args):
    start = time.time()
    keep_freed_memory()
    make_output_dir(args.output_dir)
    state = load_state(args) if args.resume else None
    dataset = data.load(args.data_dir, args.dataset)
    settings = {'--code-size': args.code_size, '--batch-size': args.batch_size,
                '--learning-rate': args.learning_rate, '--seed': args.seed,
                '--data-dir': dataset.fingerprint}
    if state is None:
        state = {'settings': settings, 'dataset': dataset.name, 'history': [],
                 'log_dir': '%s-%d' % (time.strftime('%Y-%m-%d-%H%M%S'), os.getpid()),
                 'variables': {}, 'best': {}}
    for flag, value in settings.items():
        if state['settings'][flag] != value:
            raise RunError('%s: the run in %s had another (%s, not %s); give the same flags or '
                           'leave --resume out to start anew'
                           % (flag, args.output_dir, state['settings'][flag], value))
    if len(state['history']) > args.epochs:
        raise RunError('--epochs: the run in %s has trained for %d already; give that many or more'
                       % (args.output_dir, len(state['history'])))

    model = build(args, dataset)
    shapes = {v.op.name: tuple(v.shape.as_list()) for v in tf.global_variables()}
    if state['variables'] and shapes != {k: v.shape for k, v in state['variables'].items()}:
        raise RunError('--resume: the run in %s has another network, perhaps that of an earlier '
                       'version; leave --resume out to start anew' % args.output_dir)
    print('Model: %s parameters.' % format(sum(
        int(np.prod(v.shape)) for v in tf.trainable_variables()), ','))
    checkpoint = Checkpoint(os.path.join(args.output_dir, 'new_model.ckpt'))
    with tf.Session(config=TWO_CORES) as session:
        session.run(tf.global_variables_initializer())
        tf.get_default_graph().finalize()
        gc.freeze()
        gc.enable()
        set_variables(session, state['variables'])
        if state['best']:
            checkpoint.save(state['best'])  # Perhaps the run was killed just before it did.
        try:
            handle_signals()
            train(args, dataset, model, session, state, checkpoint)
            set_variables(session, state['best'])
            report(args, dataset, model, session, state, checkpoint, start)
            checkpoint.tidy()
            end_at_signals()
        except Interrupted as interrupted:
            if not state['best']:
                print('\nInterrupted before the end of the first epoch: nothing is saved.')
            else:
                save_state(args, state)  # Perhaps the signal came just before it did.
                checkpoint.save(state['best'])
                set_variables(session, state['best'])
                written = draw_samples(args, dataset, session.run(model.samples))
                checkpoint.tidy()
                print('\nInterrupted. The best model so far is in %s, its samples in %s.'
                      % (checkpoint.prefix, written))
                print('Go on with: python main.py %s --resume' % ' '.join(
                    shlex.quote(a) for a in sys.argv[1:] if a != '--resume'))
            return 128 + interrupted.args[0]
    if dataset.warning:
        print(dataset.warning, file=sys.stderr)
    return 0


def keep_freed_memory():
    """Has the C library keep for the next step what one step frees: training takes 9% less time
    than with giving it back to the system and getting it again."""
    with contextlib.suppress(OSError, AttributeError):  # Not the GNU C library.
        mallopt = ctypes.CDLL('libc.so.6').mallopt
        mallopt(-1, 2 ** 30)  # M_TRIM_THRESHOLD, in bytes.
        mallopt(-3, 2 ** 25)  # M_MMAP_THRESHOLD, in bytes, at its upper limit.


def build(args, dataset):
    images = tf.placeholder(tf.float32, [None, 28, 28], 'images')
    learning_rate = tf.placeholder(tf.float32, [], 'learning_rate')
    tf.constant(dataset.name, name='dataset')
    # A pixel that is never inked has a mean of 0; half a grey level keeps its logit finite.
    mean = (dataset.train_images.mean(0) + .5) / 256
    network = Network(args.code_size, logits=np.log(mean / (1 - mean)), seed=args.seed)
    return network.optimization(images, learning_rate)


# ------------------------------------------------------------------------------------- Training


def learning_rate(step, steps, peak):
    """Rises linearly from zero to `peak` in the first steps, then falls linearly to zero."""
    progress = (step + .5) / steps
    return peak * min(progress / WARM_UP, (1 - progress) / (1 - WARM_UP))


def train(args, dataset, model, session, state, checkpoint):
    """Trains from the end of `state['history']` on, and keeps `state` at the last whole epoch."""
    history = state['history']
    batches = math.ceil(len(dataset.train_images) / args.batch_size)
    log_dir = os.path.join(args.output_dir, 'logs', state['log_dir'])
    with Log(log_dir, 'training', len(history) * batches) as log, \
            Log(log_dir, 'validation', len(history) * batches) as validation_log:
        if not history:
            log.add_graph(tf.get_default_graph())
        while len(history) < args.epochs and len(history) - best_epoch(history) < args.patience:
            epoch = len(history) + 1
            epoch_start = time.time()
            print('Epoch %d/%d' % (epoch, args.epochs))
            bar = tf.keras.utils.Progbar(batches, verbose=int(sys.stdout.isatty()))
            totals = np.zeros(2)
            for i, images in enumerate(data.batches(
                    dataset.train_images, args.batch_size, args.seed, epoch)):
                step = (epoch - 1) * batches + i
                rate = learning_rate(step, args.epochs * batches, args.learning_rate)
                _, elbo, divergence = session.run(
                    [model.optimize, model.elbo, model.reg],
                    {'images:0': data.to_float(images), 'learning_rate:0': rate})
                require_finite(elbo, epoch, i + 1)
                divergence = divergence.mean()
                totals += len(images) * np.array([-elbo, divergence])
                bar.update(i + 1, [('-ELBO', -elbo), ('divergence', divergence)])
                if step % LOG_STEPS == 0:
                    log.add(step + 1, -elbo, divergence, rate)
            training = totals / len(dataset.train_images)
            *validation, _ = evaluate(session, model, dataset.validation_images)
            require_finite(validation[0], epoch, batches)
            history = history + [{
                'epoch': epoch,
                'training_negative_elbo': training[0], 'training_divergence': training[1],
                'validation_negative_elbo': validation[0], 'validation_divergence': validation[1],
                'seconds': time.time() - epoch_start}]
            print('Epoch %d/%d: -ELBO %.2f training, %.2f validation; divergence %.2f nats; %.1f s'
                  % (epoch, args.epochs, training[0], *validation, time.time() - epoch_start))
            variables = session.run({v.op.name: v for v in tf.global_variables()})
            best = state['best']
            if best_epoch(history) == epoch:
                best = {v.op.name: variables[v.op.name] for v in model_variables()}
            # At once, so that a signal finds all of the epoch in it or nothing.
            state.update(history=history, variables=variables, best=best)
            save_state(args, state)
            checkpoint.save(best)
            validation_log.add(epoch * batches, *validation, rate)
            validation_log.add_picture(epoch * batches, mosaic(session.run(model.samples)))
            draw_training_curves(args, dataset, history)
            save_metrics(args, state)


def best_epoch(history):
    """The epoch of the highest validation ELBO, the first one being 1; 0 if there is none."""
    return min(history, key=lambda entry: entry['validation_negative_elbo'],
               default={'epoch': 0})['epoch']


def require_finite(value, epoch, step):
    if not math.isfinite(value):
        raise RunError('--learning-rate: training diverged in epoch %d, step %d (the ELBO is %s); '
                       'try a lower one' % (epoch, step, value))


def evaluate(session, model, images):
    """The mean negative ELBO and divergence of uint8 `images` `[n, 28, 28]`, in nats per image, and
    the means of their posteriors, `[n, code_size]`."""
    totals, codes = np.zeros(2), []
    for start in range(0, len(images), CHUNK):
        chunk = images[start:start + CHUNK]
        elbo, divergence, mu = session.run([model.elbo, model.reg, 'mu:0'],
                                           {'images:0': data.to_float(chunk)})
        totals += [-elbo * len(chunk), divergence.sum()]
        codes.append(mu)
    return (*totals / len(images), np.concatenate(codes))


def handle_signals():
    """The first SIGINT or SIGTERM raises `Interrupted`, a second one ends the process."""
    def interrupt(signum, frame):
        end_at_signals()
        raise Interrupted(signum)
    for signum in signal.SIGINT, signal.SIGTERM:
        signal.signal(signum, interrupt)


def end_at_signals():
    for signum in signal.SIGINT, signal.SIGTERM:
        signal.signal(signum, lambda signum, frame: os._exit(128 + signum))


# ---------------------------------------------------------------------------------------- Files


def make_output_dir(path):
    try:
        os.makedirs(path, exist_ok=True)
        with replacing(os.path.join(path, '.writable')) as probe:
            open(probe, 'w').close()
        os.remove(os.path.join(path, '.writable'))
    except (OSError, RunError) as error:
        raise RunError('--output-dir: nothing can be written into %s (%s); choose another folder'
                       % (path, getattr(error, 'strerror', None) or error)) from error


@contextlib.contextmanager
def replacing(path):
    """Gives the name of a file to write, which then takes the place of `path`, whole or not at all.

    Raises:
        RunError: it cannot be written, and `path` is as it was.
    """
    unfinished = path + '.unfinished'
    try:
        yield unfinished
        os.replace(unfinished, path)
    except (OSError, tf.errors.OpError) as error:
        # Of TensorFlow's errors the last part says why, after the names of temporary files.
        reason = getattr(error, 'strerror', None) or str(error).split('\n')[0].split('; ')[-1]
        raise RunError('%s: cannot be written (%s); make room, or choose another folder with '
                       '--output-dir' % (path, reason)) from error
    finally:
        with contextlib.suppress(OSError):
            os.remove(unfinished)


def model_variables():
    """What `new_model.ckpt` holds: the weights, and the step, a part of the noise's seed."""
    return tf.trainable_variables() + [tf.train.get_global_step()]


def set_variables(session, values):
    """Gives variables their values, arrays by the variables' names. Adds nothing to the graph."""
    variables = [v for v in tf.global_variables() if v.op.name in values]
    session.run([v.initializer for v in variables],
                {v.initializer.inputs[1]: values[v.op.name] for v in variables})


class Checkpoint:
    """The files of a checkpoint, which readers may restore at any moment while it is replaced.

    TensorFlow's checkpoints are an index and data files, which an index finds by their number of
    shards alone. So each version gets a number of shards that no file there has, and its index,
    renamed into place last, never finds another version's data. The version before stays for
    those who have just read its index, until the next one or `tidy` removes it.
    """

    def __init__(self, prefix):
        self.prefix = prefix
        self.values, self.superseded = None, []
        meta_graph = tf.train.Saver(model_variables()).export_meta_graph(strip_default_attrs=True)
        for node in meta_graph.graph_def.node:  # Who restores it does not have our gradients.
            node.attr.pop('_gradient_op_type', None)
        self.meta_graph = meta_graph.SerializeToString()

    def save(self, values):
        """Replaces the checkpoint by one of `values`, arrays by the variables' names."""
        if values is self.values:
            return
        self.tidy()
        old = glob.glob(glob.escape(self.prefix) + '.data-*')
        shards = next(n for n in itertools.count(1)
                      if not any(path.endswith('-of-%05d' % n) for path in old))
        folder = self.prefix + '.unfinished'
        shutil.rmtree(folder, ignore_errors=True)
        try:
            with replacing(self.prefix + '.index') as index:
                os.mkdir(folder)
                whole = os.path.join(folder, 'whole')
                write_checkpoint(whole, values, shards)
                for i in range(shards):
                    os.replace(_data_file(whole, i, shards), _data_file(self.prefix, i, shards))
                with replacing(self.prefix + '.meta') as meta, open(meta, 'wb') as file:
                    file.write(self.meta_graph)
                os.replace(whole + '.index', index)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self.values, self.superseded = values, old

    def tidy(self):
        """Removes the data files of the version before the last."""
        for path in self.superseded:
            with contextlib.suppress(OSError):
                os.remove(path)
        self.superseded = []


def _data_file(prefix, shard, shards):
    return '%s.data-%05d-of-%05d' % (prefix, shard, shards)


def write_checkpoint(prefix, values, shards):
    """Writes `values`, arrays by their names, as a checkpoint of so many data files."""
    names = sorted(values)
    parts = ['%s-%d' % (prefix, i) for i in range(shards)]
    with tf.Graph().as_default(), tf.Session() as session:
        saves = []
        for i, part in enumerate(parts):
            mine = names[i::shards]
            saves.append(tf.raw_ops.SaveV2(
                prefix=part, tensor_names=mine, shape_and_slices=[''] * len(mine),
                tensors=[tf.constant(values[name]) for name in mine]))
        with tf.control_dependencies(saves):
            session.run(tf.raw_ops.MergeV2Checkpoints(
                checkpoint_prefixes=parts, destination_prefix=prefix))


def state_file(args):
    return os.path.join(args.output_dir, 'training_state.npz')


def save_state(args, state):
    """Writes all that `--resume` needs into one file."""
    arrays = {kind + '/' + name: value for kind in ('variables', 'best')
              for name, value in state[kind].items()}
    rest = {key: value for key, value in state.items() if key not in ('variables', 'best')}
    content = io.BytesIO()
    np.savez(content, json=json.dumps(rest), **arrays)
    with replacing(state_file(args)) as path, open(path, 'wb') as file:
        file.write(content.getbuffer())


def load_state(args):
    """Reads what `save_state` wrote."""
    path = state_file(args)
    try:
        with np.load(path) as arrays:
            state = dict(json.loads(str(arrays['json'])), variables={}, best={})
            for key in set(arrays.files) - {'json'}:
                kind, name = key.split('/', 1)
                state[kind][name] = arrays[key]
            return state
    except FileNotFoundError as error:
        raise RunError('--resume: there is no %s to go on from; leave --resume out, or name the '
                       "run's folder with --output-dir" % path) from error
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise RunError('%s: cannot be read (%s); leave --resume out to start anew'
                       % (path, error)) from error


def save_metrics(args, state, **results):
    """Writes the settings, the history and the results, for programs to read."""
    metrics = {
        'settings': {key: value for key, value in vars(args).items() if key != 'resume'},
        'dataset': state['dataset'],
        'fingerprint': state['settings']['--data-dir'],
        'versions': {'python': platform.python_version(), 'tensorflow': tf.VERSION,
                     'numpy': np.__version__, 'matplotlib': matplotlib.__version__},
        'log_dir': os.path.join('logs', state['log_dir']),
        'history': state['history'], 'best_epoch': best_epoch(state['history']), **results}
    with replacing(os.path.join(args.output_dir, 'metrics.json')) as path, open(path, 'w') as file:
        json.dump(metrics, file, indent=2)
        file.write('\n')


class Log:
    """A run's points for TensorBoard, under the same names for training and validation."""

    def __init__(self, log_dir, kind, step):
        self.writer = tf.summary.FileWriter(os.path.join(log_dir, kind))
        if step:  # A resumed run writes the steps after its last epoch again.
            self.writer.add_session_log(tf.SessionLog(status=tf.SessionLog.START), step + 1)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.writer.close()

    def add_graph(self, graph):
        self.writer.add_graph(graph)

    def add(self, step, negative_elbo, divergence, rate):
        values = {'negative_ELBO': negative_elbo, 'divergence': divergence,
                  'reconstruction': negative_elbo - divergence, 'learning_rate': rate}
        self.writer.add_summary(tf.Summary(value=[
            tf.Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]), step)

    def add_picture(self, step, picture):
        png = io.BytesIO()
        matplotlib.image.imsave(png, picture, cmap='gray', vmin=0, vmax=1, format='png')
        self.writer.add_summary(tf.Summary(value=[tf.Summary.Value(
            tag='samples', image=tf.Summary.Image(encoded_image_string=png.getvalue()))]), step)
        self.writer.flush()


# ------------------------------------------------------------------------------------- Pictures


def report(args, dataset, model, session, state, checkpoint, start):
    """Evaluates the best model on the test images, draws it and says where everything is."""
    history = state['history']
    negative_elbo, divergence, codes = evaluate(session, model, dataset.test_images)
    results = {'negative_elbo': negative_elbo, 'reconstruction': negative_elbo - divergence,
               'divergence': divergence}
    save_metrics(args, state, test=results)
    written = [draw_samples(args, dataset, session.run(model.samples)),
               draw_training_curves(args, dataset, history),
               draw_reconstructions(args, dataset, session),
               draw_latent_space(args, dataset, session, codes),
               os.path.join(args.output_dir, 'metrics.json'), state_file(args),
               os.path.join(args.output_dir, 'logs', state['log_dir'])]
    print('Test: -ELBO %.2f nats per image = %.2f reconstruction + %.2f divergence (epoch %d of %d)'
          % (negative_elbo, negative_elbo - divergence, divergence,
             best_epoch(history), len(history)))
    print('Wrote %s.{meta,index,data-*}, %s' % (checkpoint.prefix, ', '.join(written)))
    print('Done in %.0f s.' % (time.time() - start))


def save_figure(args, dataset, name, figure):
    path = os.path.join(args.output_dir, name)
    with replacing(path) as unfinished:
        figure.savefig(unfinished, format='png', dpi=100, metadata={'Source': dataset.name})
    return path


def mosaic(images, columns=10, scale=1, gap=1):
    """Lays images `[n, 28, 28]` out in rows, enlarged pixel by pixel, white lines between them."""
    images = np.kron(images, np.ones((1, scale, scale)))
    images = np.pad(images, [(0, 0), (0, gap), (0, gap)], 'constant', constant_values=1)
    height, width = images.shape[1:]
    grid = images.reshape(-1, columns, height, width).swapaxes(1, 2)
    return grid.reshape(-1, columns * width)[:len(grid) * height - gap, :columns * width - gap]


def draw_samples(args, dataset, samples):
    """Writes `new_images.png`: 10 x 10 samples, the plain grid."""
    path = os.path.join(args.output_dir, 'new_images.png')
    with replacing(path) as unfinished:
        matplotlib.image.imsave(unfinished, mosaic(samples, scale=4, gap=4), cmap='gray', vmin=0,
                                vmax=1, format='png', metadata={'Source': dataset.name})
    return path


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
        axes.set_title('%s (%s)' % (title, dataset.name))
        axes.set_xlabel('epoch')
        axes.set_ylabel('nats per image')
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=.3)
        axes.legend()
    return save_figure(args, dataset, 'training_curves.png', figure)


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
    axes.imshow(mosaic(pairs.reshape(-1, 28, 28)), cmap='gray', vmin=0, vmax=1)
    axes.set_title('Test images, and below each its reconstruction\n(%s)' % dataset.name)
    axes.set_xticks([])
    axes.set_yticks(58 * np.arange(10) + 28)
    axes.set_yticklabels(range(10))
    axes.set_ylabel('class')
    return save_figure(args, dataset, 'reconstructions.png', figure)


def draw_latent_space(args, dataset, session, codes):
    """Writes `latent_space.png`: decoded codes beside the means of the test images' posteriors."""
    figure = Figure(figsize=(13, 6.5), tight_layout=True)
    left, right = figure.subplots(1, 2)
    if args.code_size == 2:
        quantiles = normal_quantiles((np.arange(20) + .5) / 20)
        grid = np.stack(np.meshgrid(quantiles, -quantiles), -1).reshape(-1, 2)
        columns, points = 20, codes
        left.set_title('Decoded codes, evenly spread over the prior (%s)' % dataset.name)
        ticks = 28 * np.arange(20) + 14
        left.set_xticks(ticks[::3])
        left.set_xticklabels(['%.1f' % q for q in quantiles[::3]])
        left.set_yticks(ticks[::3])
        left.set_yticklabels(['%.1f' % -q for q in quantiles[::3]])
        names = 'code, dimension 1', 'code, dimension 2'
        left.set_xlabel(names[0])
        left.set_ylabel(names[1])
    else:
        # The first image of a class, and the first of the next class.
        ends = [np.argmax(dataset.test_labels == digit) for digit in [*range(10), 0]]
        shares = np.linspace(0, 1, 11)[:, None]
        grid = np.concatenate([codes[a] + shares * (codes[b] - codes[a])
                               for a, b in zip(ends, ends[1:])])
        columns = len(shares)
        left.set_title('Decoded codes between pairs of test images (%s)' % dataset.name)
        left.set_xlabel("share of the second image's code")
        left.set_xticks(29 * np.arange(0, 11, 5) + 14)
        left.set_xticklabels(['0', '0.5', '1'])
        left.set_yticks([])
        centred = codes - codes.mean(0)
        _, variances, axes = np.linalg.svd(centred, full_matrices=False)
        points = centred @ axes[:2].T
        explained = 100 * variances ** 2 / (variances ** 2).sum()
        names = ['principal component %d (%.0f%% of the variance)' % (i + 1, explained[i])
                 for i in range(len(axes[:2]))]
    left.imshow(mosaic(session.run('reconstruction:0', {'code:0': grid}), columns,
                       gap=0 if args.code_size == 2 else 1), cmap='gray', vmin=0, vmax=1)
    if points.shape[1] == 1:
        points = np.c_[points, np.zeros(len(points))]
    for digit, color in enumerate(COLORS):
        of_digit = points[dataset.test_labels == digit]
        right.scatter(*of_digit.T, s=3, color=color, label=digit, linewidths=0, alpha=.6)
    right.set_title('Codes (posterior means) of the test images (%s)' % dataset.name)
    right.set_xlabel(names[0])
    right.set_ylabel(names[-1])
    right.legend(title='class', markerscale=4, loc='upper right')
    return save_figure(args, dataset, 'latent_space.png', figure)


def normal_quantiles(probabilities):
    """The codes under which the standard normal has these probabilities."""
    with tf.Graph().as_default(), tf.Session() as session:
        return session.run(tf.distributions.Normal(0., 1.).quantile(np.float32(probabilities)))


def main():
    sys.stdout.reconfigure(line_buffering=True)  # Into a file or a pipe, too.
    args = parse_arguments()
    try:
        return run(args)
    except (RunError, data.DataError) as error:
        print('Error: %s' % error, file=sys.stderr)
        return 1
    except Interrupted as interrupted:  # While such an error was on its way.
        return 128 + interrupted.args[0]


if __name__ == '__main__':
    sys.exit(main())
