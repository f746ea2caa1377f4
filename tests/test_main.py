"""Tests of the whole command, run as a user runs it, on a small set of images that they make.

The environment variable KILLS says how often the test of `kill -9` kills: 2 times unless told; SEED
at which moments.
"""

import concurrent.futures
import contextlib
import importlib.util
import json
import os
import pathlib
import random
import re
import resource
import shlex
import shutil
import signal
import struct
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
README = (ROOT / 'README.md').read_text()
KILLS = int(os.environ.get('KILLS', 2))
SEED = int(os.environ.get('SEED', random.randrange(10 ** 6)))
EPOCHS, STEPS = 3, 7  # Of `FLAGS`; the set has 220 images to train on.
FLAGS = ['--epochs', str(EPOCHS), '--batch-size', '32']
# A run with all else that there is; it soon gets worse, so that its best epoch is not its last one.
WORSE = ['--code-size', '2', '--learning-rate', '.1', '--epochs', '20', '--patience', '2',
         '--mixture-components', '3', '--importance-samples', '4', '--binarise']
FIGURES = ['training_curves.png', 'reconstructions.png', 'latent_space.png']
PICTURES = ['new_images.png', *FIGURES]
MODEL = ['new_model.ckpt' + end for end in ('.meta', '.index', '.data-00000-of-00001')]
# A title would read it as mathematics, lack a letter, and be too long for it.
FOLDER = 'a$\\frac$b, \u5b57, a folder whose name is longer than any title of a figure'


class Run:
    """The command, started in a folder; `finish` waits for its end."""

    def __init__(self, folder, *arguments, script=(str(ROOT / 'main.py'),)):
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

    def signal(self, *signals):
        for signum in signals:
            self.process.send_signal(signum)
        return self.finish()


def blobs(labels, rng, height=28, width=28):
    """Smooth blobs, the place of each depending on its label."""
    y, x = np.mgrid[:height, :width]
    place = (width + height * 1j) / 2 + 7 * np.exp(.2j * np.pi * labels)
    place += rng.randn(2, len(labels)).T.dot([1, 1j])
    return np.uint8(255 * np.exp(-np.abs(x + 1j * y - place[:, None, None]) ** 2 / 18))


def write_set(folder, seed, train=240, test=60):
    folder.mkdir()
    rng = np.random.RandomState(seed)
    for kind, count in ('train', train), ('t10k', test):
        labels = rng.permutation(np.arange(count) % 10).astype(np.uint8)
        (folder / (kind + '-images-idx3-ubyte')).write_bytes(
            struct.pack('>4I', 2051, count, 28, 28) + blobs(labels, rng).tobytes())
        (folder / (kind + '-labels-idx1-ubyte')).write_bytes(
            struct.pack('>2I', 2049, count) + labels.tobytes())


def metrics(folder):
    return json.loads((folder / 'metrics.json').read_text())


def state(folder):
    with np.load(str(folder / 'training_state.npz')) as file:
        return json.loads(str(file['record']))


def write_state(folder, record, *changes):
    """Changes the record and, by their names, arrays."""
    path = str(folder / 'training_state.npz')
    with np.load(path) as file:
        arrays = {**file, 'record': json.dumps(record), **dict(changes)}
    np.savez(path, **arrays)


def history(folder):
    """The history in the state without the seconds, which differ from run to run; empty if there is
    no state."""
    if not (folder / 'training_state.npz').exists():
        return []
    return [{k: v for k, v in entry.items() if k != 'seconds'}
            for entry in state(folder)['history']]


def tensors(folder):
    """Everything in the checkpoint; raises if any of it is missing or damaged."""
    assert tf.train.latest_checkpoint(str(folder)) == str(folder / 'new_model.ckpt')
    reader = tf.train.load_checkpoint(str(folder / 'new_model.ckpt'))
    return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}


def results(folder):
    """What two equal runs have in common, bit for bit."""
    weights = {name: array.tobytes() for name, array in tensors(folder).items()}
    pictures = [(folder / name).read_bytes() for name in PICTURES]
    content = metrics(folder)
    return weights, pictures, history(folder), content['test'], content['best_epoch']


def listing(folder):
    """The content of each file that a run leaves, but for the logs, of which each has its own, and
    for what TensorFlow's saver leaves when it is killed."""
    return {path.name: path.read_bytes() for path in folder.iterdir()
            if path.is_file() and '.tempstate' not in path.name}


# ------------------------------------------------------------------------------------------- Runs


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data')
    write_set(folder / FOLDER, 0)
    write_set(folder / 'others', 1)
    return folder / FOLDER


