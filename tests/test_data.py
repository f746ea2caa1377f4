"""Tests of data.py. They never leave this machine: mirrors are HTTP servers on 127.0.0.1. That of
MNIST itself runs where the environment variable MNIST_DIR names its folder."""

import contextlib
import gzip
import hashlib
import http.server
import os
import re
import struct
import threading
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

import data

NAMES = ['%s-%s-ubyte' % (part, kind)
         for part in ('train', 't10k') for kind in ('images-idx3', 'labels-idx1')]
KEYS = ['x_train', 'y_train', 'x_test', 'y_test']
MIRRORS = list(data.MIRRORS)
MADE = {'mnist': 'MNIST', 'synthetic': 'synthetic_digits'}


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + struct.pack('>%dI' % array.ndim, *array.shape)
    return header + array.tobytes()


def make_set(train=24, test=7, size=(28, 28)):
    """Arrays of a small set, in the order of the four files."""
    rng = np.random.RandomState(0)
    return [rng.randint(256, size=shape).astype(np.uint8)
            for shape in [(train,) + size, train, (test,) + size, test]]


def write_set(folder, arrays, form='%s.gz', zipped=True, names=NAMES):
    for name, array in zip(names, arrays):
        path = folder / (form % name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(idx(array)) if zipped else idx(array))


def write_npz(path, arrays=(), **others):
    np.savez(str(path), **dict(zip(KEYS, arrays), **others))


def listing(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob('*')}


def refusal(data_dir, named='', dataset='auto'):
    """The message with which `load` refuses: one line, and nothing changes in or beside it."""
    before = listing(Path(data_dir).parent)
    with pytest.raises(data.RunError) as caught:
        data.load(str(data_dir), dataset)
    message = str(caught.value)
    assert message.startswith(str(named or data_dir)) and '\n' not in message
    assert listing(Path(data_dir).parent) == before
    return message


def load(data_dir, arrays, held_out=2, dataset='auto'):
    """Loads a folder, which must give these images, the first of them for validation."""
    loaded = data.load(str(data_dir), dataset)
    images, _, test_images, test_labels = arrays
    for i, wanted in enumerate([images[held_out:], images[:held_out], test_images, test_labels]):
        np.testing.assert_array_equal(loaded[1 + i], wanted)
        assert i == 3 or loaded[1 + i].dtype == np.uint8
    return loaded


IMAGES, LABELS, TEST_IMAGES, _ = make_set()
GREY = np.repeat(IMAGES[..., None], 3, -1)


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


@pytest.mark.parametrize('form, zipped, old, new', [
    ('%s', False, '', ''), ('%s.gz', False, '', ''), ('%s', True, '', ''),
    ('%s', False, '-idx', '.idx'), ('emnist-my-digits-%s.gz', True, 't10k', 'test'),
    ('MNIST/raw/%s', False, '', ''), ('a/b/c/%s.gz', True, '', '')])
def test_names_and_containers_of_others(folder, form, zipped, old, new):
    """Catches gzip known by its name, and names of 7-Zip, EMNIST and torchvision unknown."""
    write_set(folder, make_set(), form, zipped, [name.replace(old, new) for name in NAMES])
    load(folder, make_set())


def test_the_nearest_is_taken_and_of_packed_and_unpacked_either(folder):
    """Catches several sets found where one is meant, or none beside what is none."""
    write_set(folder, make_set(), '%s', zipped=False)
    write_set(folder, make_set())
    (folder / NAMES[2]).unlink()
    (folder / (NAMES[0] + '.gz')).write_bytes(b'')
    write_set(folder / 'below', make_set(3))
    write_npz(folder / 'mine.npz', weights=np.ones(3))
    (folder / ('a-' + NAMES[0])).mkdir()  # As archives are unpacked.
    load(folder, make_set())


@pytest.mark.parametrize('first, second', [
    ('emnist-letters-%s', 'fashion-%s'), ('a/%s', 'b/c-%s'), ('a-%s', '%s'), ('a.npz', 'b-%s')])
