"""Tests of the whole command, run as a user runs it, on a small set of images that they make.

The environment variable KILLS says how often the test of `kill -9` kills, e.g. 100.
"""

import concurrent.futures
import contextlib
import glob
import io
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
PICTURES = ['new_images.png', 'training_curves.png', 'reconstructions.png', 'latent_space.png']

# Uses the checkpoint of the current folder by the public names alone.
RESTORE = '''
import numpy as np
import tensorflow.compat.v1 as tf
images = np.load('images.npy')
with tf.Session() as session:
    tf.train.import_meta_graph('new_model.ckpt.meta').restore(session, 'new_model.ckpt')
    names = ['elbo', 'divergence', 'mu', 'sigma', 'code', 'reconstruction']
    result = dict(zip(names, session.run([n + ':0' for n in names], {'images:0': images})))
    result['decoded'] = session.run('reconstruction:0', {'code:0': result['code']})
    result['samples'] = session.run('samples:0')
    result['three'] = session.run('samples:0', {'num_samples:0': 3})
    elbo, images_in = map(session.graph.get_tensor_by_name, ['elbo:0', 'images:0'])
    result['slope'] = session.run(tf.gradients(elbo, images_in)[0], {'images:0': images})
np.savez('result.npz', **result)
'''


class Run:
    """The command, started in a folder; `finish` waits for its end."""

    def __init__(self, folder, *arguments, script=str(ROOT / 'main.py')):
        environment = {key: value for key, value in os.environ.items()
                       if key not in ('TF_CPP_MIN_LOG_LEVEL', 'PYTHONWARNINGS', 'PYTHONPATH')}
        self.files = tempfile.TemporaryFile(), tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            [sys.executable, *script.split('\0'), *map(str, arguments)], cwd=str(folder),
            stdout=self.files[0], stderr=self.files[1], env=environment)

    def finish(self):
        self.code = self.process.wait(600)
        self.out, self.err = (os.pread(f.fileno(), 10 ** 7, 0).decode() for f in self.files)
        return self

    def wait_for(self, condition):
        while not condition():
            assert self.process.poll() is None, self.finish().out + self.err
            time.sleep(.005)

    def signal(self, signum):
        self.process.send_signal(signum)

    def handles_signals(self):
        with open('/proc/%d/status' % self.process.pid) as file:
            mask = int(re.search(r'SigCgt:\s*(\w+)', file.read()).group(1), 16)
        return mask >> signal.SIGTERM - 1 & 1


def parallel(function, *items):
    """As `map`, two at a time."""
    with concurrent.futures.ThreadPoolExecutor(2) as executor:
        return list(executor.map(function, *items))


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
    """The history without the seconds, which differ from run to run; empty before there is one."""
    if not (folder / 'metrics.json').exists():
        return []
    return [{k: v for k, v in entry.items() if k != 'seconds'}
            for entry in metrics(folder)['history']]


def tensors(folder):
    """Everything in the checkpoint; raises if any of it is missing or damaged."""
    reader = tf.train.load_checkpoint(str(folder / 'new_model.ckpt'))
    return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}


def same(some, others):
    return some.keys() == others.keys() and all(np.array_equal(some[k], others[k]) for k in some)


