"""Tests of data.py. They never leave this machine: mirrors are HTTP servers on 127.0.0.1. That of
MNIST itself runs where the environment variable MNIST_DIR names its folder."""

import contextlib
import gzip
import hashlib
import http.server
import os
import re
import threading
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

import data

NAMES, MIRRORS = list(data.FILES), data.MIRRORS
KEYS = ['x_train', 'y_train', 'x_test', 'y_test']


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, '>u4').tobytes() + array.tobytes()


def make_set(train=24, test=7, size=(28, 28)):
    """Arrays of a small set, in the order of the four files."""
    rng = np.random.RandomState(0)
    return [rng.randint(256, size=shape).astype(np.uint8)
            for shape in [(train, *size), train, (test, *size), test]]


def write_set(folder, arrays, form='%s.gz', zipped=True, names=NAMES):
    if form.endswith('.npz'):
        return np.savez(str(folder / form), **dict(zip(KEYS, arrays)))
    for name, array in zip(names, arrays):
        path = folder / (form % name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(idx(array)) if zipped else idx(array))


def refusal(data_dir, named='', dataset='auto'):
    """The message with which `load` refuses: one line, and nothing changes in or beside it."""
    def listing():
        paths = Path(data_dir).parent.rglob('*')
        return {path: path.is_file() and path.read_bytes() for path in paths}
    before = listing()
    with pytest.raises(data.RunError) as caught:
        data.load(str(data_dir), dataset)
    message = str(caught.value)
    assert message.startswith(str(named or data_dir)) and '\n' not in message
    assert listing() == before
    return message


def load(data_dir, arrays, held_out=2, dataset='auto'):
    """Loads a folder, which must give these images, the first of them for validation."""
    loaded = data.load(str(data_dir), dataset)
    images, _, *tests = arrays
    np.testing.assert_equal(loaded[1:5], (images[held_out:], images[:held_out], *tests))
    assert loaded.train_images.dtype == loaded.test_images.dtype == np.uint8
    return loaded


