"""Tests of the whole command, run as a user runs it, on a small set of images that they make.

The environment variable KILLS says how often the test of `kill -9` kills: 2 times unless told.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import random
import re
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
EPOCHS, STEPS = 3, 7  # Of `FLAGS`; the set has 220 images to train on.
FLAGS = ['--epochs', str(EPOCHS), '--batch-size', '32']
# A run with all else that there is; it soon gets worse, so that its best epoch is not its last one.
WORSE = ['--code-size', '2', '--learning-rate', '.1', '--epochs', '20', '--patience', '2',
         '--mixture-components', '3', '--importance-samples', '4']
PICTURES = ['new_images.png', 'training_curves.png', 'reconstructions.png', 'latent_space.png']
ENDS = ['.index', '.data-00000-of-00001']  # Of the names of a checkpoint's files.

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


def write_set(folder, seed, train=240, test=60):
    """Writes smooth blobs, the place of each depending on its label."""
    folder.mkdir()
    rng = np.random.RandomState(seed)
    y, x = np.mgrid[:28, :28]
    for kind, count in ('train', train), ('t10k', test):
        labels = rng.permutation(np.arange(count) % 10).astype(np.uint8)
        place = 14 + 14j + 7 * np.exp(.2j * np.pi * labels) + rng.randn(2, count).T.dot([1, 1j])
        distance = np.abs(x + 1j * y - place[:, None, None])
        images = np.uint8(255 * np.exp(-distance ** 2 / 18))
        (folder / (kind + '-images-idx3-ubyte')).write_bytes(
            struct.pack('>4I', 2051, count, 28, 28) + images.tobytes())
        (folder / (kind + '-labels-idx1-ubyte')).write_bytes(
            struct.pack('>2I', 2049, count) + labels.tobytes())
    return images


def metrics(folder):
    return json.loads((folder / 'metrics.json').read_text())


def history(folder):
    """The history without the seconds, which differ from run to run; empty if there is none."""
    if not (folder / 'metrics.json').exists():
        return []
    return [{k: v for k, v in entry.items() if k != 'seconds'}
            for entry in metrics(folder)['history']]


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
    return weights, pictures, history(folder), metrics(folder)['test']


def listing(folder):
    """The content of each file that a run leaves, but for the logs, of which each has its own, and
    for what TensorFlow's savers leave when they fail or are killed."""
    return {path.name: path.read_bytes() for path in folder.iterdir()
            if path.is_file() and '.tempstate' not in path.name}


# ------------------------------------------------------------------------------------------- Runs


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data')
    images = write_set(folder / 'blobs', 0)
    write_set(folder / 'others', 1)
    np.save(str(folder / 'images.npy'), images / np.float32(255))
    return folder / 'blobs'


@pytest.fixture(scope='module')
def runs(data_dir, tmp_path_factory):
    """Two finished runs, the default one and the worse one. Each has its folder as `folder`."""
    runs = []
    for name, flags in ('default', []), ('worse', WORSE):
        folder = tmp_path_factory.mktemp(name)
        runs.append(Run(folder, '--data-dir', data_dir, '--output-dir', 'out', *FLAGS, *flags))
        runs[-1].folder = folder / 'out'
    for run in runs:
        assert run.finish().code == 0, run.out + run.err
    return runs


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


@pytest.fixture(scope='module', autouse=True)
def background(request, runs, data_dir, tmp_path_factory):
    """What takes several runs, two at a time while other tests go on: futures by function."""
    folders = [run.folder for run in runs]
    with concurrent.futures.ThreadPoolExecutor(2) as executor:
        yield {function: executor.submit(function, data_dir, tmp_path_factory.mktemp('x'), *folders)
               for function in IN_BACKGROUND
               if any(function.__name__ in item.name for item in request.session.items)}


@pytest.fixture
def command(data_dir, monkeypatch, capfd):
    """Runs the command in this process, which takes less time: `(exit code, stdout, stderr)`."""
    def run(folder, *flags):
        monkeypatch.setattr(sys, 'argv', list(map(str, [
            'main.py', '--data-dir', data_dir, '--output-dir', folder, *FLAGS, *flags])))
        with tf.Graph().as_default():
            code = main.main()
        return (code, *capfd.readouterr())
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def assert_one_line(result, *parts):
    """The run failed with one line that contains these parts."""
    code, _, err = result
    assert code == 1 and re.fullmatch('Error: .{,400}\n', err), err
    for part in parts:
        assert str(part) in err


# ----------------------------------------------------------------------- What it prints and writes


