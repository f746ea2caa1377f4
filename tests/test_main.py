"""Tests of the whole command, run as a user runs it, on a small set of images that they make.

The environment variable KILLS says how often the test of `kill -9` kills: 2 times unless told; SEED
at which moments.
"""

import concurrent.futures
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
FIGURES = ['training_curves.png', 'reconstructions.png', 'latent_space.png']
PICTURES = ['new_images.png', *FIGURES]
MODEL = ['new_model.ckpt' + end for end in ('.meta', '.index', '.data-00000-of-00001')]
# A title would read it as mathematics, and be too long for it.
FOLDER = 'a$\\frac$b, a folder whose name is longer than any title of a figure'


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


def history(folder):
    """The history in the state without the seconds, which differ from run to run; empty if there is
    no state."""
    if not (folder / 'training_state.npz').exists():
        return []
    with np.load(str(folder / 'training_state.npz')) as state:
        record = json.loads(str(state['record']))
    return [{k: v for k, v in entry.items() if k != 'seconds'} for entry in record['history']]


def tensors(folder):
    """Everything in the checkpoint; raises if any of it is missing or damaged."""
    assert tf.train.latest_checkpoint(str(folder)) == str(folder / 'new_model.ckpt')
    reader = tf.train.load_checkpoint(str(folder / 'new_model.ckpt'))
    return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}


def step(folder):
    return tensors(folder)['global_step']


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


def test_prints_its_metrics_and_nothing_else(runs, dataset):
    for run in runs[:2]:
        content = metrics(run.folder)
        entries, settings, test = content['history'], content['settings'], content['test']
        name = dataset.name + ', binarised' * settings['binarise']
        lines = ['Data: %s: 220 training, 20 validation and 60 test images of 28 x 28.'
                 % dataset.name]
        lines += ['Epoch {epoch}/{0}: -ELBO {training_negative_elbo:.2f} training, '
                  '{validation_negative_elbo:.2f} validation; divergence '
                  '{validation_divergence:.2f} nats; {seconds:.1f} s'
                  .format(settings['epochs'], **entry) for entry in entries]
        test_line = ('Test (%s): -ELBO {negative_elbo:.2f} nats per image = {reconstruction:.2f} '
                     'reconstruction + {divergence:.2f} divergence (epoch {epoch} of {0})'
                     % name).format(len(entries), **test)
        if run is runs[1]:
            lines += ['No better validation ELBO in 2 epochs (--patience): training ends.',
                      test_line,
                      'Test, binarised: -log p(x) {negative_log_likelihood:.2f} nats per image '
                      '(standard error {standard_error:.2f}) from 4 codes each; -ELBO '
                      '{binarised_negative_elbo:.2f}'.format(**test)]
        else:
            lines += [test_line]
        lines = list(map(re.escape, lines)) + ['Wrote .+', r'Done in \d+ s\.']
        lines.insert(1, r'Model: \d,\d{3},\d{3} parameters\.')
        assert re.fullmatch('\n'.join(lines) + '\n', run.out) and run.err == '', run.out
        assert content['versions']['tensorflow'] == tf.VERSION and settings['batch_size'] == 32
        assert content['test']['epoch'] == content['best_epoch']
    first, *_, last = metrics(runs[0].folder)['history']
    assert last['training_negative_elbo'] < first['training_negative_elbo'] - 5


def test_writes_what_it_says(runs, default):
    files = {'checkpoint', 'training_state.npz', 'metrics.json', *PICTURES}
    assert {path.name for path in default.iterdir()} == {'logs', *MODEL, *files}
    wrote = re.search('^Wrote (.*)$', runs[0].out, re.M).group(1).split(', ')
    assert {re.sub('^out/', '', path) for path in wrote} == {
        metrics(default)['log_dir'], 'new_model.ckpt.*', *files}


def test_stops_after_the_best_epoch_and_keeps_it(worse):
    elbos = [entry['validation_negative_elbo'] for entry in history(worse)]
    best = 1 + elbos.index(min(elbos))
    assert metrics(worse)['best_epoch'] == best == len(elbos) - 2  # The patience is 2.
    assert step(worse) == STEPS * best