IMAGES, LABELS, TEST_IMAGES, _ = make_set()
INK = np.uint8(255) * (IMAGES > 99)
RGB = np.repeat(INK[..., None], 3, -1)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A data folder. No test asks a public mirror or a proxy, or draws 70,000 digits."""
    monkeypatch.setattr(data, 'MIRRORS', [])
    monkeypatch.setattr(data, 'SYNTHETIC_COUNTS', (60, 10))
    monkeypatch.setenv('no_proxy', '*')
    path = tmp_path / '[images] *'  # Which is not to be taken for a pattern.
    path.mkdir()
    return path


@pytest.mark.parametrize('count, held_out, dataset, name, shown', [
    (2, 1, 'auto', b'x' * 24, 'x' * 24), (23, 1, 'mnist', b'x' * 25, 'x' * 22 + '...'),
    (24, 2, 'auto', b'[x] *', '[x] *'), (6000, 500, 'mnist', b'x\xff', 'x?')])
def test_any_set_is_split_and_named(tmp_path, capsys, count, held_out, dataset, name, shown):
    """Catches another split, sides confused, and names too long for a title or not printable."""
    folder, arrays = tmp_path / os.fsdecode(name), make_set(count, size=(16, 12))
    write_set(folder, arrays)
    assert load('%s/' % folder, arrays, held_out, dataset).name == 'images in ' + shown
    assert tuple(capsys.readouterr()) == (
        'Data: images in %s: %d training, %d validation and 7 test images of 16 x 12.\n'
        % (shown, count - held_out, held_out), '')


def test_the_nearest_is_taken_and_of_packed_and_unpacked_either(folder):
    """Catches several sets found where one is meant, or none beside what is none."""
    write_set(folder, make_set(), '%s', zipped=False)
    write_set(folder, make_set())
    (folder / NAMES[2]).unlink()
    (folder / (NAMES[0] + '.gz')).write_bytes(b'')
    write_set(folder / 'below', make_set(3))
    np.savez(str(folder / 'mine.npz'), weights=np.ones(3))
    (folder / ('a-' + NAMES[0])).mkdir()  # As archives are unpacked.
    load(folder, make_set())
    assert re.search('beside it are the sets .*t10k.*: choose', refusal(folder / 'mistyped'))


@pytest.mark.parametrize('first, second', [
    ('emnist-letters-%s', 'fashion-%s'), ('a/%s', 'b/c-%s'), ('%s', 'z-%s'), ('a.npz', 'b-%s')])
def test_of_several_sets_one_can_be_chosen(folder, monkeypatch, first, second):
    """Catches one taken at random, files of two mixed, and advice that does not work."""
    monkeypatch.chdir(folder)
    write_set(folder, make_set(), first)
    write_set(folder, make_set(30), second)
    names = [re.sub('[-/]?%s', '', form) or 't10k-images-idx3-ubyte' for form in (first, second)]
    listed, advised = re.search(r'\((.*)\); .* --data-dir (.*)', refusal('.')).groups()
    assert sorted(map(os.path.normpath, listed.split(', '))) == names
    load(advised, make_set())
    load('./%s/' % names[1], make_set(30))


@pytest.mark.parametrize('form, zipped, old, new', [
    ('%s', False, '', ''), ('%s.gz', False, '', ''), ('%s', True, '-idx', '.idx'),
    ('a/b/c/%s.gz', True, '', ''), ('mine.npz', True, '', ''), ('my-own-%s', True, 't10k', 'test')])
def test_names_and_containers_do_not_matter(folder, monkeypatch, form, zipped, old, new):
    """Catches names of 7-Zip, EMNIST and torchvision unknown, gzip known by its name, arrays of an
    .npz file swapped, and a fingerprint of anything but the content and shape of all arrays."""
    arrays, names = make_set(size=(12, 16)), [name.replace(old, new) for name in NAMES]
    write_set(folder, map(np.asfortranarray, arrays), form, zipped, names)
    content = b''.join(repr(array.shape).encode() + array.tobytes() for array in arrays)
    wanted = hashlib.sha256(content).hexdigest()[:16]
    assert load(folder, arrays).fingerprint == wanted
    monkeypatch.setattr(data, 'MNIST_FINGERPRINT', wanted)
    assert data.load(str(folder)).name == 'MNIST'


@pytest.mark.skipif('MNIST_DIR' not in os.environ, reason='MNIST_DIR is not set')
def test_mnist_is_known_by_its_content():
    folder = Path(os.environ['MNIST_DIR'])
    assert data.load(str(folder), 'mnist').name == 'MNIST'
    for name, sha256 in data.FILES.items():
        assert hashlib.sha256((folder / (name + '.gz')).read_bytes()).hexdigest() == sha256


@pytest.mark.parametrize('number, content, message', [
    (0, None, 'without train-images'), (3, None, 'without test-labels'), (0, b'', 'is empty'),
    (1, '/nowhere', ': No such file'), (3, '/dev/zero', ': is not a file'),
    (2, b'\r\n <!DOCTYPE html>', 'is a web page'), (2, gzip.compress(b''), 'is gzipped twice'),
    (2, idx(LABELS), 'uint8 in 1 dimensions, not the IDX file of uint8 in 3 dimensions that holds'),
    (0, b'\0\0\r\3' + idx(IMAGES)[4:], 'is an IDX file of float32 in 3 dimensions'),
    (2, idx(IMAGES)[:9], 'truncated within'), (2, idx(TEST_IMAGES)[:-1], 'claims 5488 bytes'),
    (0, idx(IMAGES[:0]), 'claims to hold 0 x 28 x 28 images'), (0, b'\0\0\10', 'starts with'),
    (0, idx(np.r_[IMAGES, IMAGES[:1]]), 'hold 25 x 28 x 28'), (3, idx(LABELS), '24 labels for 7'),
    (2, idx(TEST_IMAGES[:, :, 4:]), '28 x 24, but the training images are of 28 x 28'),
    (1, idx(LABELS) + b'\0', ' after its last label;')], ids=lambda value: str(value)[-20:])
def test_bad_files_are_refused(folder, monkeypatch, number, content, message):
    """Catches files that crash or pass, a download beside them, and a limit off by one."""
    monkeypatch.setattr(data, 'MAX_SIZE', 24 * 784)
    write_set(folder, make_set(), zipped=number == 2)
    path = folder / (NAMES[number] + '.gz')
    path.unlink()
    if isinstance(content, str):
        path.symlink_to(content)
    elif content is not None:
        path.write_bytes(gzip.compress(content) if number == 2 else content)
    assert message in refusal(folder, folder if content is None else path)


def test_what_is_not_understood_is_left_alone(folder):
    """Catches a download or digits among someone's files, and silence about what is there."""
    for count, shown in (1, 'a;'), (5, 'a, b, c, d, e;'), (6, 'a, b, c, d, e, ...;'):
        for name in ['.hidden', *'abcdef'[:count]]:
            (folder / name).write_bytes(b'1,2,3')
        assert re.search('only %s .*-ubyte.gz.* --data-dir' % re.escape(shown), refusal(folder))
    assert 'cannot be read as a folder (Not a dir' in refusal(folder / 'a')
    assert 'written (Not a dir' in refusal(folder / 'a', dataset='synthetic')
    assert 'No such file' in refusal(folder / 'mistyped.npz')


