"""Tests of the whole command on two small sets of images. In the environment, KILLS and INTERRUPTS
say how often `kill -9` and Ctrl-C stop a run, and SEED determines when."""

import concurrent.futures
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from unittest import mock

import matplotlib.image
import numpy as np
import pytest
import tensorflow.compat.v1 as tf
from numpy.testing import assert_allclose

import data
import main

KILLS, INTERRUPTS = int(os.environ.get('KILLS', 1)), int(os.environ.get('INTERRUPTS', 1))
SEED = int(os.environ.get('SEED', random.randrange(10 ** 6)))
FLAGS = ['--epochs 3 --batch-size 16 --seed 1'.split(),  # 14 and 7 steps an epoch.
         '--epochs 4 --batch-size 32 --learning-rate .01 --code-size 2 --mixture-components 3 '
         '--binarise --importance-samples 4'.split()]
PLOTS = ['new_images.png', 'training_curves.png', 'reconstructions.png', 'latent_space.png']
MODEL = ['new_model.ckpt' + end for end in ('.meta', '.index', '.data-00000-of-00001')]
# Matplotlib could take this for mathematics, its font lacks a letter, and it is long for a title.
SET = 'a$\\frac$b, \u5b57, a set whose name is longer than any title of a figure.npz'
INTERRUPTED = 'Interrupted. --resume goes on after the last saved epoch, if any.\n'
both_runs = pytest.mark.parametrize('i', [0, 1], ids=['default model', 'other flags'])
signal.signal(signal.SIGINT, signal.default_int_handler)  # A shell's background jobs ignore it.


def start(folder, *arguments):
    """Starts Python in a folder."""
    return subprocess.Popen([sys.executable, *map(str, arguments)], cwd=str(folder),
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding='utf-8')


def write_set(path, noise=0):
    """Writes blobs with classes; or without, and with noise as validation images."""
    rng, arrays, (y, x) = np.random.RandomState(noise), {}, np.mgrid[:8, :12]
    for part, count in ('train', 240), ('test', 60):
        labels = rng.permutation(np.arange(count) % 30) + 5
        place = 6 + 4j + 3 * np.exp(2j * np.pi / 30 * labels) + rng.randn(count)
        images = 255 * np.exp(-np.abs(x + 1j * y - place[:, None, None]) ** 2 / 9)
        arrays.update({'x_' + part: np.uint8(images)}, **{} if noise else {'y_' + part: labels})
    arrays['x_train'][:noise] = rng.randint(256, size=[noise, 8, 12])
    np.savez(str(path), **arrays)
    return path


def metrics(folder):
    return json.loads((folder / 'metrics.json').read_text())


def results(folder):
    """Returns what two equal runs have in common, bit for bit."""
    reader = tf.train.load_checkpoint(tf.train.latest_checkpoint(str(folder)))
    weights = {name: reader.get_tensor(name).tolist()
               for name in reader.get_variable_to_shape_map()}
    history = [dict(entry, seconds=0) for entry in metrics(folder)['history']]
    return weights, history, metrics(folder)['test'], [(folder / p).read_bytes() for p in PLOTS]


def files(folder):
    """Returns the content of each file but the logs and what a killed `Saver` leaves."""
    return {path.name: path.read_bytes() for path in folder.iterdir()
            if path.is_file() and '.tempstate' not in path.name}


def restored(folder):
    """Returns a session with the model of a checkpoint."""
    session = tf.Session(graph=tf.Graph())
    with session.graph.as_default():
        saver = tf.train.import_meta_graph(str(folder / MODEL[0]))
        saver.restore(session, str(folder / 'new_model.ckpt'))
    return session


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """Two finished runs. Beside the other tests go on the `CHAINS` of further runs."""
    make = tmp_path_factory.mktemp
    runs = types.SimpleNamespace(folders=[make('default'), make('other-flags')], sets=[
        write_set(make('data') / SET), write_set(make('data') / 'other.npz', noise=20)])
    processes = [start(folder, main.__file__, '--data-dir', path, *flags)
                 for folder, path, flags in zip(runs.folders, runs.sets, FLAGS)]
    runs.printed = [process.communicate() for process in processes]
    assert not any(process.returncode for process in processes), runs.printed
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        runs.chains = {chain: pool.submit(chain, runs, make('chain')) for chain in CHAINS}
        yield runs