def test_tensorboard(default):
    """A curve under another's name, a step size that does not rise and fall."""
    for kind in 'training', 'validation':
        path, = default.glob('logs/*/%s/*' % kind)
        events = list(tf.train.summary_iterator(str(path)))
        assert sum(bool(event.graph_def) for event in events) == (kind == 'training')
        points = [(event.step, value) for event in events for value in event.summary.value]
        values = {tag: np.array([(step, v.simple_value) for step, v in points if v.tag == tag])
                  for tag in ('negative_ELBO', 'reconstruction', 'divergence', 'learning_rate')}
        elbos, *parts, rates = (series[:, 1] for series in values.values())
        np.testing.assert_allclose(elbos, sum(parts), rtol=1e-5)
    np.testing.assert_allclose(values['negative_ELBO'], [
        (STEPS * e['epoch'], e['validation_negative_elbo']) for e in history(default)], rtol=1e-6)
    np.testing.assert_allclose(parts[1], [e['validation_divergence'] for e in history(default)],
                               rtol=1e-6)
    # Of steps 7, 14 and 21, each in its middle; the peak is at a fifth of them, at 4.2.
    np.testing.assert_allclose(rates, [.01 * (21 - step + .5) / 16.8 for step in (7, 14, 21)],
                               rtol=1e-5)
    assert main.learning_rate(1, 21, .01) == pytest.approx(.01 * 1.5 / 4.2)
    pictures = {v.image.encoded_image_string for _, v in points if v.tag == 'samples'}
    assert len(pictures) == EPOCHS and all(p.startswith(b'\x89PNG') for p in pictures)


def test_flags(command, tmp_path, capfd):
    def ends(*flags):
        with pytest.raises(SystemExit) as error:
            command(tmp_path, *flags)
        return (error.value.code, *capfd.readouterr())
    for flag, value in [('--epochs', -1), ('--batch-size', 0), ('--code-size', 'x'),
                        ('--learning-rate', 'nan'), ('--nonsense', 1), ('--seed', .5)]:
        code, out, err = ends(flag, value)
        assert code == 2 and out == '' and re.fullmatch('.*error: .*%s.*\n' % flag, err)
    code, out, err = ends('--help')
    assert code == 0 and err == '' and not list(tmp_path.iterdir())
    flags = re.findall(r'^  (--[a-z-]+)(.*?)(?=^  -|\Z)', out, re.M | re.S)
    assert {flag for flag, _ in flags} == {'--resume', *(
        '--' + name.replace('_', '-') for name in vars(main.parse_arguments([])))}
    assert all('(default: ' in ' '.join(text.split()) for _, text in flags)


def test_each_epoch_has_its_own_order_and_noise(command, tmp_path, monkeypatch):
    """Those of epoch 1 or of seed 0 again, images of another part, validation as for training."""
    asked = []
    monkeypatch.setattr(main, 'report', lambda *_: None)

    def spy(name, function):
        monkeypatch.setattr(data, name, lambda images, *seed: asked.append(
            (name, len(images), *seed)) or function(images, *seed))
    spy('batches', data.batches)
    spy('binarise', data.binarise)
    assert command(tmp_path, '--seed', 5, '--batch-size', 110, '--binarise', '--epochs', 2)[0] == 0
    assert asked == [('binarise', 20, 1), ('binarise', 60, 0)] + [
        entry for epoch in (1, 2) for entry in [
            ('batches', 220, 110, 5, epoch), ('binarise', 110, 5, epoch, 0),
            ('binarise', 110, 5, epoch, 1)]]


# ------------------------------------------------------------------------- Checkpoint and pictures

# Uses the checkpoint of the current folder by the public names alone.
RESTORE = '''
import numpy as np
import tensorflow.compat.v1 as tf
images = np.load('images.npy')
with tf.Graph().as_default(), tf.Session() as session:
    tf.train.import_meta_graph('new_model.ckpt.meta').restore(session, 'new_model.ckpt')
    names = ['elbo', 'divergence', 'mu', 'sigma', 'code', 'reconstruction', 'samples']
    result = {n: session.run(n + ':0', {'images:0': images}) for n in names}
    result['decoded'] = session.run('reconstruction:0', {'code:0': result['code']})
    result['three'] = session.run('samples:0', {'num_samples:0': 3})
    elbo, images_in = map(session.graph.get_tensor_by_name, ['elbo:0', 'images:0'])
    result['slope'] = session.run(tf.gradients(elbo, images_in)[0], {'images:0': images})
np.savez('result.npz', **result)
'''