@pytest.fixture(scope='module')
def dataset(data_dir):
    return data.load(str(data_dir))


@pytest.fixture(scope='module')
def runs(data_dir, tmp_path_factory):
    """Two finished runs, the default one and the worse one; each has its folder as `folder`. Long
    chains of further runs go on, two at a time, beside the other tests: futures by function."""
    runs = []
    for name, flags in ('default', []), ('worse', WORSE):
        folder = tmp_path_factory.mktemp(name)
        runs.append(Run(folder, '--data-dir', data_dir, '--output-dir', 'out', *FLAGS, *flags))
        runs[-1].folder = folder / 'out'
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
def worse(runs):
    return runs[1].folder


@pytest.fixture
def finished(default, tmp_path):
    """A copy of a finished run's folder."""
    return shutil.copytree(default, tmp_path / 'finished')


@pytest.fixture
def command(data_dir, capfd):
    """Runs the command in this process, again and again: `(exit code, stdout, stderr)`. It leaves
    the process as it was."""
    def run(folder, *flags):
        def state():
            return ([signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
                    sys.stdout, len(tf.get_default_graph().get_operations()))
        before = state()
        code = main.main([str(flag) for flag in (
            '--data-dir', data_dir, '--output-dir', folder, *FLAGS, *flags)])
        assert state() == before
        return (code, *capfd.readouterr())
    return run


def assert_one_line(result, *parts):
    """The run failed with one line that contains these parts."""
    code, _, err = result
    assert code == 1 and re.fullmatch('Error: .{,500}\n', err), err
    for part in parts:
        assert str(part) in err


# ----------------------------------------------------------------------- What it prints and writes


def test_prints_and_writes_what_it_says(runs, dataset):
    """A figure, a setting or a file that is missing, or that is another epoch's or set's; more
    epochs than the patience allows, and a model of another than the best one."""
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
        assert set(wrote.replace('Wrote ', '').replace('out/', '').split(', ')) == {
            content['log_dir'], 'new_model.ckpt.*', *files}
        assert content['versions'] == {
            'tensorflow': tf.VERSION, 'numpy': np.__version__,
            'matplotlib': matplotlib.__version__, 'python': sys.version.split()[0]}
        assert {*settings, 'resume'} == set(vars(main.parse_arguments([])))
        assert settings['batch_size'] == 32
        assert test['reconstruction'] == test['negative_elbo'] - test['divergence']
        assert binarised or (entries[-1]['training_negative_elbo']
                             < entries[0]['training_negative_elbo'] - 5)


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


def test_tensorboard(default):
    """A curve under another's name, a point at each step."""
    assert points(default, 'training')[0]['divergence'][:, 0] == [1]
    assert points(default, 'training')[1:] == (1, 0)
    curves, graphs, pictures = points(default, 'validation')
    assert graphs == 0 and pictures == EPOCHS
    for tag, key in ('negative_ELBO', 'negative_elbo'), ('divergence', 'divergence'):
        np.testing.assert_allclose(curves[tag], [
            (STEPS * e['epoch'], e['validation_' + key]) for e in history(default)], rtol=1e-6)


def test_flags(command, tmp_path, capfd):
    """Values that are no numbers or out of range, abbreviations, flags that the help lacks."""
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
    flags = re.findall(r'^  (--[a-z-]+)(.*?)(?=^  -|\Z)', out, re.M | re.S)
    assert {flag for flag, _ in flags} == {'--resume', *(
        '--' + name.replace('_', '-') for name in vars(main.parse_arguments([])))}
    assert all('(default: ' in ' '.join(text.split()) for _, text in flags)


def test_training_is_that_of_the_flags(command, tmp_path, monkeypatch, dataset):
    """Order or noise of epoch 1 or of seed 0 again, images of another part, grey ones; another
    network; a step size that is constant; another mean of figures."""
    asked, fed, network = [], [], mock.Mock(wraps=main.Network)
    monkeypatch.setattr(main, 'Network', network)
    monkeypatch.setattr(main, 'report', mock.Mock())
    monkeypatch.setattr(main, 'LOG_STEPS', 1)
    to_float = data.to_float
    monkeypatch.setattr(data, 'to_float', lambda images: fed.append(images) or to_float(images))

    def spy(name, function):
        monkeypatch.setattr(data, name, lambda images, *seed: asked.append(
            (name, len(images), *seed)) or function(images, *seed))
    spy('batches', data.batches)
    spy('binarise', data.binarise)
    assert command(tmp_path, '--seed', 5, '--batch-size', 90, '--binarise', '--epochs', 2,
                   '--training-codes', 2, '--weight-decay', .5)[0] == 0
    sizes, options = network.call_args
    mean = (dataset.train_images.mean(0) + .5) / 256
    np.testing.assert_allclose(1 / (1 + np.exp(-options.pop('logits'))), mean)
    assert sizes == (14, 1, (28, 28))
    assert options == {'training_codes': 2, 'weight_decay': .5, 'seed': 5}
    assert asked == [('binarise', 20, 1), ('binarise', 60, 0)] + [
        entry for epoch in (1, 2) for entry in [
            ('batches', 220, 90, 5, epoch), ('binarise', 90, 5, epoch, 0),
            ('binarise', 90, 5, epoch, 1), ('binarise', 40, 5, epoch, 2)]]
    assert all(set(np.unique(images)) == {0, 255} for images in fed)

    curves, _, _ = points(tmp_path, 'training')
    # Of six steps, each in its middle; the peak is at a fifth of them, at 1.2.
    np.testing.assert_allclose(curves['learning_rate'], [
        (step + 1, .01 * min((step + .5) / 1.2, (5.5 - step) / 4.8)) for step in range(6)],
        rtol=1e-5)
    for tag, key in ('negative_ELBO', 'negative_elbo'), ('divergence', 'divergence'):
        means = curves[tag][:, 1].reshape(2, 3) @ [90, 90, 40] / 220
        np.testing.assert_allclose(means, [e['training_' + key] for e in history(tmp_path)],
                                   rtol=1e-5)


def test_import_leaves_the_process_as_it_was(monkeypatch):
    """Cores that the process may not use, no thread for operations; errors that nobody sees."""
    for cores, threads in (1, 1), (6, 3):
        monkeypatch.setattr(os, 'sched_getaffinity', lambda _: set(range(cores)))  # noqa: B023
        spec = importlib.util.spec_from_file_location('again', main.__file__)
        again, before = importlib.util.module_from_spec(spec), os.fstat(2)
        spec.loader.exec_module(again)
        assert os.fstat(2) == before and again.CORES == cores
        assert again.SESSION_CONFIG.intra_op_parallelism_threads == threads
        assert again.SESSION_CONFIG.inter_op_parallelism_threads == 2


# ------------------------------------------------------------------------- Checkpoint and pictures

@contextlib.contextmanager
def restored(folder):
    with tf.Graph().as_default(), tf.Session() as session:
        tf.train.import_meta_graph(str(folder / MODEL[0])).restore(
            session, str(folder / 'new_model.ckpt'))
        yield session


@pytest.fixture(scope='module')
def session(runs):
    """A session with the model of the default run."""
    with restored(runs[0].folder) as session:
        yield session


def test_checkpoint_gives_what_was_evaluated(default, session, dataset):
    """Figures of other images, in the epochs or at the end; pixels of another range; variables that
    the graph lists and the checkpoint does not have, or that only training needs."""
    content = metrics(default)
    best, test = content['best_epoch'], content['test']
    elbo = session.run('elbo:0', {'images:0': dataset.validation_images / 255})
    assert -elbo == pytest.approx(content['history'][best - 1]['validation_negative_elbo'])
    elbo, divergence = session.run(['elbo:0', 'divergence:0'],
                                   {'images:0': dataset.test_images / 255})
    assert -elbo == pytest.approx(test['negative_elbo'])
    assert divergence.mean() == pytest.approx(test['divergence'])
    assert session.run('dataset:0').decode() == dataset.name
    assert len(session.run(tf.report_uninitialized_variables())) == 0
    assert {name.split('/')[0] for name in tensors(default)} == {
        'encoder', 'decoder', 'global_step'}


def test_what_the_readme_makes(runs, dataset, session):
    """Pictures turned or stretched otherwise, labels of others, another decoder exported."""
    elsewhere = runs[2][readme].result()
    mine = data.load(str(elsewhere / 'mine.npz'))
    images = np.concatenate([mine.validation_images, mine.train_images, mine.test_images])
    order = np.argsort(np.arange(60) % 2, kind='stable')  # Of `pictures/a`, then of `pictures/b`.
    test = np.random.RandomState(0).rand(60) < .1
    order = np.concatenate([order[~test], order[test]])
    assert abs(images - dataset.test_images[order].astype(float)).mean() < 1
    np.testing.assert_array_equal(mine.test_labels, order[-test.sum():] % 2)
    codes = np.random.RandomState(0).randn(3, 14)
    with tf.Graph().as_default(), tf.Session() as other:
        signature = tf.saved_model.load(other, ['serve'], str(elsewhere / 'decoder')).signature_def[
            'serving_default']
        code, images = signature.inputs['code'].name, signature.outputs['images'].name
        images = other.run(images, {code: codes})
    expected = session.run('reconstruction:0', {'code:0': codes})
    np.testing.assert_allclose(images, expected, atol=1e-6)


def test_graph_can_be_read_by_the_other_tensorflow(default):
    """Marks of a newer TensorFlow's gradients, its attributes, or operations that 1.14 cannot
    differentiate."""
    meta_graph = tf.MetaGraphDef.FromString((default / MODEL[0]).read_bytes())
    for node in meta_graph.graph_def.node:
        assert not {'grad_a', 'grad_b', '_gradient_op_type'}.intersection(node.attr), node.name
        assert not re.search('Random.*V2|AddV2', node.op), node.name
    assert meta_graph.meta_info_def.stripped_default_attrs


def test_grid_shows_the_samples(default, session):
    expected = np.ones([10 * 116, 10 * 116])  # White; each pixel of a sample is 4 x 4 pixels.
    for i, sample in enumerate(session.run('samples:0')):
        y, x = 116 * (i // 10), 116 * (i % 10)
        expected[y:y + 112, x:x + 112] = np.kron(sample, np.ones([4, 4]))
    image = matplotlib.image.imread(str(default / 'new_images.png'))[..., :3]
    np.testing.assert_allclose(image, expected[:-4, :-4, None].repeat(3, 2), atol=2 / 255)


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn from now on, in the order of `FIGURES`, each with its file's
    `content`."""
    figures, make = [], main.figure_png

    def figure_png(figure):
        figure.content = make(figure)
        figures.append(figure)
        return figure.content
    monkeypatch.setattr(main, 'figure_png', figure_png)
    return figures


def tiles(axes, height=28, width=28):
    """The images of a mosaic, `[rows, columns, height, width]`, which is shown from black to white
    and with square pixels."""
    shown, box = axes.images[0], axes.get_window_extent()
    image = np.pad(shown.get_array(), [(0, 1), (0, 1)], 'constant')
    assert shown.get_clim() == (0, 1) and shown.get_cmap().name == 'gray'
    assert box.height / box.width == pytest.approx(len(image) / image.shape[1], rel=.01)
    shape = [len(image) // (height + 1), height + 1, image.shape[1] // (width + 1), width + 1]
    return image.reshape(shape).swapaxes(1, 2)[:, :, :height, :width]


def assert_legible(figure):
    """No title or legend is cut off, or lies on that of its neighbour; no class has the colour of
    another."""
    texts = [axes.title for axes in figure.axes]
    boxes = [text.get_window_extent() for text in texts + [
        axes.get_legend() for axes in figure.axes if axes.get_legend()]]
    for box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0
        assert box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
    for left, right in zip(boxes[:len(texts)], boxes[1:len(texts)]):
        assert left.x1 < right.x0
    colors = [tuple(points.get_facecolor()[0]) for points in figure.axes[-1].collections]
    assert len(set(colors)) == len(colors)


def test_pictures_show_what_they_say(command, finished, session, dataset, figures):
    """Images beside others' reconstructions, curves of one series twice, points of other classes,
    interpolations that start or end elsewhere; the log p(x) of another epoch's model."""
    test = metrics(finished)['test']
    write_state(finished, dict(state(finished), test={'epoch': 1, 'negative_log_likelihood': 9}))
    assert command(finished, '--resume')[0] == 0 and metrics(finished)['test'] == test
    assert [figure.content for figure in figures] == [
        (finished / name).read_bytes() for name in FIGURES]
    for figure in figures:
        assert_legible(figure)
        assert r'a\$\frac\$b' in figure.axes[0].get_title()
    curves, reconstructions, latent_space = figures
    best = metrics(finished)['best_epoch']
    for axes, key in zip(curves.axes, ['negative_elbo', 'divergence']):
        lines = {line.get_label(): line for line in axes.lines}
        for kind in 'training', 'validation':
            np.testing.assert_allclose(lines[kind].get_xydata().T, [
                range(1, EPOCHS + 1), [e['%s_%s' % (kind, key)] for e in history(finished)]])
        assert lines['best epoch (%d)' % best].get_xdata()[0] == best
        assert [text.get_text() for text in axes.get_legend().get_texts()] == list(lines)

    labels, images = dataset.test_labels, dataset.test_images / np.float32(255)
    shown = tiles(reconstructions.axes[0])
    for label in range(10):  # Six images each.
        some = images[labels == label]
        np.testing.assert_allclose(shown[2 * label, :6], some, atol=1e-6)
        np.testing.assert_allclose(shown[2 * label + 1, :6], session.run(
            'reconstruction:0', {'images:0': some}), atol=1e-6)
        assert (shown[2 * label:2 * label + 2, 6:] == 1).all()  # White.

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


def test_pictures_of_a_plane(command, worse, tmp_path, dataset, figures):
    """What is lost, or an earlier log p(x), is not there again; a grid that is turned or not where
    the codes are; crosses that are not the prior's means."""
    folder = shutil.copytree(worse, tmp_path / 'copy')
    for name in [*MODEL, *PICTURES, 'metrics.json']:
        (folder / name).unlink()
    code, out, err = command(folder, *WORSE, '--importance-samples', 0, '--epochs', 60, '--resume')
    assert (code, err) == (0, '') and 'Epoch' not in out and '(--patience): training ends' in out
    assert results(folder) == results(worse) and set(listing(folder)) == set(listing(worse))
    plane, scatter = figures[2].axes
    with restored(worse) as session:
        images = data.binarise(dataset.test_images, 0) / 255
        codes, prior_mean = session.run(['mu:0', 'prior_mean:0'], {'images:0': images})
        places = [2.5, 47.5, 97.5]  # Per cent: of columns from the left, and of rows from below.
        x, y = np.percentile(codes, places, axis=0).T
        expected = session.run('reconstruction:0', {'code:0': np.array(np.meshgrid(x, y)).reshape(
            2, -1).T})
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
    rng = np.random.RandomState(0)
    labels = np.sort(5 + (np.arange(200) % 40).clip(max=classes - 1))  # The last is the largest.
    images = blobs(labels, rng, 20, 12)
    arrays = dict(x_train=images, x_test=images, y_train=labels, y_test=labels)
    project, projected = main.linear_discriminants, []
    monkeypatch.setattr(main, 'linear_discriminants', lambda codes, labels: projected.extend(
        labels) or project(codes, labels))
    if classes == 1:
        arrays = dict(x_train=images, x_test=images[:7])
    np.savez(str(tmp_path / 'mine.npz'), **arrays)
    result = command(tmp_path / 'out', '--data-dir', tmp_path / 'mine.npz', '--epochs', 1)
    assert result[::2] == (0, '') and 'of 20 x 12.' in result[1]
    curves, reconstructions, latent_space = figures
    for figure in figures:
        assert_legible(figure)
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
        assert sorted(set(projected)) == [*range(5, 30), 34]
        top, bottom = sorted(reconstructions.axes[0].get_ylim())
        places = (reconstructions.axes[0].get_yticks() - top) / (bottom - top)
        np.testing.assert_allclose(places, (np.arange(26) + .5) / 26)
        assert reconstructions.axes[0].images[0].get_extent()[3] == top  # Where the first row is.
        for axes in reconstructions.axes[0], latent_space.axes[0]:
            assert axes.get_title().endswith(', the 26 largest of 30 classes)')
        np.testing.assert_allclose(rows[-2], images[labels == 34][:10] / 255, atol=1e-6)


def test_linear_discriminants():
    """Spread that is not divided out, components of a wrong matrix; points of one class, or fewer
    of them than dimensions."""
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
    np.testing.assert_allclose(abs(np.corrcoef(plane.T, principal @ points.T)[:2, 2:]), np.eye(2),
                               atol=1e-6)
    assert main.linear_discriminants(points[:, :1], 0 * labels)[0].shape == (3000, 2)
    few = np.float32(100 + 50 * rng.randn(6, 1) * rng.randn(1, 14))
    assert np.isfinite(main.linear_discriminants(few, np.arange(6) // 2)[0]).all()


# ---------------------------------------------------------------------------------------- log p(x)


@pytest.mark.parametrize('components', [1, 3])
def test_log_likelihood_is_that_of_an_integral(components, dataset, monkeypatch):
    """A prior or posterior left out, a mean of logarithms, a sum for a mean over the codes; codes
    or images of another chunk."""
    monkeypatch.setattr(main, 'CHUNK', 25)
    images = np.uint8(255 * (dataset.test_images > 100))  # Black and white.
    with tf.Graph().as_default(), tf.Session() as session:
        args = main.parse_arguments(['--code-size', '1', '--mixture-components', str(components)])
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
        estimates, errors, negative_elbos = zip(*(
            main.log_likelihood(session, images, count, lambda: None) for count in (1, 10, 200)))
    assert estimates[0] > estimates[1] > estimates[2] > exact - .05
    assert abs(estimates[2] - exact) < .2 < negative_elbos[2] - exact
    assert estimates[0] == pytest.approx(negative_elbos[0])
    assert errors[2] == pytest.approx(np.logaddexp.reduce(log_joint, 0).std() / 60 ** .5, rel=.02)


# ---------------------------------------------------------------------------------------- Failures


@pytest.fixture
def resume(command, finished):
    """Resumes a run of which the state has the record alone, so that it is small."""
    np.savez(str(finished / 'training_state.npz'), record=json.dumps(state(finished)))
    return lambda *flags: command(finished, '--resume', *flags)


def test_refuses_to_resume_another_run(command, resume, finished, data_dir, tmp_path):
    before = listing(finished)
    for flag, *value in [('--code-size', 2), ('--batch-size', 10), ('--learning-rate', .1),
                         ('--seed', 1), ('--mixture-components', 2), ('--epochs', 2),
                         ('--training-codes', 2), ('--binarise',), ('--weight-decay', .1),
                         ('--data-dir', data_dir.parent / 'others')]:
        assert_one_line(resume(flag, *value), 'Error: %s' % flag)
    assert listing(finished) == before
    (tmp_path / 'empty').mkdir()
    assert_one_line(command(tmp_path / 'empty', '--resume'), '--resume: ', 'empty/training_state')
    assert not list((tmp_path / 'empty').iterdir())


def test_refuses_to_resume_what_is_damaged(command, finished):
    """Half a file, other content or variables, an earlier version's record, a flipped bit."""
    path, record = finished / 'training_state.npz', state(finished)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index('"history"'.encode('utf-32-le')) + 4 * (SEED % 100)] ^= 4
    contents = [b'', whole[:-50], whole[:10 ** 6], os.urandom(1000), bytes(flipped)]
    np.savez(str(path), record=np.array([record], object))
    contents.append(path.read_bytes())
    earlier = {'settings': record['settings'], 'history': []}
    for other in [[[]], [{}], [earlier], [record, ('last/encoder/mu/bias', np.zeros(3))]]:
        path.write_bytes(whole)
        write_state(finished, *other)
        contents.append(path.read_bytes())
    print('SEED=%d' % SEED)
    for content in contents:
        path.write_bytes(content)
        before = listing(finished)
        assert_one_line(command(finished, '--resume'), path, 'leave --resume out')
        assert listing(finished) == before


def test_new_run_that_fails_in_its_first_epoch_replaces_nothing(
        command, finished, tmp_path, monkeypatch):
    """And what nobody foresaw is not taken for a full disk."""
    before = listing(finished)
    assert_one_line(command(finished, '--learning-rate', 1e6), 'Error: --learning-rate: ',
                    'diverged', 'epoch 1', 'lower')
    assert_one_line(command(finished, '--data-dir', finished / 'metrics.json'), '--data-dir')
    assert_one_line(command(finished / 'metrics.json' / 'x'), '--output-dir', 'metrics.json/x')
    (tmp_path / 'logs').write_text('')
    assert_one_line(command(tmp_path), '--output-dir', 'logs')
    for error in MemoryError('Error:\nOOM'), tf.errors.ResourceExhaustedError(
            None, None, 'Error:\nOOM when allocating\n\t [[x]]'):
        monkeypatch.setattr(main, 'train_epoch', mock.Mock(side_effect=error))
        assert_one_line(command(finished), 'memory is short (OOM', '); lower --mixture-components')
    monkeypatch.setattr(main, 'train_epoch', lambda *_: open('/nowhere'))
    with pytest.raises(FileNotFoundError):
        command(finished)
    assert listing(finished) == before


def test_folder_that_is_lost_in_the_run(command, tmp_path, monkeypatch):
    """A file takes its place; TensorBoard's curves were written by then. And on a terminal an epoch
    has a bar."""
    folder, moved, save_state = tmp_path / 'folder', tmp_path / 'moved', main.save_state

    def lose(*arguments):
        save_state(*arguments)
        if len(history(folder)) == 2:
            assert points(folder, 'validation')[2] == 2
            folder.rename(moved)
            folder.write_text('in its place')
    monkeypatch.setattr(main, 'save_state', lose)
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: True)
    _, out, _ = result = command(folder)
    assert_one_line(result, folder, 'cannot be written')
    assert folder.read_text() == 'in its place' and len(history(moved)) == 2
    assert re.search('\nEpoch 1/3\n.*7/7.*\nEpoch 1/3: -ELBO .*\n', out, re.S), out


def test_disk_that_is_full_at_the_state(command, finished):
    """All is as before."""
    before = listing(finished)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10 ** 7, hard))  # Bytes of a file; the state is 24M.
    try:
        assert_one_line(command(finished), 'training_state.npz', 'cannot be written', 'large')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert listing(finished) == before