def listing(folder):
    """The content of each file that a run leaves, but for the logs, of which each has its own."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def assert_one_line(run, code, *parts):
    """The run ended with this exit code and one line that contains these parts."""
    assert run.code == code and len(run.err.strip().split('\n')) == 1, run.err
    for part in parts:
        assert part in run.err


def refusal(folder, *arguments):
    """How the command refuses these arguments, found out in this process, which takes less time."""
    with pytest.raises((main.RunError, data.DataError)) as error, \
            contextlib.redirect_stdout(io.StringIO()), tf.Graph().as_default():
        main.run(main.parse_arguments(['--output-dir', str(folder), *map(str, arguments)]))
    return str(error.value)


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data')
    images = write_set(folder / 'blobs', 0)
    write_set(folder / 'others', 1)
    np.save(str(folder / 'images.npy'), images / np.float32(255))
    return folder / 'blobs'


@pytest.fixture(scope='module')
def runs(tmp_path_factory, data_dir):
    """Two finished runs with `FLAGS`. Each has the folder that it ran in as `folder`."""
    flags = {'default': [], 'code 2': ['--code-size', 2]}

    def start(name):
        folder = tmp_path_factory.mktemp(name.replace(' ', '_'))
        run = Run(folder, '--data-dir', data_dir, *FLAGS, *flags[name]).finish()
        assert run.code == 0, run.out + run.err
        run.folder = folder
        return run
    return dict(zip(flags, parallel(start, flags)))


@pytest.fixture(scope='module')
def default(runs):
    return runs['default']


@pytest.fixture
def finished(default, tmp_path):
    """A copy of a finished run's folder."""
    return pathlib.Path(shutil.copytree(str(default.folder), str(tmp_path / 'finished')))


@pytest.fixture(scope='module')
def elsewhere(default, data_dir, tmp_path_factory):
    """What becomes of the checkpoint in processes that know nothing of ours: those of `RESTORE` and
    of the README's first block of Python code; its other blocks may import our code."""
    blocks = re.findall('```python\n(.*?)```', (ROOT / 'README.md').read_text(), re.S)
    path = 'import sys; sys.path.insert(0, %r)\n' % str(ROOT)

    def start(script):
        folder = tmp_path_factory.mktemp('elsewhere')
        for file in [data_dir.parent / 'images.npy', *default.folder.glob('new_model.ckpt.*')]:
            shutil.copy(str(file), str(folder))
        run = Run(folder, script='-I\0-c\0' + script).finish()
        run.folder = folder
        return run
    return parallel(start, [RESTORE, *blocks[:1], *(path + block for block in blocks[1:])])


@pytest.fixture(scope='module')
def restored(elsewhere):
    """The arrays that `RESTORE` gets out of the checkpoint."""
    assert elsewhere[0].code == 0, elsewhere[0].err
    with np.load(str(elsewhere[0].folder / 'result.npz')) as arrays:
        return dict(arrays)


# ---------------------------------------------------------------------------------- What it prints


def test_prints_only_what_is_ours(runs):
    epoch = (r'Epoch \d/3: -ELBO [\d.]+ training, [\d.]+ validation; '
             r'divergence [\d.]+ nats; [\d.]+ s')
    ours = [r'Data: IDX files in .*: 220 training, 20 validation and 60 test images\.',
            r'Model: [\d,]+ parameters\.', r'Epoch \d/3', epoch, r'Test: -ELBO .*',
            r'Wrote .*', r'Done in \d+ s\.']
    for run in runs.values():
        assert run.err == ''
        lines = run.out.splitlines()
        assert [line for line in lines if not any(re.fullmatch(o, line) for o in ours)] == []
        assert sum(bool(re.fullmatch(epoch, line)) for line in lines) == EPOCHS


def test_writes_what_it_says(default):
    wrote = re.search('^Wrote (.*)$', default.out, re.M).group(1)
    wrote = wrote.replace('{meta,index,data-*}', 'data-*').split(', ')
    for path in map(str, default.folder.iterdir()):
        assert '.unfinished' not in path and '.writable' not in path
    assert all(glob.glob(str(default.folder / path)) for path in wrote)
    assert {'new_model.ckpt.data-*', 'metrics.json', *PICTURES} <= {
        os.path.basename(path) for path in wrote}