def test_prints_its_metrics_and_nothing_else(runs, data_dir):
    for run in runs:
        content = metrics(run.folder)
        history, settings, test = content['history'], content['settings'], content['test']
        lines = ['Data: IDX files in %s: 220 training, 20 validation and 60 test images.'
                 % data_dir]
        lines += ['Epoch {epoch}/{0}: -ELBO {training_negative_elbo:.2f} training, '
                  '{validation_negative_elbo:.2f} validation; divergence '
                  '{validation_divergence:.2f} nats; {seconds:.1f} s'
                  .format(settings['epochs'], **entry) for entry in history]
        lines.append('Test: -ELBO {negative_elbo:.2f} nats per image = {reconstruction:.2f} '
                     'reconstruction + {divergence:.2f} divergence (epoch {0} of {1})'
                     .format(content['best_epoch'], len(history), **test))
        if run is runs[1]:
            lines.append('Test, binarised: -log p(x) {negative_log_likelihood:.2f} nats per image '
                         '(standard error {standard_error:.2f}) from 4 codes each; -ELBO '
                         '{binarised_negative_elbo:.2f}'.format(**test))
        lines = list(map(re.escape, lines)) + ['Wrote .+', r'Done in \d+ s\.']
        lines.insert(1, r'Model: \d,\d{3},\d{3} parameters\.')
        assert re.fullmatch('\n'.join(lines) + '\n', run.out) and run.err == '', run.out
        assert content['versions']['tensorflow'] == tf.VERSION and settings['batch_size'] == 32
    first, *_, last = metrics(runs[0].folder)['history']
    assert last['training_negative_elbo'] < first['training_negative_elbo'] - 5


def test_writes_what_it_says(runs, default):
    assert {path.name for path in default.iterdir()} == {
        'checkpoint', 'new_model.ckpt.meta', 'training_state', 'metrics.json', 'logs', *PICTURES,
        *('%s%s' % (prefix, end) for prefix in (
            'new_model.ckpt', 'training_state-2', 'training_state-3') for end in ENDS)}
    wrote = re.search('^Wrote (.*)$', runs[0].out, re.M).group(1).split(', ')
    assert {re.sub('^out/', '', path) for path in wrote} == {
        'metrics.json', *PICTURES, metrics(default)['log_dir'],
        'new_model.ckpt.*', 'checkpoint', 'training_state*'}


def test_stops_after_the_best_epoch_and_keeps_it(worse):
    elbos = [entry['validation_negative_elbo'] for entry in history(worse)]
    best = 1 + elbos.index(min(elbos))
    assert metrics(worse)['best_epoch'] == best == len(elbos) - 2  # The patience is 2.
    assert step(worse) == STEPS * best


def test_tensorboard(default):
    for kind in 'training', 'validation':
        path, = default.glob('logs/*/%s/*' % kind)
        events = list(tf.train.summary_iterator(str(path)))
        assert sum(bool(event.graph_def) for event in events) == (kind == 'training')
        points = [(event.step, value) for event in events for value in event.summary.value]
        values = {tag: np.array([(step, v.simple_value) for step, v in points if v.tag == tag])
                  for tag in ('negative_ELBO', 'reconstruction', 'divergence', 'learning_rate')}
        elbos, *parts, _ = (series[:, 1] for series in values.values())
        np.testing.assert_allclose(elbos, sum(parts), rtol=1e-5)
    np.testing.assert_allclose(values['negative_ELBO'], [
        (STEPS * e['epoch'], e['validation_negative_elbo']) for e in history(default)], rtol=1e-6)
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


# ------------------------------------------------------------------------- Checkpoint and pictures


@pytest.fixture(scope='module')
def restored(runs, data_dir, tmp_path_factory):
    """What becomes of the checkpoint in a process that knows nothing of ours: the arrays of
    `RESTORE`. It runs the README's Python code, too, of which all but the first block may import
    our code."""
    folder = tmp_path_factory.mktemp('elsewhere')
    first, *others = re.findall('```python\n(.*?)```', (ROOT / 'README.md').read_text(), re.S)
    for file in [data_dir.parent / 'images.npy', runs[0].folder / 'checkpoint',
                 *runs[0].folder.glob('new_model.ckpt.*')]:
        shutil.copy(str(file), str(folder))
    path = 'import sys; sys.path.insert(0, %r)' % str(ROOT)
    script = '\ntf.reset_default_graph()\n'.join([first, RESTORE, path, *others])
    run = Run(folder, script=['-I', '-c', script]).finish()
    assert run.code == 0, run.err
    with np.load(str(folder / 'result.npz')) as arrays:
        return dict(arrays)