def test_model_that_cannot_be_replaced(command, default, tmp_path, monkeypatch):
    """The state is there, and the run goes on: with its own flags, not with those of an earlier run
    of which all else is still there; parts of its model stay."""
    folder = shutil.copytree(default, tmp_path / 'a [name]')
    flags = ['--epochs', 1, '--code-size', 3]
    (folder / MODEL[2]).unlink()
    (folder / MODEL[2]).mkdir()
    assert_one_line(command(folder, *flags), 'new_model.ckpt', 'cannot be written')
    assert len(history(folder)) == 1 and metrics(folder)['settings']['code_size'] == 14
    assert_one_line(command(folder, '--resume'), '--code-size')
    (folder / MODEL[2]).rmdir()
    assert command(folder, *flags, '--resume')[::2] == (0, '')
    monkeypatch.chdir(folder)  # As TensorFlow takes it for a pattern.
    reader = tf.train.load_checkpoint('new_model.ckpt')
    assert reader.get_tensor('encoder/mu/bias').shape == (3,)
    assert set(listing(folder)) == set(listing(default)) and not list(folder.glob('*.tempstate*'))


def test_file_is_replaced_when_it_is_on_the_disk(tmp_path, monkeypatch):
    """Or else, if the power fails, it is empty. And one that fails leaves nothing."""
    calls = mock.Mock(fsync=mock.Mock(wraps=os.fsync), replace=mock.Mock(wraps=os.replace))
    monkeypatch.setattr(os, 'fsync', calls.fsync)
    monkeypatch.setattr(os, 'replace', calls.replace)
    assert main.write(str(tmp_path), 'file', b'content') == str(tmp_path / 'file')
    assert [name for name, *_ in calls.mock_calls] == ['fsync', 'replace']
    (tmp_path / 'folder').mkdir()
    with pytest.raises(data.RunError):
        main.write(str(tmp_path), 'folder', b'content')
    assert {path.name for path in tmp_path.iterdir()} == {'file', 'folder'}