def test_metrics_agree_with_what_is_printed(default):
    content = metrics(default.folder)
    assert set(content['settings']) == {
        'data_dir', 'dataset', 'output_dir', 'epochs', 'batch_size', 'learning_rate',
        'code_size', 'patience', 'seed'}
    assert content['settings']['batch_size'] == 32 and content['versions']['tensorflow'] == '1.14.0'
    assert 'IDX files' in content['dataset']
    for number, entry in enumerate(content['history'], 1):
        assert entry['epoch'] == number
        assert ('Epoch %d/3: -ELBO %.2f training, %.2f validation; divergence %.2f nats; ' % (
            number, entry['training_negative_elbo'], entry['validation_negative_elbo'],
            entry['validation_divergence'])) in default.out
    test = content['test']
    assert ('Test: -ELBO %.2f nats per image = %.2f reconstruction + %.2f divergence' % (
        test['negative_elbo'], test['reconstruction'], test['divergence'])) in default.out
    first, *_, last = content['history']
    assert last['training_negative_elbo'] < first['training_negative_elbo'] - 5


def test_tensorboard(default):
    log_dir, = (default.folder / 'logs').iterdir()
    assert str(log_dir).endswith(metrics(default.folder)['log_dir'])
    for kind in 'training', 'validation':
        values, pictures, graphs = {}, [], 0
        path, = map(str, (log_dir / kind).iterdir())
        for event in tf.train.summary_iterator(path):
            graphs += bool(event.graph_def)
            for value in event.summary.value:
                if value.HasField('simple_value'):
                    values.setdefault(value.tag, []).append((event.step, value.simple_value))
                else:
                    pictures.append(value.image.encoded_image_string)
        assert set(values) == {'negative_ELBO', 'reconstruction', 'divergence', 'learning_rate'}
        np.testing.assert_allclose(
            values['negative_ELBO'], np.add(values['reconstruction'], values['divergence'])
            * [.5, 1], rtol=1e-5)
        if kind == 'training':
            assert graphs == 1
        else:
            np.testing.assert_allclose(
                values['negative_ELBO'], [(STEPS * e['epoch'], e['validation_negative_elbo'])
                                          for e in history(default.folder)], rtol=1e-6)
            assert len(set(pictures)) == EPOCHS and pictures[0].startswith(b'\x89PNG')


# ----------------------------------------------------------------------------------------- Pictures


def test_grid_shows_the_samples(default, restored):
    image = matplotlib.image.imread(str(default.folder / 'new_images.png'))[..., :3].mean(-1)
    cells = image
    for axis in 0, 1:  # Leave out what is white across the whole picture.
        gap = np.concatenate([[True], (image == 1).all(1 - axis), [True]])
        edges = np.flatnonzero(gap[1:] != gap[:-1])
        sizes = edges[1::2] - edges[::2]
        assert len(sizes) == 10 and len(set(sizes)) == 1 and sizes[0] % 28 == 0
        assert len(set(edges[2::2] - edges[1:-1:2])) == 1  # Gaps of one width.
        cells = cells[~gap[1:-1]] if axis == 0 else cells[:, ~gap[1:-1]]
    scale = sizes[0] // 28
    cells = cells.reshape(10, 28, scale, 10, 28, scale).transpose(0, 3, 1, 4, 2, 5)
    cells = cells.reshape(100, 28, 28, scale ** 2)
    assert (cells == cells[..., :1]).all()  # Sharp pixels.
    assert np.abs(cells[..., 0] - restored['samples']).max() < 2 / 255


@pytest.mark.parametrize('name', ['default', 'code 2'])
def test_pictures(runs, name):
    for picture in PICTURES:
        path = runs[name].folder / picture
        assert 5000 < path.stat().st_size < 500000, picture
        assert matplotlib.image.imread(str(path))[..., :3].std() > .02, picture


# --------------------------------------------------------------------------------------- Checkpoint


def test_restores_with_nothing_of_ours(default, restored):
    test = metrics(default.folder)['test']
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
    content = tensors(default.folder)
    assert not [name for name in content if 'Adam' in name or 'beta' in name]
    assert content.pop('global_step') % STEPS == 0
    assert {name.split('/')[0] for name in content} == {'encoder', 'decoder'}
    files = default.folder.glob('new_model.ckpt.data-*')
    assert sum(path.stat().st_size for path in files) < 1.01 * sum(
        array.nbytes for array in content.values())


def test_readme_restores_as_it_says(elsewhere):
    assert len(elsewhere) > 1
    for run in elsewhere[1:]:
        assert run.code == 0, run.err