def test_restores_with_nothing_of_ours(default, restored):
    test = metrics(default)['test']
    assert abs(-restored['elbo'] - test['negative_elbo']) < .1
    mu, sigma = restored['mu'], restored['sigma']
    np.testing.assert_allclose(
        restored['divergence'], .5 * (mu ** 2 + sigma ** 2 - 1).sum(1) - np.log(sigma).sum(1),
        rtol=1e-4)
    assert abs(restored['divergence'].mean() - test['divergence']) < .01
    np.testing.assert_allclose(restored['decoded'], restored['reconstruction'], atol=1e-6)
    assert restored['samples'].shape == (100, 28, 28) and restored['three'].shape == (3, 28, 28)
    assert restored['slope'].shape == mu.shape[:1] + (28, 28) and restored['slope'].any()


def test_checkpoint_is_as_small_as_its_weights(default):
    content = tensors(default)
    assert content.pop('global_step') == STEPS * metrics(default)['best_epoch']
    assert {name.split('/')[0] for name in content} == {'encoder', 'decoder'}
    size = (default / ('new_model.ckpt' + ENDS[1])).stat().st_size
    assert size < 1.01 * sum(array.nbytes for array in content.values())


def test_graph_can_be_read_by_the_other_tensorflow(default):
    """Marks of a newer TensorFlow's gradients, or its own random operations, in the graph."""
    meta_graph = tf.MetaGraphDef.FromString((default / 'new_model.ckpt.meta').read_bytes())
    for node in meta_graph.graph_def.node:
        assert not {'grad_a', 'grad_b', '_gradient_op_type'}.intersection(node.attr), node.name
        assert not re.search('Random.*V2', node.op), node.name


