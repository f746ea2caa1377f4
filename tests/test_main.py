"""Tests of the whole command, run as a user runs it, on a small set of images that they make.

The environment variables KILLS and SEED say how often, and at which moments, `kill -9` comes.
"""

import concurrent.futures
import errno
import json
import os
import pathlib
import random
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from unittest import mock

import matplotlib.image
import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import data
import main

ROOT = pathlib.Path(__file__).resolve().parent.parent
KILLS = int(os.environ.get('KILLS', 2))
SEED = int(os.environ.get('SEED', random.randrange(10 ** 6)))
EPOCHS, STEPS = 3, 7  # Of `FLAGS`; the set has 220 images to train on.
FLAGS = ['--epochs', str(EPOCHS), '--batch-size', '32']
# A run with all else that there is; it soon gets worse, so that its best epoch is not its last one.
WORSE = ['--code-size', '2', '--learning-rate', '.1', '--epochs', '20', '--patience', '2',
         '--mixture-components', '3', '--importance-samples', '4', '--binarise']
PICTURES = ['new_images.png', 'training_curves.png', 'reconstructions.png', 'latent_space.png']
MODEL = ['new_model.ckpt' + end for end in ('.meta', '.index', '.data-00000-of-00001')]
# A title would read it as mathematics, lack a letter, and be too long for it.
SET = 'a$\\frac$b, \u5b57, a set whose name is longer than any title of a figure.npz'
signal.signal(signal.SIGINT, signal.default_int_handler)  # A shell's background jobs ignore it.


class Run:
    """The command, started in a folder; `finish` waits for its end."""

    def __init__(self, folder, *arguments, script=(str(ROOT / 'main.py'),)):
        self.folder = folder
        environment = {key: value for key, value in os.environ.items()
                       if key not in ('TF_CPP_MIN_LOG_LEVEL', 'PYTHONWARNINGS', 'PYTHONPATH')}
        self.files = tempfile.TemporaryFile(), tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            [sys.executable, *script, *map(str, arguments)], cwd=str(folder), env=environment,
            stdout=self.files[0], stderr=self.files[1])

    def printed(self, file=0):
        return os.pread(self.files[file].fileno(), 10 ** 7, 0).decode()

    def finish(self):
        self.code = self.process.wait(600)
        self.out, self.err = self.printed(0), self.printed(1)
        return self

    def wait_for(self, condition):
        while not condition():
            assert self.process.poll() is None, self.finish().out + self.err
            time.sleep(.01)
        return self

    def signal(self, signum):
        self.process.send_signal(signum)
        return self.finish()


def blobs(labels, rng, height=28, width=28):
    """Smooth blobs, the place of each depending on its label."""
    y, x = np.mgrid[:height, :width]
    place = (width + height * 1j) / 2 + 7 * np.exp(.2j * np.pi * labels)
    place += rng.randn(2, len(labels)).T.dot([1, 1j])
    return np.uint8(255 * np.exp(-np.abs(x + 1j * y - place[:, None, None]) ** 2 / 18))


def write_set(path, seed):
    rng = np.random.RandomState(seed)
    train, test = (rng.permutation(np.arange(count) % 10) for count in (240, 60))
    np.savez(str(path), x_train=blobs(train, rng), y_train=train,
             x_test=blobs(test, rng), y_test=test)


def metrics(folder):
    return json.loads((folder / 'metrics.json').read_text())


def state(folder):
    with np.load(str(folder / 'training_state.npz')) as file:
        return dict(file)


def history(folder):
    """The history in the state without the seconds, which differ; empty if there is no state."""
    path = folder / 'training_state.npz'
    if not path.exists():
        return []
    with np.load(str(path)) as file:
        entries = json.loads(str(file['record']))['history']
    return [{k: v for k, v in entry.items() if k != 'seconds'} for entry in entries]


def tensors(folder):
    """Everything in the checkpoint; raises if any of it is missing or damaged."""
    assert tf.train.latest_checkpoint(str(folder)) == str(folder / 'new_model.ckpt')
    reader = tf.train.load_checkpoint(str(folder / 'new_model.ckpt'))
    return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}


def results(folder):
    """What two equal runs have in common, bit for bit."""
    weights = {name: array.tobytes() for name, array in tensors(folder).items()}
    pictures = [(folder / name).read_bytes() for name in PICTURES]
    return weights, pictures, history(folder), metrics(folder)['test']


def listing(folder):
    """The content of each file that a run leaves, but for the logs, of which each has its own, and
    for what TensorFlow's saver leaves when it is killed."""
    return {path.name: path.read_bytes() for path in folder.iterdir()
            if path.is_file() and '.tempstate' not in path.name}


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp('data') / SET
    write_set(path, 0)
    return path


@pytest.fixture(scope='module')
def dataset(data_dir):
    return data.load(str(data_dir))


@pytest.fixture(scope='module')
def runs(data_dir, tmp_path_factory):
    """Two finished runs, the default one and the worse one. Long chains of further runs go on, two
    at a time, beside the other tests: futures by function."""
    runs = [Run(tmp_path_factory.mktemp(name), '--data-dir', data_dir, *FLAGS, *flags)
            for name, flags in [('default', []), ('worse', WORSE)]]
    for run in runs:
        assert run.finish().code == 0, run.out + run.err
    folders = [run.folder for run in runs]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        yield (*runs, {function: pool.submit(
            function, data_dir, tmp_path_factory.mktemp('x'), *folders) for function in CHAINS})