def test_of_several_sets_one_can_be_chosen(folder, monkeypatch, first, second):
    """Catches one taken at random, files of two mixed, and advice that does not work."""
    monkeypatch.chdir(folder)
    write_set(folder, make_set(30), second)
    if first == 'a.npz':
        write_npz(first, make_set())
    else:
        write_set(folder, make_set(), first)
    names = [re.sub('[-/]?%s', '', form) or 't10k-images-idx3-ubyte' for form in (first, second)]
    listed, advised = re.search(r'\((.*)\); .* --data-dir (.*)', refusal('.')).groups()
    assert sorted(map(os.path.normpath, listed.split(', '))) == sorted(names)
    load(advised, make_set())
    if second != '%s':
        load('./%s/' % names[1], make_set(30))
    assert 'No such file' in refusal('mistyped.npz')
    if '/' not in first:
        assert 'beside it are the sets' in refusal(os.path.abspath('mistyped'))
    Path('file').write_bytes(b'mine')
    assert 'cannot be read as a folder (Not a dir' in refusal('file')
    assert 'cannot be written (Not a dir' in refusal('file', dataset='synthetic')


def test_npz_gives_what_idx_files_give(folder):
    """Catches arrays swapped, a fingerprint of the memory's order, and labels demanded."""
    path, arrays = folder / 'mine.npz', make_set(size=(12, 16))
    write_set(folder / 'idx', arrays)
    wanted = load(folder / 'idx', arrays).fingerprint
    write_npz(path, map(np.asfortranarray, arrays))
    assert load(folder, arrays).fingerprint == wanted == load(path, arrays).fingerprint
    arrays[3] = np.int64(10) ** 9 * np.arange(-3, 4)
    write_npz(path, x_train=arrays[0], x_test=arrays[2], y_test=arrays[3])
    load(folder, arrays)
    write_npz(path, x_train=arrays[0], x_test=arrays[2])
    load(folder, arrays[:3] + [np.zeros(7)])


def test_fingerprint_is_of_the_content_and_tells_mnist(folder, monkeypatch):
    """Catches a fingerprint of the files, of less than all four, or not of the shape."""
    arrays, prints = make_set(size=(16, 12)), []
    for number in range(7):
        write_set(folder / str(number), arrays, zipped=number != 1)
        prints.append(data.load(str(folder / str(number))).fingerprint)
        if 0 < number < 5:  # Change the last pixel or label of one more file.
            arrays[number - 1].flat[-1] ^= 1
        elif number == 5:
            arrays[::2] = [array.reshape(-1, 12, 16) for array in arrays[::2]]
    assert prints[0] == prints[1] and len(set(prints)) == 6 and len(prints[0]) == 16
    monkeypatch.setattr(data, 'MNIST_FINGERPRINT', prints[0])
    assert [data.load(str(folder / name)).name == 'MNIST' for name in '012'] == [1, 1, 0]


@pytest.mark.skipif('MNIST_DIR' not in os.environ, reason='MNIST_DIR is not set')
def test_mnist_is_known_by_its_content():
    folder = Path(os.environ['MNIST_DIR'])
    assert data.load(str(folder), 'mnist').name == 'MNIST'
    assert data.FILES == {name: hashlib.sha256((folder / (name + '.gz')).read_bytes()).hexdigest()
                          for name in NAMES}