@pytest.fixture(scope='module')
def elsewhere(runs, dataset, tmp_path_factory):
    """The folder in which a process that knows nothing of ours has run the README's Python code, of
    which the last block may import ours, and `RESTORE`."""
    folder = tmp_path_factory.mktemp('elsewhere')
    *blocks, last = re.findall('```python\n(.*?)```', (ROOT / 'README.md').read_text(), re.S)
    if tf.VERSION < '2':
        blocks = [block for block in blocks if 'TFLite' not in block]
    np.save(str(folder / 'images.npy'), data.to_float(dataset.test_images))
    for i, image in enumerate(dataset.test_images):
        path = folder / 'pictures' / 'ab'[i % 2] / ('%03d.png' % i)
        path.parent.mkdir(parents=True, exist_ok=True)
        matplotlib.image.imsave(str(path), image.repeat(2, 1), cmap='gray', vmin=0, vmax=255)
    for name in ['checkpoint', *MODEL]:
        shutil.copy(str(runs[0].folder / name), str(folder))
    path = 'import sys; sys.path.insert(0, %r)' % str(ROOT)
    script = '\n'.join([*blocks, 'tf.reset_default_graph()', RESTORE, path, last])
    run = Run(folder, script=['-I', '-c', script]).finish()
    assert run.code == 0, run.err
    return folder


@pytest.fixture
def restored(elsewhere):
    with np.load(str(elsewhere / 'result.npz')) as arrays:
        return dict(arrays)


@pytest.fixture
def session(request, default):
    """A session with the model of the default run."""
    with tf.Graph().as_default(), tf.Session() as session:
        tf.train.import_meta_graph(str(default / MODEL[0])).restore(
            session, str(default / 'new_model.ckpt'))
        yield session


def test_restores_with_nothing_of_ours(default, restored):
    test = metrics(default)['test']
    assert -restored['elbo'] == pytest.approx(test['negative_elbo'], rel=1e-5)
    mu, sigma = restored['mu'], restored['sigma']
    np.testing.assert_allclose(
        restored['divergence'], .5 * (mu ** 2 + sigma ** 2 - 1).sum(1) - np.log(sigma).sum(1),
        rtol=1e-4)
    assert restored['divergence'].mean() == pytest.approx(test['divergence'], rel=1e-5)
    np.testing.assert_allclose(restored['decoded'], restored['reconstruction'], atol=1e-6)
    assert restored['samples'].shape == (100, 28, 28) and restored['three'].shape == (3, 28, 28)
    assert restored['slope'].shape == mu.shape[:1] + (28, 28) and restored['slope'].any()


def test_what_the_readme_makes(elsewhere, dataset, session):
    """Pictures turned or stretched otherwise, labels of others; exports that decode otherwise."""
    mine = data.load(str(elsewhere / 'mine.npz'))
    images = np.concatenate([mine.validation_images, mine.train_images, mine.test_images])
    order = np.argsort(np.arange(60) % 2, kind='stable')  # Of `pictures/a`, then of `pictures/b`.
    test = np.random.RandomState(0).rand(60) < .1
    order = np.concatenate([order[~test], order[test]])
    assert abs(images - dataset.test_images[order].astype(float)).mean() < 1
    np.testing.assert_array_equal(mine.test_labels, order[-test.sum():] % 2)

    codes = np.float32(np.random.RandomState(0).randn(3, 14))
    expected = session.run('reconstruction:0', {'code:0': codes})
    with tf.Graph().as_default(), tf.Session() as other:
        signature = tf.saved_model.load(other, ['serve'], str(elsewhere / 'decoder')).signature_def[
            'serving_default']
        code, images = signature.inputs['code'].name, signature.outputs['images'].name
        decoded = other.run(images, {code: codes})
    np.testing.assert_allclose(decoded, expected, atol=1e-6)
    if tf.VERSION >= '2':
        interpreter = tf.lite.Interpreter(str(elsewhere / 'decoder.tflite'))
        (given,), (gets,) = interpreter.get_input_details(), interpreter.get_output_details()
        interpreter.resize_tensor_input(given['index'], codes.shape)
        interpreter.allocate_tensors()
        interpreter.set_tensor(given['index'], codes)
        interpreter.invoke()
        np.testing.assert_allclose(interpreter.get_tensor(gets['index']), expected, atol=1e-5)