@pytest.fixture
def default(runs):
    return runs[0].folder


@pytest.fixture
def finished(default, tmp_path):
    """A copy of a finished run's folder."""
    return shutil.copytree(default, tmp_path / 'finished')


@pytest.fixture
def command(data_dir, capfd):
    """Runs the command in this process: `(exit code, stdout, stderr)`. Signals do what they did."""
    def run(folder, *flags):
        signals = signal.SIGINT, signal.SIGTERM
        before = [*map(signal.getsignal, signals)]
        code = main.main([str(flag) for flag in (
            '--data-dir', data_dir, '--output-dir', folder, *FLAGS, *flags)])
        assert [*map(signal.getsignal, signals)] == before
        return (code, *capfd.readouterr())
    return run


def assert_one_line(result, *parts):
    """The run failed with one line that contains these parts."""
    code, _, err = result
    assert code == 1 and re.fullmatch('Error: .{,500}\n', err), err
    assert all(str(part) in err for part in parts), err


def points(folder, kind):
    """TensorBoard's curves of a run as `[points, (step, value)]` by their names, and its number of
    graphs and pictures."""
    path, = folder.glob('logs/*/%s/*' % kind)
    events = list(tf.train.summary_iterator(str(path)))
    values = [(event.step, value) for event in events for value in event.summary.value]
    pictures = {v.image.encoded_image_string for _, v in values if v.tag == 'samples'}
    assert all(picture.startswith(b'\x89PNG') for picture in pictures)
    curves = {tag: np.array([(step, v.simple_value) for step, v in values if v.tag == tag])
              for tag in ('negative_ELBO', 'reconstruction', 'divergence', 'learning_rate')}
    elbos, *parts = (curves[tag][:, 1] for tag in list(curves)[:3])
    np.testing.assert_allclose(elbos, sum(parts), rtol=1e-5)
    return curves, sum(bool(event.graph_def) for event in events), len(pictures)


def test_prints_and_writes_what_it_says(runs, dataset):
    """A figure, a setting, a file or a curve that is missing, or that is another epoch's or set's;
    more epochs than the patience allows, and a model of another than the best one."""
    for run, binarised in zip(runs, ['', ', binarised']):
        content, saved = metrics(run.folder), tensors(run.folder)
        entries, settings, test = content['history'], content['settings'], content['test']
        best = 1 + np.argmin([entry['validation_negative_elbo'] for entry in entries])
        assert content['best_epoch'] == test['epoch'] == best
        assert saved.pop('global_step') == STEPS * best
        count = sum(array.size for array in saved.values())
        lines = ['Data: %s: 220 training, 20 validation and 60 test images of 28 x 28.'
                 % dataset.name, 'Model: %s parameters.' % format(count, ',')]
        lines += ['Epoch {epoch}/{0}: -ELBO {training_negative_elbo:.2f} training, '
                  '{validation_negative_elbo:.2f} validation; divergence '
                  '{validation_divergence:.2f} nats; {seconds:.1f} s'
                  .format(settings['epochs'], **entry) for entry in entries]
        lines.append(('Test (%s): -ELBO {negative_elbo:.2f} nats per image = {reconstruction:.2f} '
                      'reconstruction + {divergence:.2f} divergence (epoch {epoch} of {0})'
                      % (dataset.name + binarised)).format(len(entries), **test))
        if binarised:
            assert best == len(entries) - 2
            lines.insert(-1, 'No better validation ELBO in 2 epochs (--patience): training ends.')
            lines.append('Test, binarised: -log p(x) {negative_log_likelihood:.2f} nats per image '
                         '(standard error {standard_error:.2f}) from 4 codes each; -ELBO '
                         '{binarised_negative_elbo:.2f}'.format(**test))
        *printed, wrote, done = run.out.splitlines()
        assert printed == lines and run.err == '' and re.fullmatch(r'Done in \d+ s\.', done)
        files = {'checkpoint', 'training_state.npz', 'metrics.json', *PICTURES}
        assert {path.name for path in run.folder.iterdir()} == {'logs', *MODEL, *files}
        assert set(wrote.replace('Wrote ', '').replace('./', '').split(', ')) == {
            content['log_dir'], 'new_model.ckpt.*', *files}
        assert list(content['versions'].values()) == [
            sys.version.split()[0], tf.VERSION, np.__version__, matplotlib.__version__]
        assert {*settings, 'resume'} == set(vars(main.parse_arguments([])))
        assert test['reconstruction'] == test['negative_elbo'] - test['divergence']
        curves, graphs, pictures = points(run.folder, 'training')
        assert (graphs, pictures) == (1, 0)
        assert list(curves['divergence'][:, 0]) == list(range(1, STEPS * len(entries) + 1, 50))
        curves, graphs, pictures = points(run.folder, 'validation')
        assert (graphs, pictures) == (0, len(entries))
        for tag, key in ('negative_ELBO', 'negative_elbo'), ('divergence', 'divergence'):
            np.testing.assert_allclose(curves[tag], [
                (STEPS * e['epoch'], e['validation_' + key]) for e in entries], rtol=1e-6)