def test_reader_never_fails_nor_sees_a_mixture(data_dir, tmp_path):
    run = Run(tmp_path, '--data-dir', data_dir, '--epochs', 8, '--batch-size', 73)
    prefix = str(tmp_path / 'new_model.ckpt')
    run.wait_for((tmp_path / 'new_model.ckpt.index').exists)
    images, seen, restores = np.load(str(data_dir.parent / 'images.npy')), {}, 0
    with tf.Graph().as_default(), tf.Session() as session:
        saver = tf.train.import_meta_graph(prefix + '.meta')
        while run.process.poll() is None:
            saver.restore(session, prefix)
            values = session.run([*tf.trainable_variables(), 'elbo:0'], {'images:0': images})
            values = tuple(float(np.sum(value, dtype=np.float64)) for value in values)
            assert seen.setdefault(session.run('global_step:0'), values) == values
            restores += 1
    assert run.finish().code == 0
    assert restores > 20 and len(seen) > 3
    # Versions that are no mixture share no variable.
    assert all(len(set(column)) == len(seen) for column in zip(*seen.values()))
    print(restores, 'restores of', len(seen), 'versions')


# ------------------------------------------------------------------------------ Killed and resumed


def test_killed_at_any_moment_and_resumed(default, data_dir, tmp_path):
    epoch = .5 + 2 * min(entry['seconds'] for entry in metrics(default.folder)['history'])

    def chain(number):
        """Kills and resumes runs, until there were half of the kills and the last run ends."""
        rng, kills, code, quota = random.Random(number), 0, 0, (KILLS + number) // 2
        while kills < quota or code != 0:
            if code == 0:  # At first, and after a run that ended before it could be killed.
                folder, resume = pathlib.Path(tempfile.mkdtemp(dir=str(tmp_path))), []
            events = len(list(folder.glob('logs/*/*/*')))
            run = Run(folder, '--data-dir', data_dir, *FLAGS, *resume)
            run.wait_for(lambda: len(list(folder.glob('logs/*/*/*'))) > events)
            if kills < quota:
                epochs = rng.randrange(EPOCHS)
                run.wait_for(lambda: len(history(folder)) >= epochs)
                time.sleep(rng.uniform(0, epoch))
                kills += run.process.poll() is None
                run.signal(signal.SIGKILL)
            code = run.finish().code
            assert run.err == ''
            if (folder / 'new_model.ckpt.index').exists():
                tensors(folder)
            resume = ['--resume'] if (folder / 'training_state.npz').exists() else []
            if code == 0:
                assert history(folder) == history(default.folder)
                assert same(tensors(folder), tensors(default.folder))
                # The names of data files tell how many were there before.
                assert {name for name in listing(folder) if '.data-' not in name} == \
                    {name for name in listing(default.folder) if '.data-' not in name}
        return kills
    print(sum(parallel(chain, range(2))), 'kills')


def test_stray_data_file_never_replaces_or_removes_a_live_one(tmp_path):
    """A version that takes the number of shards of a killed run's leftovers, removed with them."""
    with tf.Graph().as_default():
        values = {'w%d' % i: np.float32(i) for i in range(6)}
        for name in values:
            tf.get_variable(name, [])
        tf.train.get_or_create_global_step()
        prefix = str(tmp_path / 'new_model.ckpt')
        main.Checkpoint(prefix).save(values)
        (tmp_path / 'new_model.ckpt.data-00001-of-00002').write_bytes(b'stray')
        checkpoint = main.Checkpoint(prefix)
        for _ in range(3):
            checkpoint.save(values)
            checkpoint.tidy()
            assert same(tensors(tmp_path), values)