def test_best_epoch_is_chosen_by_the_validation_images(default, session, dataset):
    """Those of the test set, or images to train on, in their place."""
    entry = history(default)[metrics(default)['best_epoch'] - 1]
    elbo = session.run('elbo:0', {'images:0': data.to_float(dataset.validation_images)})
    assert -elbo == pytest.approx(entry['validation_negative_elbo'], rel=1e-5)


def test_checkpoint_is_as_small_as_its_weights(default):
    content = tensors(default)
    assert content.pop('global_step') == STEPS * metrics(default)['best_epoch']
    assert {name.split('/')[0] for name in content} == {'encoder', 'decoder'}
    size = (default / MODEL[2]).stat().st_size
    assert size < 1.01 * sum(array.nbytes for array in content.values())


def test_graph_can_be_read_by_the_other_tensorflow(default):
    """Marks of a newer TensorFlow's gradients, or operations that 1.14 cannot differentiate."""
    meta_graph = tf.MetaGraphDef.FromString((default / MODEL[0]).read_bytes())
    for node in meta_graph.graph_def.node:
        assert not {'grad_a', 'grad_b', '_gradient_op_type'}.intersection(node.attr), node.name
        assert not re.search('Random.*V2|AddV2', node.op), node.name


def test_restored_graph_is_saved_exported_and_trained_on(session, dataset, tmp_path):
    """Variables that the graph lists and the checkpoint does not have; operations without gradient.
    """
    assert len(session.run(tf.report_uninitialized_variables())) == 0
    names = ['images', 'mu', 'sigma', 'code', 'reconstruction', 'num_samples', 'samples']
    tensor = {name: session.graph.get_tensor_by_name(name + ':0') for name in names}
    images = data.to_float(dataset.test_images)
    feeds = {'images:0': images, 'num_samples:0': 3}
    expected = session.run(tensor, feeds)

    tf.train.Saver().save(session, str(tmp_path / 'again'))
    path = tmp_path / 'saved'
    builder = tf.saved_model.builder.SavedModelBuilder(str(path))
    signature = tf.saved_model.predict_signature_def
    builder.add_meta_graph_and_variables(session, ['serve'], {
        'encode': signature({'images': tensor['images']}, {'mu': tensor['mu']}),
        'decode': signature({'code': tensor['code']}, {'images': tensor['reconstruction']}),
        'sample': signature({'n': tensor['num_samples']}, {'images': tensor['samples']})})
    builder.save()
    with tf.Graph().as_default(), tf.Session() as other:
        tf.train.import_meta_graph(str(tmp_path / 'again.meta')).restore(
            other, str(tmp_path / 'again'))
        np.testing.assert_equal(other.run({n: n + ':0' for n in names}, feeds), expected)
    with tf.Graph().as_default(), tf.Session() as other:
        signatures = tf.saved_model.load(other, ['serve'], str(path)).signature_def
        for key, value, fed, fetched in [('encode', images, 'images', 'mu'),
                                         ('decode', expected['code'], 'code', 'reconstruction'),
                                         ('sample', 3, 'num_samples', 'samples')]:
            (given, gets), = zip([*signatures[key].inputs.values()],
                                 [*signatures[key].outputs.values()])
            assert given.name == fed + ':0'
            np.testing.assert_allclose(other.run(gets.name, {given.name: value}),
                                       expected[fetched], atol=1e-6)

    elbo = session.graph.get_tensor_by_name('elbo:0')
    optimize = tf.train.GradientDescentOptimizer(1e-4).minimize(
        -elbo, var_list=tf.trainable_variables())
    before, _ = session.run([elbo, optimize], feeds), session.run(optimize, feeds)
    assert session.run(elbo, feeds) > before[0]