def test_flags(command, tmp_path, capfd):
    """Values that are no numbers or out of range, abbreviations; no help, or another default."""
    for flag, value in [('--epochs', -1), ('--batch-size', 0), ('--code-size', 'x'),
                        ('--learning-rate', 'nan'), ('--nonsense', 1), ('--seed', .5),
                        ('--seed', 2 ** 31), ('--epoch', 1)]:
        with pytest.raises(SystemExit, match='2'):
            command(tmp_path, flag, value)
        out, err = capfd.readouterr()
        assert out == '' and re.fullmatch('.*error: .*%s.*\n' % flag, err)
    with pytest.raises(SystemExit, match='0'):
        command(tmp_path, '--help')
    out, err = capfd.readouterr()
    assert err == '' and not list(tmp_path.iterdir())
    assert re.findall(r'\(default: (.*?)\)', ' '.join(out.split())) == (
        'MNIST_data auto . 12 128 0.01 14 1 False 1 0.0 0 10 0 False'.split())


def test_training_is_that_of_the_flags(command, tmp_path, monkeypatch, dataset):
    """Order or noise of epoch 1 or of seed 0 again, images of another part, grey ones; another
    network; a step size that is constant; another mean of figures."""
    fed, session_run = [], tf.Session.run

    def run(session, fetches, feed_dict=None):
        fed.append(feed_dict or {})
        return session_run(session, fetches, feed_dict)
    monkeypatch.setattr(tf.Session, 'run', run)
    for module, name in (main, 'Network'), (data, 'batches'), (data, 'binarise'):
        monkeypatch.setattr(module, name, mock.Mock(wraps=getattr(module, name)))
    monkeypatch.setattr(main, 'report', mock.Mock())
    monkeypatch.setattr(main, 'LOG_STEPS', 1)
    assert command(tmp_path, '--seed', 5, '--batch-size', 90, '--binarise', '--epochs', 2,
                   '--training-codes', 2, '--weight-decay', .5)[0] == 0
    sizes, options = main.Network.call_args
    mean = (dataset.train_images.mean(0) + .5) / 256
    np.testing.assert_allclose(1 / (1 + np.exp(-options.pop('logits'))), mean)
    assert sizes == (14, 1, (28, 28))
    assert options == {'training_codes': 2, 'weight_decay': .5, 'seed': 5}

    def asked(function):
        return [(len(images), *seed) for (images, *seed), _ in function.call_args_list]
    assert asked(data.batches) == [(220, 90, 5, 1), (220, 90, 5, 2)]
    assert asked(data.binarise) == [(20, 1), (60, 0)] + [
        (count, 5, epoch, i) for epoch in (1, 2) for i, count in enumerate([90, 90, 40])]
    assert all(set(np.unique(feed['images:0'])) == {0, 1} for feed in fed if 'images:0' in feed)

    curves, _, _ = points(tmp_path, 'training')
    # Of six steps, each in its middle; the peak is at a fifth of them, at 1.2.
    rates = [.01 * min((step + .5) / 1.2, (5.5 - step) / 4.8) for step in range(6)]
    np.testing.assert_allclose(curves['learning_rate'].T, [range(1, 7), rates], rtol=1e-5)
    np.testing.assert_allclose(
        [feed['learning_rate:0'] for feed in fed if 'learning_rate:0' in feed], rates)
    for tag, key in ('negative_ELBO', 'negative_elbo'), ('divergence', 'divergence'):
        means = curves[tag][:, 1].reshape(2, 3) @ [90, 90, 40] / 220
        np.testing.assert_allclose(means, [e['training_' + key] for e in history(tmp_path)],
                                   rtol=1e-5)


def test_import_leaves_the_process_as_it_was(monkeypatch):
    """Cores that the process may not use, no thread for operations; errors that nobody sees."""
    for cores, threads in (1, 1), (6, 3):
        monkeypatch.setattr(os, 'sched_getaffinity', lambda _: set(range(cores)))  # noqa: B023
        before, again = os.fstat(2), runpy.run_path(main.__file__)
        assert os.fstat(2) == before and again['CORES'] == cores
        config = again['SESSION_CONFIG']
        assert config.intra_op_parallelism_threads == threads
        assert config.inter_op_parallelism_threads == 2


def restored(folder):
    """A session with the model in this folder."""
    session = tf.Session(graph=tf.Graph())
    with session.graph.as_default():
        tf.train.import_meta_graph(str(folder / MODEL[0])).restore(
            session, str(folder / 'new_model.ckpt'))
    return session