@pytest.fixture
def copies(runs, tmp_path):
    """Copies of the folders of both finished runs."""
    return [pathlib.Path(shutil.copytree(str(folder), str(tmp_path / folder.name)))
            for folder in runs.folders]


@pytest.fixture
def command(capfd):
    """Runs the command in this process and returns its exit code, stdout and stderr."""
    def run(folder, *flags):
        try:
            code = main.main([str(flag) for flag in ('--output-dir', folder, *flags)])
        except SystemExit as error:  # Raised by argparse.
            code = error.code
        return (code, *capfd.readouterr())
    return run


def assert_one_line(result, text, code=1):
    """Asserts that a run failed with one line that contains this text."""
    assert result[0] == code and re.fullmatch('.*[Ee]rror: .{,500}\n', result[2]), result
    assert text in result[2]


@both_runs
def test_prints_and_writes_what_it_says(runs, i):
    """Lines on stdout, metrics.json and TensorBoard's log agree. No library prints a warning."""
    folder, (out, err), dataset = runs.folders[i], runs.printed[i], data.load(runs.sets[i])
    content, weights = metrics(folder), results(folder)[0]
    history, test, name = content['history'], content['test'], dataset.name + ', binarised' * i
    best = 1 + np.argmin([entry['validation_negative_elbo'] for entry in history])
    assert content['best_epoch'] == test['epoch'] == best
    assert weights.pop('global_step') == [14, 7][i] * best
    assert best < len(history) if i else best == len(history)  # Other tests need both.
    keys = ['training_negative_elbo', 'validation_negative_elbo', 'validation_divergence']
    figures = [[entry[key] for key in keys] for entry in history] + [
        [test[key] for key in ('negative_elbo', 'reconstruction', 'divergence')]]
    figures += [[test['negative_log_likelihood'], test['standard_error']]] if i else []
    first, second, *lines, last = out.splitlines()
    assert first.endswith(': 220 training, 20 validation and 60 test images of 8 x 12.')
    assert second == 'Model: {:,} parameters.'.format(sum(map(np.size, weights.values())))
    assert len(lines) == len(figures) and 'Test (%s)' % name in lines[len(history)]
    assert all('%.2f' % value in line for line, values in zip(lines, figures) for value in values)
    assert last.endswith('All results are in %s.' % folder.resolve()) and err == ''
    assert {path.name for path in folder.iterdir()} == {
        'logs', 'checkpoint', 'training_state.npz', 'metrics.json', *PLOTS, *MODEL}

    settings = vars(main.parse_arguments(['--data-dir', str(runs.sets[i]), *FLAGS[i]]))
    assert dict(content['settings'], resume=False, output_dir='.') == settings
    assert content['versions']['tensorflow'] == tf.VERSION and content['dataset'] == name
    log, = folder.glob(content['log_dir'] + '/*')
    events = [event for event in tf.train.summary_iterator(str(log)) if event.summary.value]
    assert [event.step for event in events] == [entry['epoch'] for entry in history]
    *values, samples = events[best - 1].summary.value
    assert {v.tag: v.simple_value for v in values} == pytest.approx(history[best - 1])
    assert samples.image.encoded_image_string == (folder / 'new_images.png').read_bytes()