# -------------------------------------------------------------------------- Killed and interrupted


@pytest.mark.parametrize('error, code', [(KeyboardInterrupt, 128 + signal.SIGINT),
                                         (BrokenPipeError, 1)])
def test_ends_without_a_word(monkeypatch, capfd, error, code):
    """A traceback of Ctrl-C or of a pipe that nobody reads, there or when Python ends."""
    monkeypatch.setattr(main, 'run', mock.Mock(side_effect=error))
    assert main.main([]) == code and capfd.readouterr().err == ''
    assert error is KeyboardInterrupt or os.fstat(1).st_rdev == os.stat(os.devnull).st_rdev


def test_second_signal_does_what_it_did_before():
    """A run that cannot be ended at once."""
    came = []
    old = signal.signal(signal.SIGTERM, lambda signum, _: came.append(signum))
    with main.deferred_signals() as end_if_asked:
        end_if_asked()
        os.kill(os.getpid(), signal.SIGINT)
        assert came == []
        os.kill(os.getpid(), signal.SIGTERM)
    signal.signal(signal.SIGTERM, old)
    assert came == [signal.SIGTERM]
    with pytest.raises(main.Interrupted):
        end_if_asked()


def killed(data_dir, folder, default, worse):
    """Kills and resumes runs at random moments, in a folder with what an earlier run wrote."""
    rng = random.Random(SEED)
    print('SEED=%d' % SEED)
    folder = shutil.copytree(worse, folder / 'copy')
    before, kills, code, ours = listing(folder), 0, None, []
    while kills < KILLS or code != 0:
        run = Run(folder, '--data-dir', data_dir, *FLAGS, *['--resume'] * bool(ours))
        if kills < KILLS:
            epochs = rng.randrange(EPOCHS)
            run.wait_for(lambda: 'Model' in run.printed() and (  # noqa: B023
                run.printed().count('\nEpoch') >= epochs - len(ours)))  # noqa: B023
            time.sleep(rng.uniform(0, rng.choice([.1, .5, 2])))
            kills += run.process.poll() is None
            run.signal(signal.SIGKILL)
        code = run.finish().code
        assert run.err == '' and code in (0, -signal.SIGKILL)
        after = listing(folder)
        if after['training_state.npz'] != before['training_state.npz']:
            ours = history(folder)
        assert ours or all(after[name] == before[name] for name in before)
    assert results(folder) == results(default)
    assert set(after) == set(listing(default))