def test_resume_after_the_end(default, finished, data_dir, tmp_path):
    longer = pathlib.Path(shutil.copytree(str(finished), str(tmp_path / 'longer')))
    runs = parallel(lambda case: Run(case[0], '--data-dir', data_dir, *FLAGS, *case[1],
                                     '--resume').finish(),
                    [(finished, []), (longer, ['--epochs', EPOCHS + 1])])
    for run in runs:
        assert run.code == 0 and run.err == ''
    line, = re.findall('^Test: .*$', default.out, re.M)
    assert line in runs[0].out and 'Epoch' not in runs[0].out
    for picture in PICTURES:
        assert (finished / picture).read_bytes() == (default.folder / picture).read_bytes()
    assert same(tensors(finished), tensors(default.folder))
    assert history(longer)[:EPOCHS] == history(default.folder)
    assert len(history(longer)) == EPOCHS + 1 and len(list((longer / 'logs').iterdir())) == 1


def test_refuses_to_resume_what_does_not_fit(finished, data_dir, tmp_path):
    shutil.copytree(str(finished), str(tmp_path / 'another'))
    with np.load(str(finished / 'training_state.npz')) as arrays:
        arrays = dict(arrays)
    arrays['variables/decoder/dense_1/kernel'] = np.zeros([3, 3])
    np.savez(str(tmp_path / 'another' / 'training_state.npz'), **arrays)
    before = listing(finished)
    (tmp_path / 'empty').mkdir()
    flags = ['--data-dir', data_dir, *FLAGS, '--resume']
    assert refusal(tmp_path / 'empty', *flags).startswith('--resume')
    assert 'another network' in refusal(tmp_path / 'another', *flags)
    for flag, value in [('--code-size', 2), ('--batch-size', 10), ('--seed', 1), ('--epochs', 2),
                        ('--data-dir', data_dir.parent / 'others')]:
        line = refusal(finished, *flags, flag, value)
        assert line.startswith(flag) and '\n' not in line
    assert listing(finished) == before and not list((tmp_path / 'empty').iterdir())


def test_new_run_replaces_nothing_before_its_first_epoch_ends(finished, data_dir, tmp_path):
    """Neither one that is killed, nor one that diverges, nor one without data. Then its folder
    disappears."""
    before, logs = listing(finished), len(list(finished.glob('logs/*')))

    def killed(folder):
        run = Run(folder, '--data-dir', data_dir, *FLAGS, '--seed', 1)
        run.wait_for(lambda: len(list(folder.glob('logs/*'))) > logs)
        run.signal(signal.SIGKILL)
        run.finish()
        assert 'metrics.json' in refusal(folder, '--data-dir', folder / 'metrics.json')
        assert listing(folder) == before

    def diverged(folder):
        run = Run(folder, '--data-dir', data_dir, *FLAGS, '--learning-rate', 1e6).finish()
        assert_one_line(run, 1, 'diverged', 'epoch 1', 'step', 'lower', '--learning-rate')
        assert listing(folder) == before

    def disappears(folder):
        run = Run(tmp_path, '--data-dir', data_dir, *FLAGS, '--output-dir', folder)
        run.wait_for(lambda: metrics(folder)['history'] != metrics(finished)['history'])
        folder.rename(tmp_path / 'moved')
        assert_one_line(run.finish(), 1, 'cannot be written')
        assert not same(tensors(tmp_path / 'moved'), tensors(finished))

    copies = [pathlib.Path(shutil.copytree(str(finished), str(tmp_path / name))) for name in 'abc']
    parallel(lambda function, folder: function(folder), [disappears, diverged, killed], copies)


# ------------------------------------------------------------------------------------- Interrupted