def tiles(image):
    """Returns the images of a mosaic, `[rows, columns, height, width]`."""
    image = np.pad(image, [(0, 1), (0, 1)], 'constant')
    image = image.reshape(len(image) // 9, 9, image.shape[1] // 13, 13)
    return image.swapaxes(1, 2)[:, :, :8, :12]


@both_runs
def test_checkpoint_alone_gives_the_reported_figures(runs, i):
    """A checkpoint's own graph, which both TensorFlows know, gives figures and new_images.png."""
    folder, dataset, session = runs.folders[i], data.load(runs.sets[i]), restored(runs.folders[i])
    content, test = metrics(folder), metrics(folder)['test']
    expected = dict(content['history'][content['best_epoch'] - 1], **test)
    for images, seed, kind in [(dataset.validation_images, 1, 'validation_'),
                               (dataset.test_images, 0, '')]:
        images = data.binarise(images, seed) if i else images
        elbo, divergence = session.run(['elbo:0', 'divergence:0'], {'images:0': images / 255})
        assert expected[kind + 'negative_elbo'] == pytest.approx(-elbo)
        assert expected[kind + 'divergence'] == pytest.approx(divergence.mean(), abs=1e-5)
    image = matplotlib.image.imread(str(folder / 'new_images.png'))  # 9 x 9 times as large.
    samples = session.run('samples:0').reshape(10, 10, 8, 12)
    assert_allclose(tiles(image[4::9, 4::9]), samples, atol=1 / 255)

    meta_graph = tf.MetaGraphDef.FromString((folder / MODEL[0]).read_bytes())
    assert meta_graph.meta_info_def.stripped_default_attrs
    for node in meta_graph.graph_def.node:
        assert not {'grad_a', 'grad_b', '_gradient_op_type'}.intersection(node.attr), node.name
        assert not re.search('Random.*V2|AddV2', node.op), node.name
    with session.graph.as_default():
        assert len(session.run(tf.report_uninitialized_variables())) == 0


def test_flags(command, tmp_path):
    """A value out of range and an abbreviation are refused in one line."""
    for flag, value in [('--epochs', -1), ('--batch-size', 0), ('--learning-rate', 'nan'),
                        ('--code-size', 'x'), ('--seed', 2 ** 31), ('--epoch', 1)]:
        assert_one_line(command(tmp_path, flag, value), flag, code=2)
    assert not list(tmp_path.iterdir())


def test_training_follows_the_flags(command, tmp_path, monkeypatch, runs):
    """Order, noise, network and learning rate follow the flags; figures are means over images."""
    steps, session_run, dataset = [], tf.Session.run, data.load(runs.sets[0])

    def run(session, fetches, feed_dict=None):
        result = session_run(session, fetches, feed_dict)
        if 'learning_rate:0' in (feed_dict or {}):
            steps.append((*feed_dict.values(), *result[1:]))
        return result
    monkeypatch.setattr(tf.Session, 'run', run)
    for module, name in (main, 'Network'), (data, 'batches'), (data, 'binarise'):
        monkeypatch.setattr(module, name, mock.Mock(wraps=getattr(module, name)))
    monkeypatch.setattr(main, 'report', mock.Mock(side_effect=KeyboardInterrupt))
    flags = '--seed 5 --batch-size 90 --binarise --epochs 2 --training-codes 2 --weight-decay .5'
    assert command(tmp_path, '--data-dir', runs.sets[0], *flags.split())[::2] == (130, INTERRUPTED)
    assert {*MODEL, 'new_images.png', 'training_curves.png'} < set(files(tmp_path))

    sizes, options = main.Network.call_args
    mean = (dataset.train_images.mean(0) + .5) / 256
    assert_allclose(1 / (1 + np.exp(-options.pop('initial_logits'))), mean)
    assert sizes == (14, 1, (8, 12))
    assert options == {'weight_decay': .5, 'seed': 5}
    batches, binarised = ([(len(images), *seed) for (images, *seed), _ in function.call_args_list]
                          for function in (data.batches, data.binarise))
    assert batches == [(220, 90, 5, 1), (220, 90, 5, 2)]
    assert binarised == [(20, 1), (60, 0)] + [
        (count, 5, epoch, i) for epoch in (1, 2) for i, count in enumerate([90, 90, 40])]
    images, rates, codes, elbos, divergences = zip(*steps)
    assert set(codes) == {2} and all(set(np.unique(batch)) == {0, 1} for batch in images)
    assert_allclose(rates, [.012 * min((i + .5) / .6, (5.5 - i) / 5.4) for i in range(6)])
    figures = np.reshape([(-elbo, kl.mean()) for elbo, kl in zip(elbos, divergences)], [2, 3, 2])
    for entry, means in zip(metrics(tmp_path)['history'], [90, 90, 40] @ figures / 220):
        pair = entry['training_negative_elbo'], entry['training_divergence']
        assert pair == pytest.approx(tuple(means))


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn from now on. No title is cut off or covers another."""
    figures, make = [], main.figure_png

    def figure_png(figure, name):
        png = make(figure, name)
        figures.append(figure)
        boxes = [axes.title.get_window_extent() for axes in figure.axes]
        assert boxes[0].x0 >= 0 and boxes[-1].x1 <= figure.bbox.x1
        assert all(left.x1 < right.x0 for left, right in zip(boxes, boxes[1:]))
        assert max(box.y1 for box in boxes) <= figure.bbox.y1
        return png
    monkeypatch.setattr(main, 'figure_png', figure_png)
    return figures


def test_resume_writes_lost_files(command, runs, copies, figures, monkeypatch):
    """A run that was killed after its last epoch ends as if it had not been. Its plots show the
    history, reconstructions of the first 26 of 30 classes, and the plane of the class centres."""
    folder, (weights, history, *_) = copies[0], results(copies[0])
    for name in [*MODEL, *PLOTS, 'metrics.json']:
        (folder / name).unlink()
    monkeypatch.setattr(main, 'CHUNK', 25)
    monkeypatch.setattr(matplotlib, '__version__', 'other')
    code, out, err = command(folder, '--resume')
    assert (code, err) == (0, '') and 'Epoch' not in out
    assert results(folder)[:2] == (weights, history)
    assert metrics(folder)['versions']['matplotlib'] != 'other'

    curves, (pairs,), (decoded, scatter) = [figure.axes for figure in figures]
    assert all(r'a\$\frac\$b' in figure.axes[0].get_title() for figure in figures)
    for axes, key in zip(curves, ['negative_elbo', 'divergence']):
        for kind, line in zip(['training', 'validation'], axes.lines):
            values = [entry['%s_%s' % (kind, key)] for entry in history]
            assert_allclose(line.get_xydata(), np.transpose([[1, 2, 3], values]))

    dataset, session = data.load(runs.sets[0]), restored(folder)
    images, classes = dataset.test_images / np.float32(255), range(5, 31)
    parts = np.stack([np.flatnonzero(dataset.test_labels == label) for label in range(5, 35)])
    shown = tiles(pairs.images[0].get_array()).reshape(26, 2, 10, 8, 12)
    for pair, part in zip(shown, parts):  # Two images of each class.
        expected = session.run('reconstruction:0', {'images:0': images[part]})
        assert_allclose(pair[:, :2], [images[part], expected], atol=1e-6)
    assert (shown[:, :, 2:] == 1).all()  # White.
    for texts in pairs.get_yticklabels(), scatter.get_legend().get_texts():
        assert [text.get_text() for text in texts] == list(map(str, classes))
    elbos = [session.run('elbo:0', {'images:0': part}) for part in np.split(images, [25, 50])]
    assert results(folder)[2]['negative_elbo'] == pytest.approx(np.dot([25, 25, 10], elbos) / -60)

    centres = session.run('mu:0', {'images:0': images})[parts[:26]].mean(1)
    directions = np.linalg.eigh(np.cov(centres.T))[1][:, :-3:-1].T  # The two main ones.
    check_plane(session, images, parts[:26], centres.mean(0), directions, decoded, scatter)


def check_plane(session, images, parts, centre, directions, decoded, scatter):
    """Checks the images that a plane decodes to, at its corners, and the codes of images in it."""
    points = (session.run('mu:0', {'images:0': images}) - centre) @ directions.T
    shown = np.concatenate([np.array(part.get_offsets()) for part in scatter.collections])
    signs = np.sign(np.sum(shown * points[parts.ravel()], 0))  # Those of directions are arbitrary.
    assert_allclose(shown, (points * signs)[parts.ravel()], atol=1e-4)
    low, high = np.percentile(points * signs, [1, 99], axis=0)
    assert_allclose(decoded.images[0].get_extent(), [low[0], high[0], low[1], high[1]], atol=1e-4)
    x, y = (low + (high - low) * [[.025], [.975]]).T  # The centres of 20 images.
    codes = centre + [(i, j) * signs @ directions for j in y[::-1] for i in x]
    corners = tiles(decoded.images[0].get_array())[::19, ::19].reshape(4, 8, 12)
    assert_allclose(corners, session.run('reconstruction:0', {'code:0': codes}), atol=1e-4)


def test_more_epochs_train_on(command, runs, copies, figures):
    """A finished run continues. Without classes, the plane is that of the first dimensions."""
    folder, (weights, history, test, _) = copies[1], results(copies[1])
    code, out, err = command(folder, '--resume', '--epochs', 5, '--importance-samples', 0)
    assert (code, err) == (0, '') and re.findall('Epoch (.*?):', out) == ['5/5']
    after = results(folder)
    assert (weights, history) == (after[0], after[1][:-1]) and after[2].items() <= test.items()

    images = data.binarise(data.load(runs.sets[1]).test_images, 0) / 255
    centre = restored(folder).run('mu:0', {'images:0': images}).mean(0)
    check_plane(restored(folder), images, np.arange(60), centre, np.eye(2), *figures[-1].axes)


def test_log_likelihood_has_a_closed_form(monkeypatch):
    """For weights exp(a (z - mu) / sigma), z ~ N(mu, sigma), it is a ** 2 / 2 with an image's a."""
    class Session:
        def run(self, names, feeds):
            a = feeds['images:0'].mean((1, 2))[:, None]
            z, mu, sigma = map(feeds.get, ['code:0', 'mu:0', 'sigma:0'])
            return (3 + a, 1 + a) if z is None else (a * (z - mu) / sigma)[:, 0]
    monkeypatch.setattr(main, 'CHUNK', 25)
    images = np.uint8(255) * np.tri(60, 60, -1, np.uint8)[:, None]  # Image i has i white pixels.
    log_p, result = (np.arange(60) / 60) ** 2 / 2, main.log_likelihood(Session(), images, 5000)
    assert result == pytest.approx((-log_p.mean(), log_p.std() / 60 ** .5), rel=.05)
    binary, grey, black = (main.log_likelihood(Session(), pixels, 3) for pixels in (
        data.binarise(images // 2, 0), images // 2, 0 * images))
    assert binary == grey and black == pytest.approx((0, 0), abs=1e-9)


def test_refuses_to_resume(command, runs, copies, tmp_path):
    """Other flags or images and a missing, damaged or foreign state are refused in one line."""
    folder, path = copies[1], copies[1] / 'training_state.npz'
    before, whole = files(folder), path.read_bytes()
    for flag in '--code-size', '--batch-size', '--learning-rate', '--seed', '--weight-decay':
        assert_one_line(command(folder, '--resume', flag, 9), flag + ': ', code=2)
    assert_one_line(command(copies[0], '--resume', '--binarise'), '--binarise: ', code=2)
    assert_one_line(command(folder, '--resume', '--data-dir', runs.sets[0]), '--data-dir: ')
    assert_one_line(command(tmp_path, '--resume'), '--resume: %s' % (tmp_path / path.name))
    assert files(folder) == before
    with np.load(str(path)) as file:
        arrays = dict(file, **{'last/encoder/mu/bias': np.zeros(3)})  # Another network's.
    np.savez(str(path), **arrays)
    damaged = whole[:2000] + bytes(9) + whole[2009:]
    for content in path.read_bytes(), b'', damaged, runs.sets[0].read_bytes():
        path.write_bytes(content)
        assert_one_line(command(folder, '--resume'), '--resume: ')
        assert files(folder) == dict(before, **{path.name: content})


def test_failed_run_replaces_nothing(command, runs, copies, monkeypatch):
    """A problem that the user can solve is one line; an unforeseen error shows its traceback."""
    flags, before = ['--data-dir', runs.sets[0], '--epochs', 1], files(copies[0])
    assert_one_line(command(copies[0], *flags, '--learning-rate', 1e6), '--learning-rate: ')
    assert_one_line(command(copies[0] / 'metrics.json' / 'x', *flags), 'metrics.json/x')
    monkeypatch.setattr(os, 'fsync', mock.Mock(side_effect=OSError('No space left on device')))
    assert_one_line(command(copies[0], *flags), 'No space')
    assert before.items() <= files(copies[0]).items()
    error = tf.errors.ResourceExhaustedError(None, None, 'Trace:\n\nshort\n\t [[node]]')
    monkeypatch.setattr(main, 'run', mock.Mock(side_effect=[MemoryError('short'), error, KeyError]))
    for _ in range(2):
        assert command(copies[0])[::2] == (1, 'Error: short\n')
    with pytest.raises(KeyError):
        command(copies[0])


def stopped(runs, folder):
    """A run that is stopped at random moments and resumed with --output-dir alone ends like one
    that is not. Until its first epoch ends, the files of an earlier run stay."""
    print('SEED=%d' % SEED)
    rng, ours = random.Random(SEED), False
    out = pathlib.Path(shutil.copytree(str(runs.folders[0]), str(folder / 'out')))
    before, stops = files(out), [signal.SIGKILL] * KILLS + [signal.SIGINT] * INTERRUPTS
    for stop in rng.sample(stops, len(stops)) + [None]:
        flags = ['--resume'] if ours else ['--data-dir', runs.sets[1], *FLAGS[1]]
        run = start(folder, main.__file__, '--output-dir', 'out', *flags)
        if stop:
            for _ in range(rng.randint(2, 6)):  # Training begins after the second line.
                if run.stdout.readline().startswith('Test'):
                    break  # A process that exits is not what Ctrl-C is tried on.
            time.sleep(rng.uniform(0, .3))
            run.send_signal(stop)
        err = run.communicate()[1]
        assert (run.returncode, err) in [(0, ''), (-9, ''), (130, INTERRUPTED)][:3 if stop else 1]
        ours = ours or files(out)['training_state.npz'] != before['training_state.npz']
        assert ours or before.items() <= files(out).items()
    assert results(out) == results(runs.folders[1])


def readme(runs, folder):
    """The README's Python code runs as written, and `mine.npz` holds the pictures."""
    text = pathlib.Path(main.__file__).with_name('README.md').read_text()
    blocks = [block for block in re.findall('```python\n(.*?)```', text, re.S)
              if tf.VERSION > '2' or 'TFLite' not in block]
    for i in range(60):  # Each has its own grey.
        path = folder / 'pictures' / 'ab'[i // 30] / ('%d.png' % i)
        path.parent.mkdir(parents=True, exist_ok=True)
        matplotlib.image.imsave(str(path), np.full([9, 14, 3], 4 * i, np.uint8))
    for name in MODEL:
        shutil.copy(str(runs.folders[0] / name), str(folder))
    process = start(folder, '-I', '-c', '\n'.join(blocks))
    err = process.communicate()[1]
    assert process.returncode == 0 and (folder / 'decoder/saved_model.pb').exists(), err
    mine = data.load(folder / 'mine.npz')
    assert (mine.test_labels == mine.test_images[:, 0, 0] // 120).all() and len(mine[1]) > 40


CHAINS = [stopped, readme]


@pytest.mark.parametrize('chain', CHAINS, ids=lambda chain: chain.__name__)
def test_chain_of_runs(runs, chain):
    runs.chains[chain].result()