def test_grid_shows_the_samples(default, restored):
    expected = np.ones([10 * 116, 10 * 116])  # White; each pixel of a sample is 4 x 4 pixels.
    for i, sample in enumerate(restored['samples']):
        y, x = 116 * (i // 10), 116 * (i % 10)
        expected[y:y + 112, x:x + 112] = np.kron(sample, np.ones([4, 4]))
    image = matplotlib.image.imread(str(default / 'new_images.png'))[..., :3]
    np.testing.assert_allclose(image, expected[:-4, :-4, None].repeat(3, 2), atol=2 / 255)


def test_pictures(default, worse):
    for path in [folder / name for folder in (default, worse) for name in PICTURES]:
        assert 5000 < path.stat().st_size < 500000, path
        assert matplotlib.image.imread(str(path))[..., :3].std() > .02, path


def test_linear_discriminants():
    """Spread that is not divided out, components of a wrong matrix; a set of one class."""
    rng, labels = np.random.RandomState(0), np.arange(3000) % 2 + 3
    points = rng.randn(3000, 4) @ rng.randn(4, 4) + np.outer(labels, [1, 0, 2, 0])
    projections, right = main.linear_discriminants(points, labels)
    parts = points[labels == 3], points[labels == 4]
    closed = np.linalg.solve(sum(np.cov(part.T) for part in parts),
                             parts[1].mean(0) - parts[0].mean(0))  # Fisher's, of two classes.
    assert abs(np.corrcoef(projections[:, 0], points @ closed)[0, 1]) > .999
    middle = (parts[0].mean(0) + parts[1].mean(0)) / 2
    assert abs(right - np.mean(((points - middle) @ closed > 0) == (labels == 4))) < .01
    assert main.linear_discriminants(points[:, :1], 0 * labels)[0].shape == (3000, 2)


# ---------------------------------------------------------------------------------------- log p(x)


@pytest.mark.parametrize('components', [1, 3])
def test_log_likelihood_is_that_of_an_integral(components, data_dir):
    """A prior or posterior left out, a mean of logarithms, a sum for a mean over the codes."""
    images = np.uint8(255 * (np.load(str(data_dir.parent / 'images.npy')) > .4))  # Black and white.
    with tf.Graph().as_default(), tf.Session() as session:
        args = main.parse_arguments(['--code-size', '1', '--mixture-components', str(components)])
        dataset = argparse.Namespace(name='', train_images=images)
        model = main.build(args, dataset)
        code = np.linspace(-8, 8, 1601)[:, None]
        session.run(tf.global_variables_initializer())
        for _ in range(15):
            session.run(model.optimize, {'images:0': images / 255, 'learning_rate:0': .002})
        probs, log_prior = session.run(['reconstruction:0', 'log_prior:0'], {'code:0': code})
        probs, pixels = probs.reshape(-1, 784).astype(float), images.reshape(-1, 784) / 255
        log_joint = np.log(probs) @ pixels.T + np.log1p(-probs) @ (1 - pixels).T
        log_joint += log_prior[:, None]
        exact = -(np.logaddexp.reduce(log_joint, 0) + np.log(code[1] - code[0])).mean()
        estimates, _, negative_elbos = zip(*(
            main.log_likelihood(session, images, count) for count in (1, 10, 200)))
    assert estimates[0] > estimates[1] > estimates[2] > exact - .05
    assert abs(estimates[2] - exact) < .1 < negative_elbos[2] - exact
    assert estimates[0] == pytest.approx(negative_elbos[0])


# ---------------------------------------------------------------------------------------- Failures


def test_refuses_to_resume_another_run(command, finished, data_dir, tmp_path):
    before = listing(finished)
    for flag, value in [('--code-size', 2), ('--batch-size', 10), ('--learning-rate', .1),
                        ('--seed', 1), ('--mixture-components', 2), ('--epochs', 2),
                        ('--data-dir', data_dir.parent / 'others')]:
        assert_one_line(command(finished, '--resume', flag, value), 'Error: %s' % flag)
    assert listing(finished) == before
    (tmp_path / 'empty').mkdir()
    assert_one_line(command(tmp_path / 'empty', '--resume'), '--resume: ', 'empty/metrics.json')
    assert not list((tmp_path / 'empty').iterdir())


def test_refuses_to_resume_what_is_damaged(command, finished):
    def refused(path, content, *parts):
        """With this content of the file, or without the file."""
        original = path.read_bytes()
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        before = listing(finished)
        assert_one_line(command(finished, '--resume'), 'leave --resume out', *parts)
        assert listing(finished) == before
        path.write_bytes(original)

    path, content = finished / 'metrics.json', metrics(finished)
    wrong = [('settings', {}), ('log_dir', None), ('history', []), ('history', [1])]
    for damaged in [None, b'', path.read_bytes()[:-50], os.urandom(1000), b'[]', b'{}', *(
            json.dumps(dict(content, **{key: value})).encode() for key, value in wrong)]:
        refused(path, damaged, path)
    index, values = (finished / ('training_state-%d%s' % (EPOCHS, end)) for end in ENDS)
    refused(index, None, index.with_suffix(''), 'not a valid checkpoint')
    refused(index, os.urandom(2000), index.with_suffix(''), 'sstable')
    refused(values, values.read_bytes()[:10 ** 7], index.with_suffix(''), 'bytes')


def test_new_run_that_fails_in_its_first_epoch_replaces_nothing(command, finished):
    (finished / 'training_state').write_bytes(os.urandom(100))  # Damaged, and not needed.
    before = listing(finished)
    assert_one_line(command(finished, '--learning-rate', 1e6), 'Error: --learning-rate: ',
                    'diverged', 'epoch 1', 'lower')
    assert_one_line(command(finished, '--data-dir', finished / 'metrics.json'), '--data-dir')
    assert listing(finished) == before
    assert_one_line(command(finished / 'metrics.json' / 'x'), '--output-dir', 'metrics.json/x')


def test_folder_that_is_lost_in_the_run(command, tmp_path, monkeypatch):
    """A file takes its place. And on a terminal an epoch has a bar."""
    folder, moved = tmp_path / 'folder', tmp_path / 'moved'

    def lose(*_):
        folder.rename(moved)
        folder.write_text('in its place')
    monkeypatch.setattr(main, 'draw_training_curves', lose)
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: True)
    _, out, _ = result = command(folder)
    assert_one_line(result, folder, 'cannot be written')
    assert folder.read_text() == 'in its place' and len(history(moved)) == 1
    assert step(moved) == STEPS
    assert re.search('\nEpoch 1/3\n.*7/7.*\nEpoch 1/3: -ELBO .*\nEpoch 2/3\n', out, re.S), out


def test_file_that_cannot_be_replaced(tmp_path):
    (tmp_path / 'name').mkdir()
    with pytest.raises(IsADirectoryError):
        main.replace(argparse.Namespace(output_dir=str(tmp_path)), 'name', b'content')
    assert [path.name for path in tmp_path.iterdir()] == ['name']