def test_interrupted(default, finished, data_dir, tmp_path):
    """After an epoch, and then resumed; while it starts; and twice while it draws in the end."""
    def interrupted(run, signum, again=False):
        run.signal(signum)
        while again and run.process.poll() is None:
            time.sleep(.02)
            run.signal(signum)
        start = time.time()
        run.finish()
        assert run.code == 128 + signum and run.err == ''
        assert time.time() - start < 10  # Much less on an idle machine.
        return run.out

    def after_an_epoch(seed, signum):
        folder = tmp_path / str(seed)
        folder.mkdir()
        run = Run(folder, '--data-dir', data_dir, *FLAGS, '--seed', seed)
        run.wait_for((folder / 'metrics.json').exists)
        last = interrupted(run, signum).splitlines()[-1]
        assert tensors(folder) and (folder / 'new_images.png').exists()
        assert history(folder)[0].keys() == history(default.folder)[0].keys()
        assert (history(folder)[0] == history(default.folder)[0]) == (seed == 0)
        return folder, shlex.split(last[last.index('main.py') + len('main.py'):])

    def resumed():
        folder, arguments = after_an_epoch(0, signal.SIGINT)
        assert Run(folder, *arguments).finish().code == 0
        assert same(tensors(folder), tensors(default.folder))

    def start_up():
        run = Run(finished, '--data-dir', data_dir)
        run.wait_for(run.handles_signals)
        time.sleep(.5)
        interrupted(run, signal.SIGINT)

    def figures():
        before = (finished / 'metrics.json').stat().st_mtime_ns
        run = Run(finished, '--data-dir', data_dir, *FLAGS, '--resume')
        run.wait_for(lambda: (finished / 'metrics.json').stat().st_mtime_ns != before)
        assert 'Go on with' not in interrupted(run, signal.SIGINT, again=True)

    parallel(lambda moment: moment(), [
        resumed, lambda: after_an_epoch(1, signal.SIGTERM), figures, start_up])
    assert same(tensors(finished), tensors(default.folder))


# ---------------------------------------------------------------------------------------- Failures


@pytest.fixture
def disks(tmp_path):
    """Makes a small disk of so many kB."""
    made = []

    def make(size):
        folder = tmp_path / str(size)
        folder.mkdir()
        if subprocess.call(['mount', '-t', 'tmpfs', '-o', 'size=%dk' % size, 'none', str(folder)],
                           stderr=subprocess.DEVNULL):
            pytest.skip('may not mount a disk')
        made.append(folder)
        return folder
    yield make
    for folder in made:
        subprocess.call(['umount', str(folder)])


def test_full_disk(finished, data_dir, disks):
    """With room for the state alone; and, beside what an earlier run wrote, for not even that."""
    used = sum(path.stat().st_size for path in finished.rglob('*')) // 1024
    small, large = disks(22000), disks(used + 6000)
    for path in finished.iterdir():
        if path.is_file():
            shutil.copy(str(path), str(large))
    before = listing(large)
    for run in parallel(lambda folder: Run(folder, '--data-dir', data_dir, *FLAGS).finish(),
                        [small, large]):
        assert_one_line(run, 1, 'No space left')
    assert (small / 'training_state.npz').exists()
    assert not list(small.glob('new_model.ckpt*'))
    assert listing(large) == before


def test_folder_that_cannot_be_written(finished, data_dir):
    line = refusal(finished / 'metrics.json' / 'x', '--data-dir', data_dir)
    assert line.startswith('--output-dir') and 'metrics.json/x' in line


def test_flags(tmp_path, capsys):
    for flag, value in [('--epochs', '-1'), ('--batch-size', '0'), ('--code-size', 'x'),
                        ('--learning-rate', 'nan')]:
        with pytest.raises(SystemExit) as error:
            main.parse_arguments([flag, value])
        line, = capsys.readouterr().err.splitlines()
        assert error.value.code == 2 and flag in line
    bad, good = parallel(lambda flag: Run(tmp_path, flag).finish(), ['--nonsense', '--help'])
    assert_one_line(bad, 2, '--nonsense')
    assert good.code == 0 and good.err == ''
    flags = re.findall(r'^  (--[a-z-]+)(.*?)(?=^  -|\Z)', good.out, re.M | re.S)
    assert {flag for flag, _ in flags} == {
        '--data-dir', '--dataset', '--output-dir', '--epochs', '--batch-size', '--learning-rate',
        '--code-size', '--patience', '--seed', '--resume'}
    assert all('(default: ' in ' '.join(text.split()) for _, text in flags)
    assert not list(tmp_path.iterdir())