def interrupted(data_dir, folder, default, worse):
    """Before the first epoch's end, beside what an earlier run wrote; then by each signal after an
    epoch, and resumed as it says."""
    earlier, out = shutil.copytree(worse, folder / 'earlier'), folder / 'a name'
    run = Run(earlier, '--data-dir', data_dir, *FLAGS, '--batch-size', 1)
    run.wait_for(lambda: len(list(earlier.glob('logs/*/training/*'))) > 1).signal(signal.SIGTERM)
    assert run.code == 128 + signal.SIGTERM and run.err == '' and listing(earlier) == listing(worse)
    assert run.out.endswith('\nInterrupted before the end of the first epoch: nothing is saved.\n')

    arguments, last = ['--data-dir', data_dir, *FLAGS, *WORSE], len(history(worse))
    arguments += ['--output-dir', out.name]
    for epochs, signum in (1, signal.SIGINT), (last - 1, signal.SIGTERM):  # Then not the best one.
        run = Run(folder, *arguments).wait_for(lambda: len(history(out)) >= epochs)  # noqa: B023
        assert run.signal(signum).code == 128 + signum and run.err == ''
        *_, saved, go_on = run.out.splitlines()
        assert saved.startswith('Interrupted. The best model so far is in a name/new_model.ckpt')
        assert tensors(out)['global_step'] == STEPS * metrics(out)['best_epoch']
        assert len(history(out)) >= epochs
        python, script, *arguments = shlex.split(go_on.replace('Go on with: ', ''))
        assert [python, script] == [sys.executable, str(ROOT / 'main.py')]
        assert arguments.count('--resume') == 1
    samples = [matplotlib.image.imread(str(path / 'new_images.png')) for path in (out, worse)]
    np.testing.assert_allclose(*samples, atol=1.01 / 255)
    run = Run(folder, *arguments).finish()
    assert run.code == 0 and run.err == '' and results(out) == results(worse)