def test_checkpoint_gives_what_was_evaluated(finished, dataset):
    """Figures of other images or pixels; variables that the graph lists and the checkpoint does not
    have, or that only training needs; a graph that the other TensorFlow does not read."""
    session, content = restored(finished), metrics(finished)
    best, test = content['best_epoch'], content['test']
    elbo = session.run('elbo:0', {'images:0': dataset.validation_images / 255})
    assert -elbo == pytest.approx(content['history'][best - 1]['validation_negative_elbo'])
    elbo, divergence = session.run(['elbo:0', 'divergence:0'],
                                   {'images:0': dataset.test_images / 255})
    assert -elbo == pytest.approx(test['negative_elbo'])
    assert divergence.mean() == pytest.approx(test['divergence'])
    assert session.run('dataset:0').decode() == dataset.name
    with session.graph.as_default():
        assert len(session.run(tf.report_uninitialized_variables())) == 0
    assert {name.split('/')[0] for name in tensors(finished)} == {
        'encoder', 'decoder', 'global_step'}
    meta_graph = tf.MetaGraphDef.FromString((finished / MODEL[0]).read_bytes())
    for node in meta_graph.graph_def.node:
        assert not {'grad_a', 'grad_b', '_gradient_op_type'}.intersection(node.attr), node.name
        assert not re.search('Random.*V2|AddV2', node.op), node.name
    assert meta_graph.meta_info_def.stripped_default_attrs
    with tf.Graph().as_default(), tf.Session() as other:  # As the README says in words.
        main.Network().optimization(tf.placeholder(tf.float32, [None, 28, 28]), learning_rate=1e-3)
        tf.train.Saver(tf.trainable_variables() + [tf.train.get_global_step()]).restore(
            other, tf.train.latest_checkpoint(str(finished)))


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn from now on, each with its file's content. In none a title or
    legend is cut off, or a title lies on its neighbour, or a class has the colour of another."""
    figures, make = {}, main.figure_png

    def figure_png(figure):
        figures[figure] = make(figure)
        titles = [axes.title.get_window_extent() for axes in figure.axes]
        legends = [axes.get_legend() for axes in figure.axes if axes.get_legend()]
        for box in titles + [legend.get_window_extent() for legend in legends]:
            assert min(box.x0, box.y0) >= 0
            assert box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
        assert all(left.x1 < right.x0 for left, right in zip(titles, titles[1:]))
        colors = [tuple(points.get_facecolor()[0]) for points in figure.axes[-1].collections]
        assert len(set(colors)) == len(colors)
        return figures[figure]
    monkeypatch.setattr(main, 'figure_png', figure_png)
    return figures


def tiles(axes, height=28, width=28):
    """The images of a mosaic, `[rows, columns, height, width]`, of black to white square pixels."""
    shown, box = axes.images[0], axes.get_window_extent()
    image = np.pad(shown.get_array(), [(0, 1), (0, 1)], 'constant')
    assert shown.get_clim() == (0, 1) and shown.get_cmap().name == 'gray'
    assert box.height / box.width == pytest.approx(len(image) / image.shape[1], rel=.01)
    shape = [len(image) // (height + 1), height + 1, image.shape[1] // (width + 1), width + 1]
    return image.reshape(shape).swapaxes(1, 2)[:, :, :height, :width]


def test_pictures_show_what_they_say(command, default, finished, dataset, figures, monkeypatch):
    """Others' images, curves of one series twice, interpolations that end elsewhere; of a run that
    goes on, and is interrupted in its last part: another epoch's log p(x), logs elsewhere."""
    record = dict(metrics(finished), test={'epoch': 1, 'negative_log_likelihood': 9})
    np.savez(str(finished / 'training_state.npz'),
             **dict(state(finished), record=json.dumps(record)))
    monkeypatch.setattr(main, 'CHUNK', 25)
    monkeypatch.setattr(main, 'log_likelihood', mock.Mock(side_effect=main.Interrupted(2)))
    code, out, err = command(finished, '--resume', '--epochs', 4, '--importance-samples', 9)
    assert (code, err) == (130, '') and '\nEpoch 4/4: ' in out and out.count('--resume') == 1
    assert history(finished)[:-1] == history(default)
    assert metrics(finished)['test'].keys() == metrics(default)['test'].keys()
    log, = finished.glob('logs/*')
    events = [event for path in log.glob('*/*') for event in tf.train.summary_iterator(str(path))]
    assert len(list(log.glob('validation/*'))) == 2 and sum(bool(e.graph_def) for e in events) == 1

    _, curves, reconstructions, latent_space = figures  # Of the curves, those before as well.
    assert list(figures.values())[1:] == [(finished / name).read_bytes() for name in PICTURES[1:]]
    assert all(r'a\$\frac\$b' in figure.axes[0].get_title() for figure in figures)
    best, test = metrics(finished)['best_epoch'], metrics(finished)['test']
    for axes, key in zip(curves.axes, ['negative_elbo', 'divergence']):
        lines = {line.get_label(): line for line in axes.lines}
        for kind in 'training', 'validation':
            np.testing.assert_allclose(lines[kind].get_xydata().T, [
                range(1, EPOCHS + 2), [e['%s_%s' % (kind, key)] for e in history(finished)]])
        assert lines['best epoch (%d)' % best].get_xdata()[0] == best
        assert [text.get_text() for text in axes.get_legend().get_texts()] == list(lines)

    session = restored(finished)
    samples = np.pad(session.run('samples:0'), [(0, 0), (0, 1), (0, 1)], 'constant',
                     constant_values=1)  # White lines; each pixel of a sample is 4 x 4 pixels.
    expected = np.concatenate([np.concatenate(row, 1) for row in samples.reshape(10, 10, 29, 29)])
    image = matplotlib.image.imread(str(finished / 'new_images.png'))[..., 0]
    np.testing.assert_allclose(image, np.kron(expected[:-1, :-1], np.ones([4, 4])), atol=2 / 255)

    labels, images = dataset.test_labels, dataset.test_images / np.float32(255)
    shown = tiles(reconstructions.axes[0])
    for label in range(10):  # Six images each.
        some = images[labels == label]
        np.testing.assert_allclose(shown[2 * label, :6], some, atol=1e-6)
        np.testing.assert_allclose(shown[2 * label + 1, :6], session.run(
            'reconstruction:0', {'images:0': some}), atol=1e-6)
        assert (shown[2 * label:2 * label + 2, 6:] == 1).all()  # White.

    elbos = [session.run('elbo:0', {'images:0': part}) for part in np.split(images, [25, 50])]
    assert test['negative_elbo'] == pytest.approx(np.dot([25, 25, 10], elbos) / -60)
    codes = session.run('mu:0', {'images:0': images})
    firsts = codes[[np.argmax(labels == label) for label in [*range(10), 0]]]
    firsts[-1] = codes[labels == 0][1]
    ends = session.run('reconstruction:0', {'code:0': firsts})
    shown = tiles(latent_space.axes[0])
    np.testing.assert_allclose(shown[:, [0, -1]].swapaxes(0, 1), [ends[:-1], ends[1:]], atol=1e-5)
    middle = session.run('reconstruction:0', {'code:0': (firsts[:-1] + firsts[1:]) / 2})
    np.testing.assert_allclose(shown[:, 5], middle, atol=1e-5)
    points, right = main.linear_discriminants(codes, labels)
    assert 'right for %.0f%%' % (100 * right) in latent_space.axes[1].get_title()
    for label, collection in enumerate(latent_space.axes[1].collections):
        assert collection.get_label() == str(label)
        np.testing.assert_allclose(collection.get_offsets(), points[labels == label], atol=1e-4)