def test_grid_shows_the_samples(default, restored):
    expected = np.ones([10 * 116, 10 * 116])  # White; each pixel of a sample is 4 x 4 pixels.
    for i, sample in enumerate(restored['samples']):
        y, x = 116 * (i // 10), 116 * (i % 10)
        expected[y:y + 112, x:x + 112] = np.kron(sample, np.ones([4, 4]))
    image = matplotlib.image.imread(str(default / 'new_images.png'))[..., :3]
    np.testing.assert_allclose(image, expected[:-4, :-4, None].repeat(3, 2), atol=2 / 255)


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn from now on, in the order of `FIGURES`."""
    figures, make = [], main.figure_png
    monkeypatch.setattr(main, 'figure_png', lambda figure: figures.append(figure) or make(figure))
    return figures


def tiles(axes, height=28, width=28):
    """The images of a mosaic, `[rows, columns, height, width]`."""
    image = np.pad(axes.images[0].get_array(), [(0, 1), (0, 1)], 'constant')
    shape = [len(image) // (height + 1), height + 1, image.shape[1] // (width + 1), width + 1]
    return image.reshape(shape).swapaxes(1, 2)[:, :, :height, :width]


def assert_legible(figure):
    """No title or legend is cut off, or lies on that of its neighbour."""
    texts = [axes.title for axes in figure.axes]
    boxes = [text.get_window_extent() for text in texts + [
        axes.get_legend() for axes in figure.axes if axes.get_legend()]]
    for box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0
        assert box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
    for left, right in zip(boxes[:len(texts)], boxes[1:len(texts)]):
        assert left.x1 < right.x0


def test_pictures_show_what_they_say(command, finished, session, dataset, figures):
    """Images beside others' reconstructions, curves of one series twice, points of other classes,
    interpolations that start or end elsewhere."""
    assert command(finished, '--resume')[0] == 0
    curves, reconstructions, latent_space = figures
    for axes, key in zip(curves.axes, ['negative_elbo', 'divergence']):
        lines = {line.get_label(): line for line in axes.lines}
        for kind in 'training', 'validation':
            np.testing.assert_allclose(lines[kind].get_xydata().T, [
                range(1, EPOCHS + 1), [e['%s_%s' % (kind, key)] for e in history(finished)]])
        assert 'best epoch (%d)' % metrics(finished)['best_epoch'] in lines

    labels, images = dataset.test_labels, data.to_float(dataset.test_images)
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
    """A grid that is turned or not where the codes are; crosses that are not the prior's means."""
    folder = shutil.copytree(worse, tmp_path / 'copy')
    assert command(folder, *WORSE, '--resume')[0] == 0
    plane, scatter = figures[2].axes
    with tf.Graph().as_default(), tf.Session() as session:
        tf.train.import_meta_graph(str(worse / MODEL[0])).restore(
            session, str(worse / 'new_model.ckpt'))
        images = data.to_float(data.binarise(dataset.test_images, main.TEST_SEED))
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
    assert float(plane.get_xticklabels()[1].get_text()) == pytest.approx(
        np.percentile(codes[:, 0], 17.5), abs=.06)


@pytest.mark.parametrize('classes', [1, 30])
def test_other_sizes_and_classes(command, tmp_path, figures, classes):
    """Sizes written into the code; classes missing in silence, and those that are not there."""
    rng = np.random.RandomState(0)
    labels = np.sort(5 + (np.arange(200) % 40).clip(max=classes - 1))  # The last is the largest.
    images = blobs(labels, rng, 20, 12)
    arrays = dict(x_train=images, x_test=images, y_train=labels, y_test=labels)
    if classes == 1:
        del arrays['y_train'], arrays['y_test']
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
        assert legend is None and not ticks and len(rows) == 20
        np.testing.assert_allclose(rows[0], data.to_float(images[:10]), atol=1e-6)
    else:
        shown = [str(label) for label in [*range(5, 30), 34]]  # Of equal ones the first.
        assert [text.get_text() for text in legend.get_texts()] == shown == ticks
        for axes in reconstructions.axes[0], latent_space.axes[0]:
            assert axes.get_title().endswith(', the 26 largest of 30 classes)')
        np.testing.assert_allclose(rows[-2], data.to_float(images[labels == 34][:10]), atol=1e-6)
        assert command(tmp_path / 'out', '--data-dir', tmp_path / 'mine.npz', '--resume',
                       '--epochs', 1)[0] == 0


def test_long_names_are_legible(command, default, tmp_path, figures):
    folder = shutil.copytree(default, tmp_path / 'copy')
    assert command(folder, '--resume')[0] == 0
    for figure in figures:
        assert_legible(figure)
        assert r'a\$\frac\$b' in figure.axes[0].get_title()


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
def test_log_likelihood_is_that_of_an_integral(components, dataset):
    """A prior or posterior left out, a mean of logarithms, a sum for a mean over the codes."""
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
    assert abs(estimates[2] - exact) < .1 < negative_elbos[2] - exact
    assert estimates[0] == pytest.approx(negative_elbos[0])
    assert errors[2] == pytest.approx(np.logaddexp.reduce(log_joint, 0).std() / 60 ** .5, rel=.02)


# ---------------------------------------------------------------------------------------- Failures


def test_refuses_to_resume_another_run(command, finished, data_dir, tmp_path):
    before = listing(finished)
    for flag, value in [('--code-size', 2), ('--batch-size', 10), ('--learning-rate', .1),
                        ('--seed', 1), ('--mixture-components', 2), ('--epochs', 2),
                        ('--data-dir', data_dir.parent / 'others')]:
        assert_one_line(command(finished, '--resume', flag, value), 'Error: %s' % flag)
    assert_one_line(command(finished, '--resume', '--binarise'), 'Error: --binarise')
    assert listing(finished) == before
    (tmp_path / 'empty').mkdir()
    assert_one_line(command(tmp_path / 'empty', '--resume'), '--resume: ', 'empty/training_state')
    assert not list((tmp_path / 'empty').iterdir())


def test_refuses_to_resume_what_is_damaged(command, finished):
    """Half a file, other content or variables, an earlier version's record, a flipped bit."""
    path = finished / 'training_state.npz'
    whole = path.read_bytes()
    with np.load(str(path)) as state:
        arrays = dict(state)
    record = json.loads(str(arrays.pop('record')))

    def written(record, **changes):
        np.savez(str(path), record=record, **dict(arrays, **changes))
        return path.read_bytes()
    flipped = bytearray(whole)
    flipped[random.Random(SEED).randrange(len(whole) // 10, len(whole) * 9 // 10)] ^= 4
    print('SEED=%d' % SEED)
    for content in [b'', whole[:-50], whole[:10 ** 6], os.urandom(1000), bytes(flipped),
                    written('[]'), written('{}'), written(np.array([record], object)),
                    written(json.dumps({'settings': record['settings'], 'history': []})),
                    written(json.dumps(record), **{'last/encoder/mu/bias': np.zeros(3)})]:
        path.write_bytes(content)
        before = listing(finished)
        assert_one_line(command(finished, '--resume'), path, 'leave --resume out')
        assert listing(finished) == before


def test_new_run_that_fails_in_its_first_epoch_replaces_nothing(command, finished, monkeypatch):
    before = listing(finished)
    assert_one_line(command(finished, '--learning-rate', 1e6), 'Error: --learning-rate: ',
                    'diverged', 'epoch 1', 'lower')
    assert_one_line(command(finished, '--data-dir', finished / 'metrics.json'), '--data-dir')
    assert_one_line(command(finished / 'metrics.json' / 'x'), '--output-dir', 'metrics.json/x')

    def train_epoch(*_):
        raise tf.errors.ResourceExhaustedError(None, None, 'Error:\nOOM when allocating\n\t [[x]]')
    monkeypatch.setattr(main, 'train_epoch', train_epoch)
    assert_one_line(command(finished), 'memory is short', 'OOM', '--mixture-components')
    assert listing(finished) == before


def test_bug_shows_its_traceback(command, tmp_path, monkeypatch):
    """What nobody foresaw is not taken for a full disk."""
    monkeypatch.setattr(main, 'train_epoch', lambda *_: open('/nowhere'))
    with pytest.raises(FileNotFoundError):
        command(tmp_path)


def test_folder_that_is_lost_in_the_run(command, tmp_path, monkeypatch):
    """A file takes its place. And on a terminal an epoch has a bar."""
    folder, moved = tmp_path / 'folder', tmp_path / 'moved'

    def lose(*_):
        folder.rename(moved)
        folder.write_text('in its place')
        return b''
    monkeypatch.setattr(main, 'curves_png', lose)
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: True)
    _, out, _ = result = command(folder)
    assert_one_line(result, folder, 'cannot be written')
    assert folder.read_text() == 'in its place' and len(history(moved)) == 1
    assert step(moved) == STEPS
    assert re.search('\nEpoch 1/3\n.*7/7.*\nEpoch 1/3: -ELBO .*\n', out, re.S), out


def test_disk_that_is_full(command, finished, tmp_path):
    """At the state, where all is as before; and at the model, whose file cannot be replaced: the
    state is there, and the run goes on."""
    before = listing(finished)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10 ** 7, hard))  # Bytes of a file; the state is 24M.
    try:
        assert_one_line(command(finished), 'training_state.npz', 'cannot be written', 'large')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert listing(finished) == before
    block = tmp_path / 'out' / MODEL[2]
    block.mkdir(parents=True)
    assert_one_line(command(tmp_path / 'out', '--epochs', 1), 'new_model.ckpt', 'cannot be written')
    assert len(history(tmp_path / 'out')) == 1 and not (tmp_path / 'out' / 'metrics.json').exists()
    block.rmdir()
    assert command(tmp_path / 'out', '--epochs', 1, '--resume')[::2] == (0, '')
    assert step(tmp_path / 'out') == STEPS and not list(tmp_path.glob('out/*.tempstate*'))
    (tmp_path / 'name').mkdir()
    with pytest.raises(data.RunError):
        main.write(str(tmp_path), 'name', b'content')
    assert {path.name for path in tmp_path.iterdir()} == {'finished', 'out', 'name'}