@pytest.mark.parametrize('number, content, message', [
    (0, None, 'without train-images'), (1, None, 'without train-labels'), (3, None, 'test-labels'),
    (1, '/nowhere', ': No such file'), (3, '/dev/zero', ': is not a file'), (0, b'', 'is empty'),
    (2, idx(IMAGES)[:9], 'truncated within'), (2, idx(TEST_IMAGES)[:-1], 'claims 5488 bytes'),
    (2, b'\r\n <!DOCTYPE html>', 'is a web page'), (2, gzip.compress(b''), 'is gzipped twice'),
    (2, idx(LABELS), 'uint8 in 1 dimensions, not the IDX file of uint8 in 3 dimensions that holds'),
    (0, b'\0\0\r\3' + idx(IMAGES)[4:], 'is an IDX file of float32 in 3 dimensions'),
    (0, idx(IMAGES[:0]), 'claims to hold 0 x 28 x 28 images'), (0, b'\0\0\10', 'starts with'),
    (0, idx(np.r_[IMAGES, IMAGES]), 'claims to hold 48 x 28 x 28 images'),
    (1, idx(LABELS) + b'\0', 'bytes after its last label;'),
    (1, idx(LABELS[1:]), 'holds 23 labels for 24'), (3, idx(LABELS), 'holds 24 labels for 7'),
    (2, idx(TEST_IMAGES[:, :, 4:]), '28 x 24, but the training images are of 28 x 28'),
    (3, b'1,2,3', "starts with b'1,2,3")], ids=lambda value: str(value)[-20:])
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


@pytest.mark.parametrize('names, shown', [
    ('a', 'a;'), ('abcde', 'a, b, c, d, e;'), ('abcdef', 'a, b, c, d, e, ...;')])
def test_a_folder_that_is_not_understood_is_left_alone(folder, names, shown):
    """Catches a download or digits among someone's files, and silence about what is there."""
    for name in ['.hidden', *names]:
        (folder / name).write_bytes(b'1,2,3')
    assert re.search('only %s .*-ubyte.gz.* --data-dir' % re.escape(shown), refusal(folder))


@pytest.mark.parametrize('array, wanted, message', [
    (IMAGES / np.float32(255), IMAGES, ' is [24, 28, 28] of float32 from 0 to 1;'),
    (IMAGES * 1., IMAGES, 'float64 from 0 to 255;'), (np.int64(IMAGES), IMAGES, 'of int64'),
    (IMAGES > 99, 255 * (IMAGES > 99), 'bool from 0 to 1;'),
    (np.uint8(IMAGES > 99), 255 * (IMAGES > 99), 'uint8 from 0 to 1;'),
    (GREY, IMAGES, '[24, 28, 28, 3] of uint8'), (GREY / 255, IMAGES, '[24, 28, 28, 3] of float64'),
    (np.insert(GREY, 3, 99, -1), IMAGES, '[24, 28, 28, 4]'), (GREY[..., :1], IMAGES, '28, 1] of'),
    (np.rollaxis(GREY, 3, 1), IMAGES, '[24, 3, 28, 28]'), (IMAGES * 100., IMAGES, 'to 25500;')])
def test_what_is_advised_converts_an_array(folder, array, wanted, message):
    path, arrays = folder / 'mine.npz', {'x_train': array, 'x_test': array[:5]}
    for key in arrays:
        write_npz(path, **arrays)
        described, advised = re.search(r'(.*)(np\.uint8\(.*\));', refusal(folder, path)).groups()
        arrays[key] = eval(advised, {'np': np, key: arrays[key]})
        assert key in described and message in described.replace('[5', '[24')
    assert abs(arrays['x_train'] - 1. * wanted).max() <= 1
    write_npz(path, **arrays)
    load(folder, [arrays['x_train'], None, arrays['x_test'], np.zeros(5)])


@pytest.mark.parametrize('change, message', [
    ({'x_train': np.array([None])}, 'allow_pickle=False'), ({'x_test': IMAGES[0]}, 'is [28, 28]'),
    ({'x_train': GREY[None]}, 'x_train is [1, 24, 28, 28, 3]'), ({'x_test': IMAGES[:0]}, '[0, 28'),
    ({'x_train': IMAGES * 1j}, 'of complex128;'), ({'y_train': LABELS * 1.}, 'y_train is [24] of'),
    ({'y_test': np.eye(7, dtype=int)}, 'y_test is [7, 7]'), ({'x_test': 'x'}, 'x_test is [] of'),
    ({'x_train': IMAGES[:1], 'y_train': LABELS[:1]}, ' (x_train): holds 1 image;'),
    ({'y_train': LABELS[1:]}, ' (y_train): holds 23 labels for 24'),
    ({'x_test': TEST_IMAGES[:, 1:]}, ' (x_test): holds images of 27 x 28')])