def interrupted_twice(data_dir, folder, default, worse):
    """In the last part of a run that goes on to one epoch more; and one that starts up, once."""
    run = Run(folder, '--data-dir', data_dir)
    maps = pathlib.Path('/proc/%d/maps' % run.process.pid)
    run.wait_for(lambda: 'tensorflow' in maps.read_text()).signal(signal.SIGINT)
    assert run.code == -signal.SIGINT and run.out + run.err == ''

    folder = shutil.copytree(default, folder / 'copy')
    run = Run(folder, '--data-dir', data_dir, *FLAGS, '--resume', '--epochs', EPOCHS + 1,
              '--importance-samples', 10 ** 5)
    run.wait_for(lambda: '\nTest (' in run.printed()).signal(signal.SIGINT, signal.SIGTERM)
    assert run.code in (128 + signal.SIGINT, -signal.SIGTERM) and run.err == ''
    assert '\nEpoch 4/4: ' in run.out
    assert history(folder)[:-1] == history(default)
    assert [len(list(path.iterdir())) for path in folder.glob('logs/*/validation')] == [2]
    assert tensors(folder)


# Restores by our own code, as the README says in words.
NETWORK = '''
from model import Network
with tf.Graph().as_default(), tf.Session() as session:
    Network().optimization(tf.placeholder(tf.float32, [None, 28, 28]), learning_rate=1e-3)
    tf.train.Saver(tf.trainable_variables() + [tf.train.get_global_step()]).restore(
        session, tf.train.latest_checkpoint('.'))
'''


def readme(data_dir, folder, default, worse):
    """Its Python code in a folder with the model alone, and `NETWORK`."""
    blocks = re.findall('```python\n(.*?)```', README, re.S)
    if tf.VERSION < '2':
        blocks = [block for block in blocks if 'TFLite' not in block]
    for i, image in enumerate(data.load(str(data_dir)).test_images):
        path = folder / 'pictures' / 'ab'[i % 2] / ('%03d.png' % i)
        path.parent.mkdir(parents=True, exist_ok=True)
        matplotlib.image.imsave(str(path), image.repeat(2, 1), cmap='gray', vmin=0, vmax=255)
    for name in ['checkpoint', *MODEL]:
        shutil.copy(str(default / name), str(folder))
    path = 'import sys; sys.path.insert(0, %r)' % str(ROOT)
    script = '\n'.join([*blocks, path, NETWORK])
    run = Run(folder, script=['-I', '-c', script]).finish()
    assert run.code == 0, run.err
    return folder


CHAINS = [interrupted, killed, readme, interrupted_twice]


@pytest.mark.parametrize('function', CHAINS, ids=lambda function: function.__name__)
def test_chain_of_runs(runs, function):
    runs[2][function].result()