@pytest.mark.parametrize('keys, array, message', [
    ('x_test', INK / np.float32(255), 'x_test is [24, 28, 28] of float32 from 0 to 1;'),
    ('x_test', INK * 1., 'float64 from 0 to 255;'), ('x_test', INK // 255, 'uint8 from 0 to 1;'),
    ('x_test', INK > 0, 'bool from 0 to 1;'), ('x_test', np.int64(INK), 'of int64'),
    ('x_test', INK * 100., 'to 25500;'), ('x_test', RGB, '[24, 28, 28, 3] of uint8'),
    ('x_test', RGB[..., :1], '28, 1] of'), ('x_test', np.rollaxis(RGB, 3, 1), '[24, 3, 28, 28]'),
    ('x_test', np.insert(RGB, 3, 99, -1), '28, 4] of'), ('x_train', IMAGES[0], 'is [28, 28] of'),
    ('x_train', RGB[None], 'x_train is [1, 24, 28, 28, 3]'), ('x_train', IMAGES[:0], 'is [0, 28'),
    ('x_train', IMAGES * 1j, 'of complex128;'), ('y_train', LABELS * 1., 'y_train is [24] of'),
    ('x_train', np.array([None]), 'allow_pickle=False'), ('y_test', LABELS[None], 'is [1, 24] of'),
    ('x_train', IMAGES[:1], ' holds 1 image;'), ('y_train', LABELS[1:], ' (y_train): holds 23'),
    ('x_train', IMAGES[:, 1:], ' (x_test): holds'), ('x', IMAGES[:, 2:], 'must be multiples of 4'),
    ('x', IMAGES[..., 1:], 'of 28 x 27, but'), ('x_train', IMAGES - 255., 'from -255 to 0, not'),
    ('x', IMAGES[:, 3:, 1:], "np.pad(x, [(0, 0), (1, 2), (0, 1)], 'constant')")])
def test_npz_of_something_else_is_refused_or_converted_as_advised(folder, keys, array, message):
    path, arrays = folder / 'mine.npz', {'x_train': IMAGES, 'x_test': IMAGES}
    arrays.update((key, array) for key in KEYS if key.startswith(keys))
    np.savez(str(path), **arrays)
    refused = refusal(folder, path)
    assert message in refused
    if keys == 'x_test':  # What can be converted.
        advised, = re.findall(r' make it (np\.uint8\(.*\));', refused)
        converted = eval(advised, {'np': np, 'x_test': array})
        assert abs(converted - 1. * INK).max() <= 1
        for labels in {'y_test': np.arange(-3, 21)}, {'y_test': np.arange(250, 274)}, {}:
            np.savez(str(path), x_train=IMAGES, x_test=converted, **labels)
            load(folder, [IMAGES, None, converted, labels.get('y_test', np.zeros(24))])
    damaged = path.read_bytes().replace(b'PK\1\2', b'PK\1\3')  # Its list of arrays.
    for content in b'<html>', damaged:
        path.write_bytes(content)
        assert 'expected are images x_train' in refusal(folder, path)


def test_what_is_loaded_is_exactly_what_was_written(tmp_path):
    """700 files, some cut short, with flipped bits, half of them in the header, or both."""
    rng, path = np.random.RandomState(0), tmp_path / 'file'
    for case in range(700):
        array = rng.randint(rng.choice([2, 256]), size=(1 + case % 4, 28, 28)).astype(np.uint8)
        written = gzip.compress(idx(array)) if case % 3 else idx(array)
        content = bytearray(written[:rng.choice([len(written), rng.randint(len(written))])])
        for _ in range(rng.randint(3) if content else 0):
            content[rng.randint(rng.choice([20, 9999])) % len(content)] ^= 1 << rng.randint(8)
        path.write_bytes(content)
        with contextlib.suppress(data.RunError):
            result = data._read_idx(str(path), 3)
            assert idx(result) == (idx(array) if case % 3 else content)


SENT = {name + '.gz': gzip.compress(idx(array)) for name, array in zip(NAMES, make_set())}


class Mirror(http.server.BaseHTTPRequestHandler):
    """Mirrors that send the third file in the way that their address names."""
    log_message, asked = mock.Mock(), []

    def do_GET(self):
        _, way, name = self.path.split('/')
        self.asked.append(way)
        fault = way if NAMES[2] in name else 'none'
        self.protocol_version = 500 * '\xff' if fault == 'gibberish' else 'HTTP/1.0'
        self.send_response(404 if fault == 'missing' else 200)
        self.end_headers()
        time.sleep(10 if fault == 'stalls' else 0)  # Who waits gets all, and so fails the test.
        self.wfile.write(SENT[name] + b'\0' * (fault == 'damaged'))


@pytest.fixture
def mirror(monkeypatch):
    """The address of a good mirror, which is not asked yet."""
    hashes = {name: hashlib.sha256(SENT[name + '.gz']).hexdigest() for name in NAMES}
    monkeypatch.setattr(data, 'FILES', hashes)
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Mirror) as server:
        server.handle_error = mock.Mock()  # A client that hangs up is no failure of a test.
        threading.Thread(target=server.serve_forever, args=[.01]).start()
        yield 'http://127.0.0.1:%d/good/' % server.server_port
        server.shutdown()