def test_pictures_of_a_plane(command, runs, tmp_path, dataset, figures):
    """What is lost, or an earlier log p(x), is not there again; a grid that is turned or not where
    the codes are; crosses that are not the prior's means."""
    worse = runs[1].folder
    folder = shutil.copytree(worse, tmp_path / 'copy')
    for name in [*MODEL, *PICTURES, 'metrics.json']:
        (folder / name).unlink()
    code, out, err = command(folder, *WORSE, '--importance-samples', 0, '--epochs', 60, '--resume')
    assert (code, err) == (0, '') and 'Epoch' not in out and '(--patience): training ends' in out
    assert results(folder) == results(worse) and set(listing(folder)) == set(listing(worse))
    *_, (plane, scatter) = (figure.axes for figure in figures)
    session, images = restored(worse), data.binarise(dataset.test_images, 0) / 255
    codes, prior_mean = session.run(['mu:0', 'prior_mean:0'], {'images:0': images})
    places = [2.5, 47.5, 97.5]  # Per cent: of columns from the left, and of rows from below.
    x, y = np.percentile(codes, places, axis=0).T
    expected = session.run('reconstruction:0', {
        'code:0': np.reshape(np.meshgrid(x, y), [2, -1]).T})
    shown = tiles(plane)[::-1][[0, 9, 19]][:, [0, 9, 19]].reshape(-1, 28, 28)
    np.testing.assert_allclose(shown, expected, atol=1e-5)
    crosses, *classes = scatter.collections
    np.testing.assert_allclose(crosses.get_offsets(), prior_mean, atol=1e-6)
    for label, points in enumerate(classes):
        np.testing.assert_allclose(points.get_offsets(), codes[dataset.test_labels == label],
                                   atol=1e-6)
    for ticks, axis in (plane.get_xticklabels(), 0), (plane.get_yticklabels(), 1):
        assert float(ticks[1].get_text()) == pytest.approx(
            np.percentile(codes[:, axis], 17.5), abs=.06)