@pytest.mark.skipif(not shutil.which('mount'), reason='cannot mount a disk')
def test_full_disk(command, finished, data_dir, tmp_path):
    """With room for the first training state alone, and then for more; and, beside what an earlier
    run wrote, for not even that."""
    small, large, mb = tmp_path / 'small', tmp_path / 'large', 2 ** 20
    before = listing(finished)

    def mount(folder, size, *options):
        folder.mkdir(exist_ok=True)
        if subprocess.call(['mount', '-t', 'tmpfs', '-o', ','.join(['size=%d' % size, *options]),
                            'none', str(folder)], stderr=subprocess.DEVNULL):
            pytest.skip('may not mount a disk')
    try:
        mount(large, sum(map(len, before.values())) + 6 * mb)
        for name in before:
            shutil.copy(str(finished / name), str(large))
        run = Run(tmp_path, '--data-dir', data_dir, *FLAGS, '--output-dir', large)
        mount(small, 17 * mb)
        assert_one_line(command(small, '--epochs', 1), small, 'No space left')
        assert len(history(small)) == 1 and (small / 'training_state-1.index').exists()
        assert not (small / 'new_model.ckpt.index').exists()
        mount(small, 40 * mb, 'remount')
        assert command(small, '--epochs', 1, '--resume')[::2] == (0, '')
        assert step(small) == STEPS
        assert_one_line((run.finish().code, run.out, run.err), large, 'No space left')
        assert listing(large) == before
    finally:
        for folder in small, large:
            subprocess.call(['umount', str(folder)], stderr=subprocess.DEVNULL)


# -------------------------------------------------------------------------- Killed and interrupted


def killed(data_dir, folder, default, worse):
    """Kills and resumes runs at random moments, in a folder with what an earlier run wrote."""
    folder = shutil.copytree(worse, folder / 'copy')
    before, kills, code, epochs = listing(folder), 0, None, 0
    needed = [name for name in before if not name.startswith('training_state')
              or name.startswith('training_state-%d.' % len(history(worse)))]

    def ours():
        return history(folder) if metrics(folder)['settings']['code_size'] == 14 else []
    while kills < KILLS or code != 0:
        run = Run(folder, '--data-dir', data_dir, *FLAGS, *['--resume'] * bool(ours()))
        if kills < KILLS:
            epochs = random.randrange(EPOCHS)
            run.wait_for(lambda: 'Model' in run.printed() and len(ours()) >= epochs)  # noqa: B023
            time.sleep(random.uniform(0, random.choice([.1, .5, 2])))
            kills += run.process.poll() is None
            run.signal(signal.SIGKILL)
        code = run.finish().code
        assert run.err == '' and code in (0, -signal.SIGKILL)
        after = listing(folder)
        assert ours() or all(after[name] == before[name] for name in needed)
    assert results(folder) == results(default)
    # Of a state that it was about to remove when it was killed, something may be left.
    assert set(listing(default)) <= set(after)
    assert not [name for name in set(after) - set(listing(default)) if 'training_state' not in name]


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
    """In the last drawing of a run that goes on to one epoch more; and one that starts up, once."""
    run = Run(folder, '--data-dir', data_dir)
    maps = pathlib.Path('/proc/%d/maps' % run.process.pid)
    run.wait_for(lambda: 'tensorflow' in maps.read_text()).signal(signal.SIGINT)
    assert run.code == -signal.SIGINT and run.out + run.err == ''

    folder = shutil.copytree(default, folder / 'copy')
    run = Run(folder, '--data-dir', data_dir, *FLAGS, '--resume', '--epochs', EPOCHS + 1,
              '--importance-samples', 10 ** 5)
    run.wait_for(lambda: len(history(folder)) > EPOCHS and 'test' in metrics(folder))
    run.signal(signal.SIGINT, signal.SIGTERM)
    assert run.code in (-signal.SIGINT, -signal.SIGTERM) and run.err == ''
    assert '\nEpoch 4/4: ' in run.out and '\nTest: ' in run.out
    assert history(folder)[:-1] == history(default)
    assert [len(list(path.iterdir())) for path in folder.glob('logs/*/validation')] == [2]
    assert tensors(folder) and (folder / 'training_state-4.index').exists()


def resumed_after_the_end(data_dir, folder, default, worse):
    folder = shutil.copytree(worse, folder / 'copy')
    (folder / 'training_curves.png').unlink()  # As if killed before it was drawn.
    run = Run(folder, '--data-dir', data_dir, *FLAGS, *WORSE, '--resume').finish()
    assert run.code == 0 and run.err == '' and 'Epoch' not in run.out
    assert 'Test: -ELBO %.2f nats' % metrics(worse)['test']['negative_elbo'] in run.out
    assert results(folder) == results(worse) and set(listing(folder)) == set(listing(worse))


IN_BACKGROUND = [interrupted, killed, interrupted_twice, resumed_after_the_end]


@pytest.mark.parametrize('function', IN_BACKGROUND, ids=lambda function: function.__name__)
def test_in_background(background, function):
    background[function].result()


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