@pytest.mark.parametrize('fault', ['missing', 'damaged', 'stalls', 'gibberish'])
def test_a_faulty_mirror_leaves_nothing_and_is_passed_over(folder, mirror, monkeypatch, fault):
    """Catches waiting for ever, content unverified or kept in part, asking a bad mirror again."""
    monkeypatch.setattr(data, 'TIMEOUT', 1)
    (folder / '.hidden').write_bytes(b'mine')
    data.MIRRORS[:] = [mirror.replace('good', fault)]
    message = refusal(folder, dataset='mnist')
    assert data.MIRRORS[0] in message and len(message) < 400 and '--dataset synthetic' in message
    data.MIRRORS.append(mirror)
    for _ in range(2):  # Nothing is asked for twice.
        load(folder, make_set(), dataset='mnist')
    assert {path.name: path.read_bytes() for path in (folder / 'MNIST').iterdir()} == SENT
    assert Mirror.asked[-8:] == [fault] * 6 + ['good'] * 2
    assert all(re.match('https://.*/$', mirror) for mirror in MIRRORS)


@pytest.mark.parametrize('dataset, name', [('mnist', 'MNIST'), ('synthetic', 'synthetic_digits')])
@pytest.mark.parametrize('where', ['os.rename', 'data.open'])
def test_runs_that_end_early_or_meet_do_no_harm(folder, mirror, dataset, name, where):
    """Catches files in part under their names, a full disk filled for good, files of two runs."""
    data.MIRRORS.append(mirror)
    with mock.patch(where, create=True, side_effect=OSError(28, 'No space left')):
        assert 'written (No space left)' in refusal(folder, folder / name, dataset)
    with mock.patch(where, create=True, side_effect=SystemExit), pytest.raises(SystemExit):
        data.load(str(folder), dataset)
    left, = folder.glob('.unfinished-*/%s*' % NAMES[0])
    left.write_bytes(b'in part' * 10 ** 5)
    data.load(str(folder), dataset)
    assert os.listdir(str(folder)) == [name] and len([*folder.glob('*/*')]) == 4

    def other(*args):
        write_set(folder / 'both' / name, make_set(12))
        return open(*args)
    with mock.patch('data.open', create=True, side_effect=other):
        load(folder / 'both', make_set(12), 1, dataset)
    assert os.listdir(str(folder / 'both')) == [name]