@pytest.mark.parametrize('classes', [1, 30])
def test_other_sizes_and_classes(command, tmp_path, figures, classes, monkeypatch):
    """Sizes written into the code; classes missing in silence, and those that are not there."""
    labels = np.sort(5 + (np.arange(200) % 40).clip(max=classes - 1))  # The last is the largest.
    images = blobs(labels, np.random.RandomState(0), 20, 12)
    arrays = dict(x_train=images, x_test=images, y_train=labels, y_test=labels)
    project = mock.Mock(wraps=main.linear_discriminants)
    monkeypatch.setattr(main, 'linear_discriminants', project)
    if classes == 1:
        arrays = dict(x_train=images, x_test=images[:7])
    np.savez(str(tmp_path / 'mine.npz'), **arrays)
    result = command(tmp_path / 'out', '--data-dir', tmp_path / 'mine.npz', '--epochs', 1)
    assert result[::2] == (0, '') and 'of 20 x 12.' in result[1]
    curves, reconstructions, latent_space = figures
    rows = tiles(reconstructions.axes[0], 20, 12)
    assert tiles(latent_space.axes[0], 20, 12).shape == (10, 11, 20, 12)
    samples = matplotlib.image.imread(str(tmp_path / 'out' / 'new_images.png'))
    assert samples.shape[:2] == (5 * (10 * 21 - 1), 5 * (10 * 13 - 1))
    legend = latent_space.axes[1].get_legend()
    ticks = [tick.get_text() for tick in reconstructions.axes[0].get_yticklabels()]
    if classes == 1:
        assert legend is None and not ticks and len(rows) == 14
        np.testing.assert_allclose(rows[::2, 0], images[:7] / 255, atol=1e-6)
        assert latent_space.axes[1].get_xlabel() == 'principal component 1'
    else:
        shown = [str(label) for label in [*range(5, 30), 34]]  # Of equal ones the first.
        assert [text.get_text() for text in legend.get_texts()] == shown == ticks
        assert sorted(set(project.call_args[0][1])) == [*range(5, 30), 34]
        assert list(reconstructions.axes[0].get_yticks()) == list(range(26))
        assert reconstructions.axes[0].images[0].get_extent() == [0, 10, 25.5, -.5]
        for axes in reconstructions.axes[0], latent_space.axes[0]:
            assert axes.get_title().endswith(', the 26 largest of 30 classes)')
        np.testing.assert_allclose(rows[-2], images[labels == 34][:10] / 255, atol=1e-6)