# -------------------------------------------------------------------------- Killed and interrupted


def test_new_run_killed_before_what_is_derived_is_the_run_that_is_resumed(
        command, finished, monkeypatch):
    """The flags of an earlier run, of which all but the state is still there, are not its own."""
    flags = ['--epochs', 1, '--code-size', 3]
    with monkeypatch.context() as context, pytest.raises(ZeroDivisionError):
        context.setattr(main, 'save_model', lambda *_: 1 / 0)
        command(finished, *flags)
    assert metrics(finished)['settings']['code_size'] == 14
    assert_one_line(command(finished, '--resume'), '--code-size')
    assert command(finished, *flags, '--resume')[0] == 0
    assert tensors(finished)['encoder/mu/bias'].shape == (3,)


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

    arguments = ['--data-dir', data_dir, *FLAGS, '--output-dir', out.name]
    for epochs, signum in (1, signal.SIGINT), (2, signal.SIGTERM):
        run = Run(folder, *arguments).wait_for(lambda: len(history(out)) >= epochs)  # noqa: B023
        assert run.signal(signum).code == 128 + signum and run.err == ''
        *_, saved, go_on = run.out.splitlines()
        assert saved.startswith('Interrupted. The best model so far is in a name/new_model.ckpt')
        assert step(out) == STEPS * metrics(out)['best_epoch']
        assert (out / 'new_images.png').exists() and len(history(out)) >= epochs
        python, script, *arguments = shlex.split(go_on.replace('Go on with: ', ''))
        assert [python, script] == [sys.executable, str(ROOT / 'main.py')]
        assert arguments.count('--resume') == 1
    run = Run(folder, *arguments).finish()
    assert run.code == 0 and run.err == '' and results(out) == results(default)


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