def test_npz_of_something_else_is_refused(folder, change, message):
    path = folder / 'mine.npz'
    write_npz(path, **dict(zip(KEYS, make_set()), **change))
    refused = refusal(folder, path)
    assert message in refused and ('holds' in message or 'expected are images x_train' in refused)
    write_npz(path, make_set())
    damaged = path.read_bytes().replace(b'PK\1\2', b'PK\1\3')  # Its list of arrays.
    for content in b'', b'<html>', b'PK\3\4', b'\0\0\10\3', damaged:
        path.write_bytes(content)
        assert 'expected are images x_train' in refusal(folder, path)


@pytest.mark.parametrize('height, width', [(30, 28), (28, 27), (25, 31)])
def test_what_is_advised_pads_images(folder, height, width):
    """Catches padding that is not enough, too much or not around the middle."""
    arrays = make_set(size=(height, width))
    write_set(folder, arrays)
    advised, = re.findall(r"of %d x %d, .*(np\.pad\(.*'constant'\))" % (height, width),
                          refusal(folder, folder / (NAMES[0] + '.gz')))
    padded = [eval(advised, {'np': np, 'x': x}) if x.ndim == 3 else x for x in arrays]
    write_set(folder, padded)
    load(folder, padded)
    margins = [(-size % 4 // 2, (-size % 4 + 1) // 2) for size in (0, height, width)]
    np.testing.assert_array_equal(padded[0], np.pad(arrays[0], margins, 'constant'))


def test_what_is_loaded_is_exactly_what_was_written(tmp_path):
    """700 files, some cut short, with flipped bits, half of them in the header, or both."""
    rng = np.random.RandomState(0)
    for case in range(700):
        array = rng.randint(rng.choice([2, 256]), size=(1 + case % 4, 28, 28)).astype(np.uint8)
        written = gzip.compress(idx(array)) if case % 3 else idx(array)
        content = bytearray(written[:rng.choice([len(written), rng.randint(len(written))])])
        for _ in range(rng.randint(3) if content else 0):
            content[rng.randint(rng.choice([20, 9999])) % len(content)] ^= 1 << rng.randint(8)
        path = tmp_path / str(case)
        path.write_bytes(content)
        try:
            result = data._read_idx(str(path), 3)
        except data.RunError as error:
            assert str(error).startswith(str(path)) and '\n' not in str(error)
        else:  # Without a checksum, other pixels are another valid file.
            assert idx(result) == (idx(array) if case % 3 else content)


def answer(handler, content, length=None, pause=0):
    handler.send_response(200)
    handler.send_header('Content-Length', str(length or len(content)))
    handler.end_headers()
    handler.wfile.write(content[:20])
    time.sleep(pause)
    handler.wfile.write(content[20:])


# Who waits for one that stalls gets a whole file in the end, and thereby fails the test.
FAULTS = {
    'not found': lambda handler, content: handler.send_error(404),
    'other bytes': lambda handler, content: answer(handler, bytes(len(content))),
    'hangs up halfway': lambda handler, content: answer(handler, content[:20], len(content)),
    'stalls halfway': lambda handler, content: answer(handler, content, pause=10),
    'gibberish': lambda handler, content: handler.wfile.write(b'\xff' * 500 + b'\r\n\r\n'),
}
SENT = {name + '.gz': gzip.compress(idx(array)) for name, array in zip(NAMES, make_set())}


@pytest.fixture
def mirrors(monkeypatch):
    """Makes mirrors, given each one's way to send the third file; returns what they are asked."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            _, number, name = self.path.split('/')
            way, asked = made[int(number)]
            asked.append('http://%s%s' % (self.headers['Host'], self.path))
            with contextlib.suppress(OSError):  # A client that hangs up is no failure of a test.
                (way if NAMES[2] in name else answer)(self, SENT[name])
        log_message = mock.Mock()

    def make(*ways):
        asked = []
        data.MIRRORS[:] = ['http://127.0.0.1:%d/%d/' % (server.server_port, len(made) + number)
                           for number in range(len(ways))]
        made.extend((way, asked) for way in ways)
        return asked
    made = []
    monkeypatch.setattr(data, 'FILES', {
        name: hashlib.sha256(SENT[name + '.gz']).hexdigest() for name in NAMES})
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=[.01]).start()
        yield make
        server.shutdown()


@pytest.mark.parametrize('fault', FAULTS)
def test_a_faulty_mirror_leaves_nothing_and_is_passed_over(folder, mirrors, monkeypatch, fault):
    """Catches waiting for ever, content unverified or kept in part, asking a bad mirror again."""
    (folder / '.hidden').write_bytes(b'mine')
    mirrors(FAULTS[fault])
    monkeypatch.setattr(data, 'TIMEOUT', .3)
    message = refusal(folder, dataset='mnist')
    assert data.MIRRORS[0] in message and len(message) < 400 and '--dataset synthetic' in message
    asked = mirrors(FAULTS[fault], answer)
    monkeypatch.setattr(data, 'TIMEOUT', 1)  # Enough for the good one on a busy machine.
    for _ in range(2):  # Nothing is asked for twice.
        load(folder, make_set(), dataset='mnist')
    assert {path.name: path.read_bytes() for path in (folder / 'MNIST').iterdir()} == SENT
    assert sorted(os.listdir(str(folder))) == ['.hidden', 'MNIST']
    (bad, good), names = data.MIRRORS, list(SENT)
    assert asked == [bad + name for name in names[:3]] + [good + name for name in names[2:]]
    assert all(re.match('https://.*/$', mirror) for mirror in MIRRORS)


@pytest.mark.parametrize('dataset, name', MADE.items())
@pytest.mark.parametrize('where', ['os.rename', 'data.open'])
@pytest.mark.parametrize('error', [KeyboardInterrupt(), OSError(28, 'No space left')])
def test_an_interrupted_run_is_taken_up_by_the_next(folder, mirrors, dataset, name, where, error):
    """Catches files in part under their names, and a full disk that is filled for good."""
    mirrors(answer)
    with mock.patch(where, create=True, side_effect=error):
        if isinstance(error, OSError):
            assert 'written (No space left)' in refusal(folder, folder / name, dataset)
        else:
            with pytest.raises(KeyboardInterrupt):
                data.load(str(folder), dataset)
            left, = folder.glob('.unfinished-*')
            (left / (NAMES[0] + '.gz' * (dataset == 'mnist'))).write_bytes(b'in part' * 10 ** 5)
    data.load(str(folder), dataset)
    assert os.listdir(str(folder)) == [name] and len(listing(folder)) == 5


@pytest.mark.parametrize('dataset, name', MADE.items())
def test_of_two_runs_at_once_the_first_serves_both(folder, mirrors, monkeypatch, dataset, name):
    def other(*args, **kwargs):
        write_set(folder / name, make_set(12))
        return answer(*args) if dataset == 'mnist' else synthesize(*args, **kwargs)
    synthesize = data.synthesize
    mirrors(other)
    monkeypatch.setattr(data, 'synthesize', other)
    load(folder, make_set(12), 1, dataset)
    assert os.listdir(str(folder)) == [name]


def test_auto_falls_back_to_synthetic_digits_and_keeps_them(folder, mirrors, monkeypatch, capsys):
    """Catches digits drawn again, or taken for MNIST once that can be downloaded."""
    folder, (images, labels) = folder / 'new' / 'folder', data.synthesize(70, 0)
    (folder / 'synthetic_digits').mkdir(parents=True)  # Of which someone has removed the files.
    wanted = images[:60], None, images[60:], labels[60:]
    for dataset in 'auto', 'synthetic', 'auto':
        asked = mirrors(FAULTS['not found'])
        loaded = load(folder, wanted, 5, dataset)
        assert loaded.name == 'synthetic digits' and bool(asked) == (dataset == 'auto')
        monkeypatch.setattr(data, 'synthesize', None)
        output = capsys.readouterr()
        assert 'Data: synthetic digits: 55 training, 5 validation and 10 test images' in output.out
        assert re.fullmatch('Warning: .*\n' if dataset == 'auto' else '', output.err)
    assert (folder / 'synthetic_digits' / NAMES[1]).read_bytes() == idx(labels[:60])
    mirrors(answer)
    load(folder, make_set())
    load(folder, wanted, 5, 'synthetic')


def test_synthetic_digits_are_all_different_and_like_mnists():
    """Each fits a box of 20 x 20, is centred by mass, and the nearest mean image tells most."""
    digits, labels = data.synthesize(3000, 1)
    assert all(map(np.array_equal, (digits, labels), data.synthesize(3000, 1)))
    assert len(np.unique(np.r_[digits, data.synthesize(200, 2)[0]], axis=0)) == 3200
    assert (np.bincount(labels) == 300).all() and (np.diff(labels) != 1).mean() > .8
    images = digits / 255
    for axis in (1, 2):
        inked = images.any(axis=axis)
        assert (28 - inked.argmax(1) - inked[:, ::-1].argmax(1)).max() <= 20
        centre = (images.sum(axis=axis) * np.arange(28)).sum(1) / images.sum(axis=(1, 2))
        assert abs(centre.mean() - 14) < .1 and abs(centre - 14).max() < 1
    means = np.stack([images[labels == digit].mean(0).ravel() for digit in range(10)])
    nearest = ((means ** 2).sum(1) - 2 * images.reshape(-1, 784) @ means.T).argmin(1)
    assert min((nearest == labels)[labels == digit].mean() for digit in range(10)) > .75


def test_bytes_become_floats_and_batches_hold_each_once_in_an_order_of_seed_and_epoch_alone():
    floats = data.to_float(np.arange(256, dtype=np.uint8))
    assert floats.dtype == np.float32 and floats[-1] == 1 and (floats * 255 == range(256)).all()
    def order(seed, epoch, size=7):
        parts = list(data.batches(np.arange(200), size, seed, epoch))
        assert [len(part) for part in parts] == [size] * (200 // size) + [200 % size]
        return tuple(np.concatenate(parts))
    orders = [order(seed, epoch) for seed in range(4) for epoch in range(4)]
    assert len(set(orders)) == 16 and all(sorted(some) == list(range(200)) for some in orders)
    assert orders[6] == order(seed=1, epoch=2, size=201)
    assert tuple(range(200)) not in orders and [*data.batches(IMAGES, 24, 0, 0)][0].dtype == 'uint8'


def test_binarised_pixels_are_white_with_their_grey_value_as_probability():
    """Catches noise that images or pixels share, or of another seed; black that is not kept."""
    images = np.arange(256, dtype=np.uint8).repeat(200).reshape(1, -1).repeat(300, 0)
    binary = data.binarise(images, 5, 1)
    assert binary.dtype == np.uint8 and set(np.unique(binary)) == {0, 255}
    share = (binary == 255).reshape(300, 256, 200).mean((0, 2))
    assert share[0] == 0 and share[255] == 1
    assert abs(share - np.arange(256) / 255).max() < .002 + 4 * .5 / 60000 ** .5
    assert len({row.tobytes() for row in binary}) == 300
    np.testing.assert_array_equal(binary, data.binarise(images, 5, 1))
    np.testing.assert_array_equal(binary, data.binarise(binary, 7))
    assert all((binary != data.binarise(images, *seed)).mean() > .1 for seed in [(5, 2), (4, 1)])