def test_linear_discriminants():
    """Spread that is not divided out, a wrong matrix; one class, fewer points than dimensions."""
    rng, labels = np.random.RandomState(0), np.arange(3000) % 2 + 3
    points = rng.randn(3000, 4) @ rng.randn(4, 4) + np.outer(labels, [1, 0, 2, 0])
    projections, right = main.linear_discriminants(points, labels)
    parts = points[labels == 3], points[labels == 4]
    closed = np.linalg.solve(sum(np.cov(part.T) for part in parts),
                             parts[1].mean(0) - parts[0].mean(0))  # Fisher's, of two classes.
    assert abs(np.corrcoef(projections[:, 0], points @ closed)[0, 1]) > .999
    middle = (parts[0].mean(0) + parts[1].mean(0)) / 2
    assert abs(right - np.mean(((points - middle) @ closed > 0) == (labels == 4))) < .01
    plane, _ = main.linear_discriminants(points, 0 * labels)
    principal = np.linalg.svd(points - points.mean(0))[2][:2]
    correlations = np.corrcoef(plane.T, principal @ points.T)[:2, 2:]
    np.testing.assert_allclose(abs(correlations), np.eye(2), atol=1e-6)
    assert main.linear_discriminants(points[:, :1], 0 * labels)[0].shape == (3000, 2)
    few = np.float32(100 + 50 * rng.randn(6, 1) * rng.randn(1, 14))
    assert np.isfinite(main.linear_discriminants(few, np.arange(6) // 2)[0]).all()


def test_log_likelihood_is_that_of_an_integral(dataset, monkeypatch):
    """Prior or posterior left out, a mean of logarithms, grey pixels, chunks mixed up, signals."""
    monkeypatch.setattr(main, 'CHUNK', 25)
    images = np.uint8(255 * (dataset.test_images > 100))  # Black and white.
    with tf.Graph().as_default(), tf.Session() as session:
        args = main.parse_arguments(['--code-size', '1', '--mixture-components', '3'])
        model = main.build(args, dataset._replace(train_images=images))
        code = np.linspace(-8, 8, 1601)[:, None]
        session.run(tf.global_variables_initializer())
        for _ in range(15):
            session.run(model.optimize, {'images:0': images / 255, 'learning_rate:0': .002})
        probs, log_prior = session.run(['reconstruction:0', 'log_prior:0'], {'code:0': code})
        probs, pixels = probs.reshape(-1, 784).astype(float), images.reshape(-1, 784) / 255
        log_joint = np.log(probs) @ pixels.T + np.log1p(-probs) @ (1 - pixels).T
        log_joint += log_prior[:, None]
        exact = -(np.logaddexp.reduce(log_joint, 0) + np.log(code[1] - code[0])).mean()
        end_if_asked = mock.Mock()
        estimates, errors, negative_elbos = zip(*(
            main.log_likelihood(session, images, count, end_if_asked) for count in (1, 10, 200)))
        grey, binarised = (main.log_likelihood(session, some, 1, end_if_asked) for some in (
            dataset.test_images, data.binarise(dataset.test_images, 0)))
    assert end_if_asked.call_count == 213 and grey == binarised
    assert estimates[0] > estimates[1] > estimates[2] > exact - .05
    assert abs(estimates[2] - exact) < .2 < negative_elbos[2] - exact
    assert estimates[0] == pytest.approx(negative_elbos[0])
    assert errors[2] == pytest.approx(np.logaddexp.reduce(log_joint, 0).std() / 60 ** .5, rel=.02)


def test_refuses_to_resume(command, finished, tmp_path):
    """A run of other flags, images or epochs; no state, a damaged one, an earlier version's."""
    write_set(tmp_path / 'others.npz', 1)
    before = listing(finished)
    for flag, *value in [('--code-size', 2), ('--batch-size', 10), ('--learning-rate', .1),
                         ('--seed', 1), ('--mixture-components', 2), ('--epochs', 2),
                         ('--training-codes', 2), ('--binarise',), ('--weight-decay', .1),
                         ('--data-dir', tmp_path / 'others.npz')]:
        assert_one_line(command(finished, '--resume', flag, *value), 'Error: %s' % flag)
    assert listing(finished) == before
    assert_one_line(command(tmp_path, '--resume'), '--resume: ', tmp_path / 'training_state')

    path, arrays = finished / 'training_state.npz', state(finished)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index('1, "seconds"'.encode('utf-32-le'))] ^= 4  # Epoch 1 becomes epoch 5.
    contents = [b'', whole[:-50], whole[:10 ** 6], os.urandom(1000), bytes(flipped)]
    earlier = json.dumps({'settings': metrics(finished)['settings'], 'history': []})
    for change in [{'record': np.array([{}], object)}, {'record': '[]'}, {'record': '{}'},
                   {'record': earlier}, {'last/encoder/mu/bias': np.zeros(3)}]:
        np.savez(str(path), **dict(arrays, **change))
        contents.append(path.read_bytes())
    for content in contents:
        path.write_bytes(content)
        before = listing(finished)
        assert_one_line(command(finished, '--resume'), path, 'leave --resume out')
        assert listing(finished) == before


def test_failed_run_replaces_nothing(command, finished, tmp_path, monkeypatch, dataset):
    """In its first epoch; and what nobody foresaw is not taken for a full disk."""
    before = listing(finished)
    assert_one_line(command(finished, '--learning-rate', 1e6), 'Error: --learning-rate', 'epoch 1')
    assert_one_line(command(finished / 'metrics.json' / 'x'), '--output-dir', 'metrics.json/x')
    (tmp_path / 'logs').write_text('')
    assert_one_line(command(tmp_path), '--output-dir', 'logs')

    def full(file):  # Asked of a whole file before it replaces another: or else the power fails.
        assert os.fstat(file).st_size > 10 ** 7
        raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', full)
    assert_one_line(command(finished), 'training_state.npz', 'cannot be written (No space')

    def interrupt(*_):
        os.kill(os.getpid(), signal.SIGINT)
        yield dataset.train_images
    monkeypatch.setattr(data, 'batches', interrupt)
    code, out, err = command(finished)
    assert (code, err) == (130, '') and out.endswith('first epoch: nothing is saved.\n')
    monkeypatch.setattr(data, 'batches', lambda *_: open('/nowhere'))
    with pytest.raises(FileNotFoundError):
        command(finished)
    assert listing(finished) == before


def test_folder_or_model_that_is_lost_in_the_run(command, default, tmp_path, monkeypatch):
    """The state is there, and the run goes on with its own flags, not with those of an earlier one;
    parts of its model stay. And on a terminal an epoch has a bar."""
    folder, moved, save_state = tmp_path / 'a [name]', tmp_path / 'moved', main.save_state
    shutil.copytree(default, folder, ignore=shutil.ignore_patterns('logs'))
    flags = folder, '--epochs', 1, '--code-size', 3

    def lose(*arguments):
        save_state(*arguments)
        folder.rename(moved)
        folder.write_text('in its place')
    with monkeypatch.context() as patch:
        patch.setattr(main, 'save_state', lose)
        patch.setattr(sys.stdout, 'isatty', lambda: True)
        _, out, _ = result = command(*flags)
    assert_one_line(result, folder, 'cannot be written')
    assert re.search('\nEpoch 1/1\n.*7/7.*\nEpoch 1/1: -ELBO .*\n', out, re.S), out
    folder.unlink()
    moved.rename(folder)
    assert len(history(folder)) == 1 and metrics(folder)['settings']['code_size'] == 14
    assert_one_line(command(folder, '--resume'), '--code-size')

    (folder / MODEL[2]).unlink()
    (folder / MODEL[2]).mkdir()
    assert_one_line(command(*flags, '--resume'), 'new_model.ckpt', 'cannot be written')
    (folder / MODEL[2]).rmdir()
    assert command(*flags, '--resume')[::2] == (0, '')
    monkeypatch.chdir(folder)  # As TensorFlow takes it for a pattern.
    reader = tf.train.load_checkpoint('new_model.ckpt')
    assert reader.get_tensor('encoder/mu/bias').shape == (3,)
    assert set(listing(folder)) == set(listing(default)) and not list(folder.glob('*.tempstate*'))


def test_ends_without_a_traceback(command, tmp_path, monkeypatch):
    """Of Ctrl-C, which ends at once what it did not end, of short memory or a closed pipe."""
    short = 'Error: memory is short .OOM.; lower --mixture-components, .*\n'
    for error, code, line in [
            (KeyboardInterrupt, 130, ''), (MemoryError('Error:\nOOM'), 1, short),
            (tf.errors.ResourceExhaustedError(None, None, 'Error:\nOOM\n\t [[x]]'), 1, short),
            (BrokenPipeError, 1, '')]:
        monkeypatch.setattr(main, 'run', mock.Mock(side_effect=error))
        result = command(tmp_path)
        assert result[0] == code and re.fullmatch(line, result[2])
    assert os.fstat(1).st_rdev == os.stat(os.devnull).st_rdev
    with pytest.raises(KeyboardInterrupt), main.deferred_signals() as end_if_asked:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(main.Interrupted):
            end_if_asked()
        os.kill(os.getpid(), signal.SIGINT)


def killed(data_dir, folder, default, worse):
    """At random moments, and resumed, in a folder with what an earlier run wrote."""
    rng = random.Random(SEED)
    print('SEED=%d' % SEED)
    folder = shutil.copytree(worse, folder / 'copy')
    before, ours = listing(folder), []
    for kill in [True] * KILLS + [False]:
        run = Run(folder, '--data-dir', data_dir, *FLAGS, *['--resume'] * bool(ours))
        if kill:
            epochs = rng.randrange(EPOCHS)
            run.wait_for(lambda: 'Model' in run.printed() and (  # noqa: B023
                run.printed().count('\nEpoch') >= epochs - len(ours)))  # noqa: B023
            time.sleep(rng.uniform(0, rng.choice([.1, .5, 2])))
            run.signal(signal.SIGKILL)
        assert run.finish().err == '' and run.code in ([0, -signal.SIGKILL] if kill else [0])
        after = listing(folder)
        if after['training_state.npz'] != before['training_state.npz']:
            ours = history(folder)
        assert ours or all(after[name] == before[name] for name in before)
    assert results(folder) == results(default)
    assert set(after) == set(listing(default))


def interrupted(data_dir, folder, default, worse):
    """While it starts up; then after an epoch that is not the best one, and resumed as it says."""
    run = Run(folder, '--data-dir', data_dir)
    maps = pathlib.Path('/proc/%d/maps' % run.process.pid)
    run.wait_for(lambda: 'tensorflow' in maps.read_text()).signal(signal.SIGINT)
    assert run.code == -signal.SIGINT and run.out + run.err == ''

    out, last = folder / 'a name', len(history(worse))
    run = Run(folder, '--data-dir', data_dir, '--output-dir', out.name, *FLAGS, *WORSE)
    run.wait_for(lambda: len(history(out)) >= last - 1).signal(signal.SIGTERM)
    assert run.code == 128 + signal.SIGTERM and run.err == ''
    *_, saved, go_on = run.out.splitlines()
    assert saved.startswith('Interrupted. The best model so far is in a name/new_model.ckpt')
    assert tensors(out)['global_step'] == STEPS * metrics(out)['best_epoch']
    samples = [matplotlib.image.imread(str(path / 'new_images.png')) for path in (out, worse)]
    np.testing.assert_allclose(*samples, atol=1.01 / 255)
    python, script, *arguments = shlex.split(go_on.replace('Go on with: ', ''))
    assert [python, script] == [sys.executable, str(ROOT / 'main.py')]
    run = Run(folder, *arguments).finish()
    assert run.code == 0 and run.err == '' and results(out) == results(worse)


def readme(data_dir, folder, default, worse):
    """Its Python code, with the model alone: pictures turned, labels or a decoder of others."""
    dataset = data.load(str(data_dir))
    blocks = re.findall('```python\n(.*?)```', (ROOT / 'README.md').read_text(), re.S)
    if tf.VERSION < '2':
        blocks = [block for block in blocks if 'TFLite' not in block]
    for i, image in enumerate(dataset.test_images):
        path = folder / 'pictures' / 'ab'[i // 30] / ('%03d.png' % i)
        path.parent.mkdir(parents=True, exist_ok=True)
        matplotlib.image.imsave(str(path), image.repeat(2, 1), cmap='gray', vmin=0, vmax=255)
    for name in ['checkpoint', *MODEL]:
        shutil.copy(str(default / name), str(folder))
    run = Run(folder, script=['-I', '-c', '\n'.join(blocks)]).finish()
    assert run.code == 0, run.err

    mine = data.load(str(folder / 'mine.npz'))
    images = np.concatenate([mine.validation_images, mine.train_images, mine.test_images])
    order = np.argsort(np.random.RandomState(0).rand(60) < .1, kind='stable')  # Test images last.
    assert abs(images - dataset.test_images[order].astype(float)).mean() < 1
    np.testing.assert_array_equal(mine.test_labels, order[-len(mine.test_labels):] // 30)
    codes = np.random.RandomState(0).randn(3, 14)
    with tf.Graph().as_default(), tf.Session() as session:
        signature = tf.saved_model.load(session, ['serve'], str(folder / 'decoder'))
        signature = signature.signature_def['serving_default']
        code, images = signature.inputs['code'].name, signature.outputs['images'].name
        images = session.run(images, {code: codes})
    expected = restored(default).run('reconstruction:0', {'code:0': codes})
    np.testing.assert_allclose(images, expected, atol=1e-6)


CHAINS = [interrupted, killed, readme]


@pytest.mark.parametrize('function', CHAINS, ids=lambda function: function.__name__)
def test_chain_of_runs(runs, function):
    runs[2][function].result()