def test_auto_falls_back_to_synthetic_digits_and_keeps_them(folder, mirror, monkeypatch, capsys):
    """Catches digits drawn again, or taken for MNIST once that can be downloaded."""
    folder, (images, labels) = folder / 'new' / 'folder', data.synthesize(70, 0)
    (folder / 'synthetic_digits').mkdir(parents=True)  # Of which someone has removed the files.
    wanted = images[:60], None, images[60:], labels[60:]
    for dataset in 'auto', 'synthetic', 'auto':
        assert load(folder, wanted, 5, dataset).name == 'synthetic digits'
        monkeypatch.setattr(data, 'synthesize', None)
        assert re.fullmatch('Warning: .*\n' if dataset == 'auto' else '', capsys.readouterr().err)
    assert (folder / 'synthetic_digits' / NAMES[1]).read_bytes() == idx(labels[:60])
    data.MIRRORS.append(mirror)
    load(folder, make_set())
    load(folder, wanted, 5, 'synthetic')


def test_synthetic_digits_are_all_different_and_like_mnists():
    """Each fits a box of 20 x 20, is centred by mass, and the nearest mean image tells most."""
    digits, labels = data.synthesize(3000, 1)
    assert all(map(np.array_equal, (digits, labels), data.synthesize(3000, 1)))
    assert len(np.unique(np.r_[digits, data.synthesize(200, 2)[0]], axis=0)) == 3200
    assert (np.bincount(labels) == 300).all() and (np.diff(labels) > 1).mean() > .7
    for axis in (1, 2):
        centre = digits.sum(axis) @ np.arange(28) / digits.sum((1, 2))
        assert abs(centre.mean() - 14) < .1 and abs(centre - 14).max() < 1
        assert digits.any(axis).sum(1).max() <= 20
    means = np.stack([digits[labels == digit].mean(0).ravel() for digit in range(10)])
    nearest = ((means ** 2).sum(1) - digits.reshape(-1, 784) @ (2 * means.T)).argmin(1)
    assert min((nearest == labels)[labels == digit].mean() for digit in range(10)) > .75


def test_bytes_become_floats_and_batches_hold_each_once_in_an_order_of_seed_and_epoch_alone():
    numbers = np.arange(256, dtype=np.uint8)
    floats = data.to_float(numbers)
    assert floats.dtype == np.float32 and floats[-1] == 1 and (floats * 255 == numbers).all()

    def order(seed, epoch, size=7):
        parts = list(data.batches(numbers, size, seed, epoch))
        assert [len(part) for part in parts] == [size] * (256 // size) + [256 % size]
        return np.concatenate(parts).tobytes()
    orders = {order(seed, epoch) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16 and all(sorted(some) == list(range(256)) for some in orders)
    assert bytes(range(256)) not in orders and order(1, 2, size=257) in orders


def test_binarised_pixels_are_white_with_their_grey_value_as_probability():
    """Catches noise that images or pixels share, or of another seed; black that is not kept."""
    images = np.arange(256, dtype=np.uint8).repeat(200).reshape(1, -1).repeat(100, 0)
    binary = data.binarise(images, 5, 1)
    share = (binary == 255).reshape(100, 256, 200).mean((0, 2))
    assert abs(share - np.arange(256) / 255).max() < .002 + 4 * .5 / 20000 ** .5
    assert binary.dtype == np.uint8 and len({row.tobytes() for row in binary}) == 100
    np.testing.assert_array_equal(binary, data.binarise(images, 5, 1))
    np.testing.assert_array_equal(binary, data.binarise(binary, 7))
    assert all((binary != data.binarise(images, *seed)).mean() > .1 for seed in [(5, 2), (4, 1)])