def resumed_after_the_end(data_dir, folder, default, worse):
    """All that is derived is written anew, an earlier log p(x) is kept, and it says why it does not
    train on."""
    folder = shutil.copytree(worse, folder / 'copy')
    for name in [*MODEL, *PICTURES, 'metrics.json']:
        (folder / name).unlink()
    flags = [*FLAGS, *WORSE, '--importance-samples', '0', '--epochs', '60']
    run = Run(folder, '--data-dir', data_dir, *flags, '--resume').finish()
    assert run.code == 0 and run.err == '' and '\nEpoch' not in run.out
    assert '\nNo better validation ELBO in 2 epochs (--patience)' in run.out
    assert 'Test (images in a$' in run.out
    assert results(folder) == results(worse) and set(listing(folder)) == set(listing(worse))


CHAINS = [interrupted, killed, interrupted_twice, resumed_after_the_end]


@pytest.mark.parametrize('function', CHAINS, ids=lambda function: function.__name__)
def test_chain_of_runs(runs, function):
    runs[2][function].result()


def test_interrupted_when_the_best_epoch_is_not_the_last(command, worse, tmp_path, monkeypatch):
    folder = shutil.copytree(worse, tmp_path / 'copy')
    (folder / 'new_images.png').unlink()

    def batches(images, *_):
        yield images[:32]
        os.kill(os.getpid(), signal.SIGINT)
        yield images[:32]
    monkeypatch.setattr(data, 'batches', batches)
    code, out, err = command(folder, *WORSE, '--patience', 9, '--resume')
    assert code == 128 + signal.SIGINT and err == '' and '\nGo on with: ' in out
    assert history(folder) == history(worse)
    np.testing.assert_equal(tensors(folder), tensors(worse))
    pictures = [matplotlib.image.imread(str(path / 'new_images.png')) for path in (folder, worse)]
    np.testing.assert_allclose(*pictures, atol=1.01 / 255)
