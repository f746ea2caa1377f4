"""Tests of data.py. They never leave this machine: mirrors are HTTP servers on 127.0.0.1.

The tests of MNIST itself run where the environment variable MNIST_DIR names its folder.
"""

import contextlib
import gzip
import hashlib
import http.server
import os
import socket
import struct
import threading
import time
import tracemalloc
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

import data

NAMES = list(data.FILES)
needs_mnist = pytest.mark.skipif('MNIST_DIR' not in os.environ, reason='MNIST_DIR is not set')


def idx(array, shape=None):
    """The bytes of an IDX file; `shape` can lie."""
    shape = array.shape if shape is None else shape
    return struct.pack('>%dI' % (1 + len(shape)), 0x800 + len(shape), *shape) + array.tobytes()


def make_set(train=24, test=7):
    """Arrays of a small set, in the order of the four files."""
    rng = np.random.RandomState(0)
    return [rng.randint(256, size=shape).astype(np.uint8)
            for shape in [(train, 28, 28), train, (test, 28, 28), test]]


def write_set(folder, arrays, zipped=True):
    folder.mkdir(exist_ok=True)
    for i in range(4):
        content = idx(arrays[i])
        path = folder / (NAMES[i] + '.gz' * zipped)
        path.write_bytes(gzip.compress(content) if zipped else content)


def listing(folder):
    """Everything in a folder and below: kind, time of change and content of each entry."""
    return {path: (path.lstat().st_mode, path.is_dir() or path.lstat().st_mtime_ns,
                   path.is_file() and path.read_bytes())
            for path in folder.rglob('*')}


def refusal(path, function, *args):
    """The message with which a call refuses a path: one line, and nothing changes beside it."""
    before = listing(path.parent)
    with pytest.raises(data.DataError) as caught:
        function(*args)
    message = str(caught.value)
    assert message.startswith(str(path)) and '\n' not in message
    assert listing(path.parent) == before
    return message


def assert_split(loaded, images, labels, test_images, test_labels, held_out):
    """The set holds these images, the first of them for validation, with their labels."""
    wanted = [images[held_out:], labels[held_out:], images[:held_out], labels[:held_out],
              test_images, test_labels]
    for i in range(6):
        assert loaded[1 + i].dtype == np.uint8
        np.testing.assert_array_equal(loaded[1 + i], wanted[i])


def peak_memory(function, *args):
    """Bytes that a call allocates at most at a time."""
    tracemalloc.start()
    function(*args)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No test downloads from a public mirror, through a proxy, or draws 70,000 digits."""
    monkeypatch.setattr(data, 'MIRRORS', [])
    monkeypatch.setattr(data, 'SYNTHETIC_COUNTS', (60, 10))
    monkeypatch.setenv('no_proxy', '*')


# ---------------------------------------------------------------------------------------- Found


@pytest.mark.parametrize('count, held_out, dataset', [
    (2, 1, 'auto'), (23, 1, 'mnist'), (24, 2, 'auto'), (6000, 500, 'mnist')])
def test_any_set_is_found_and_a_twelfth_held_out(tmp_path, capsys, count, held_out, dataset):
    write_set(tmp_path, make_set(count), zipped=held_out == 1)
    before = listing(tmp_path)
    loaded = data.load(str(tmp_path), dataset)
    assert_split(loaded, *make_set(count), held_out=held_out)
    assert loaded.name == 'IDX files in %s' % tmp_path and loaded.warning is None
    counts = count - held_out, held_out
    assert tuple(capsys.readouterr()) == (
        'Data: %s: %d training, %d validation and 7 test images.\n' % ((loaded.name,) + counts), '')
    assert listing(tmp_path) == before


def test_zipped_and_plain_files_mix_and_plain_ones_come_first(tmp_path):
    write_set(tmp_path, make_set(), zipped=False)
    write_set(tmp_path, make_set())
    (tmp_path / NAMES[2]).unlink()
    (tmp_path / (NAMES[0] + '.gz')).write_bytes(b'')
    assert_split(data.load(str(tmp_path)), *make_set(), held_out=2)


def test_fingerprint_is_of_the_content_and_tells_mnist(tmp_path, monkeypatch):
    """Catches a fingerprint of the files, or of less than all four."""
    arrays, prints = make_set(), []
    for number in range(6):
        folder = tmp_path / str(number)
        if number > 1:  # Change the last pixel or label of one more file.
            arrays[number - 2].flat[-1] ^= 1
        write_set(folder, arrays, zipped=number != 1)
        prints.append(data.load(str(folder)).fingerprint)
    assert prints[0] == prints[1] and len(set(prints)) == 5
    monkeypatch.setattr(data, 'MNIST_FINGERPRINT', prints[1])
    assert [data.load(str(tmp_path / str(i))).name == 'MNIST' for i in range(3)] == [1, 1, 0]


@needs_mnist
def test_mnist_is_known_by_its_content_and_read_without_a_copy():
    folder = os.environ['MNIST_DIR']
    loaded = data.load(folder, 'mnist')
    assert loaded.name == 'MNIST' and len(loaded.train_images) == 55000
    for name, sha256 in data.FILES.items():
        content = Path(folder, name + '.gz').read_bytes()
        assert hashlib.sha256(content).hexdigest() == sha256
    assert peak_memory(data.load, folder) < 1.5 * 70000 * 785


# -------------------------------------------------------------------------------------- Refused


IMAGES, LABELS = make_set()[:2]
BAD_CONTENT = {  # The number of a file, its content, and what is said of it.
    'half a header': (2, idx(IMAGES)[:9], 'truncated within its header'),
    'a pixel short': (2, idx(IMAGES)[:-1], 'claims 18816 bytes of images and holds 18815'),
    'a byte more': (0, idx(IMAGES) + b'\0', 'bytes after its last image'),
    'text': (2, b'<html>Not found, sorry</html>', 'magic number 1013478509, not the 2051'),
    'labels': (2, idx(LABELS), 'magic number 2049, not the 2051 of images'),
    '27 x 28': (0, idx(IMAGES[:, 1:]), 'images of 27 x 28'),
    '784 x 1': (2, idx(IMAGES, shape=(24, 784, 1)), 'images of 784 x 1'),
    'no images': (0, idx(IMAGES[:0]), 'holds no images'),
    'a million images': (2, idx(IMAGES, shape=(10 ** 6, 28, 28)), 'claims 1000000 images, too'),
    '4 billion labels': (3, idx(LABELS, shape=[2 ** 32 - 1]), 'claims 4294967295 labels, too'),
    'fewer labels': (1, idx(LABELS[1:]), 'holds 23 labels for 24 images'),
    'other labels': (3, idx(LABELS), 'holds 24 labels for 7 images'),
}


@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize('case', BAD_CONTENT)
def test_bad_content_is_refused(tmp_path, case, zipped):
    number, content, message = BAD_CONTENT[case]
    write_set(tmp_path, make_set(), zipped)
    path = tmp_path / (NAMES[number] + '.gz' * zipped)
    path.write_bytes(gzip.compress(content) if zipped else content)
    assert message in refusal(path, data.load, str(tmp_path))


@pytest.mark.parametrize('damage, message', [
    (lambda content: content[:-8], 'ended before'),
    (lambda content: content[:-8] + bytes([content[-8] ^ 1]) + content[-7:], 'CRC check failed'),
    (lambda content: content[:-1] + bytes([content[-1] ^ 1]), 'Incorrect length'),
    (lambda content: content[:10] + b'\xff' + content[11:], 'invalid block'),
    (lambda content: content + b'more', 'Not a gzipped file'),
])
def test_bad_gzip_is_refused(tmp_path, damage, message):
    path = tmp_path / 'images.gz'
    path.write_bytes(damage(gzip.compress(idx(IMAGES))))
    assert message in refusal(path, data.read_idx, str(path), (28, 28))


def test_one_training_image_cannot_be_split(tmp_path):
    write_set(tmp_path, make_set(train=1))
    assert 'holds 1 image' in refusal(tmp_path / (NAMES[0] + '.gz'), data.load, str(tmp_path))


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('dataset', ['auto', 'mnist'])
def test_a_missing_file_is_named(tmp_path, name, dataset):
    write_set(tmp_path, make_set())
    (tmp_path / (name + '.gz')).unlink()
    assert 'is missing' in refusal(tmp_path / name, data.load, str(tmp_path), dataset)


@pytest.mark.parametrize('make, message', [
    (lambda path: path.mkdir(), 'is not a file'),
    # Someone waits to write into the pipe: reading it would else wait for ever.
    (lambda path: os.mkfifo(str(path)) or threading.Thread(
        target=path.write_bytes, args=[b''], daemon=True).start(), 'is not a file'),
    (lambda path: path.symlink_to(path.parent / 'nowhere'), 'No such file'),
])
def test_what_is_not_a_readable_file(tmp_path, make, message):
    write_set(tmp_path, make_set(), zipped=False)
    path = tmp_path / NAMES[1]
    path.unlink()
    make(path)
    assert message in refusal(path, data.load, str(tmp_path))


@pytest.mark.parametrize('dataset, inside', [
    ('auto', ''), ('mnist', ''), ('synthetic', data.SYNTHETIC_FOLDER)])
def test_what_cannot_be_the_folder(tmp_path, mirrors, dataset, inside):
    mirrors(answer)
    (tmp_path / 'file').write_bytes(b'mine')
    (tmp_path / 'link').symlink_to(tmp_path / 'nowhere')
    for name, message in ('file', 'cannot be read as a folder'), ('link', 'cannot be written'):
        path = tmp_path / name
        assert message in refusal(path / inside, data.load, str(path), dataset)


@pytest.mark.parametrize('claimed', [1000, 80000, 200000, 2 ** 32 - 1])
def test_a_bomb_takes_little_memory(tmp_path, claimed):
    path = tmp_path / 'bomb.gz'
    header = struct.pack('>4I', 2051, claimed, 28, 28)
    path.write_bytes(gzip.compress(header) + gzip.compress(bytes(2 ** 20)) * 300)
    assert peak_memory(refusal, path, data.read_idx, str(path), (28, 28)) < 100 * 2 ** 20


def test_what_is_loaded_is_exactly_what_was_written(tmp_path):
    """2,000 random files: random bytes, and valid files cut short or with flipped bits."""
    rng = np.random.RandomState(0)
    loaded = 0
    for case in range(2000):
        item_shape = [(28, 28), ()][rng.randint(2)]
        values = rng.choice([2, 256])  # Few values make for a rich gzip stream, many for a raw one.
        array = rng.randint(values, size=(rng.randint(1, 5),) + item_shape).astype(np.uint8)
        path = tmp_path / ['plain', 'zipped.gz', 'zipped.gz'][rng.randint(3)]
        content = bytearray(gzip.compress(idx(array)) if path.suffix else idx(array))
        if case % 3 == 0:
            content[rng.choice([0, 4, 10, 16]):] = rng.bytes(rng.randint(200))
        elif case % 3 == 1:
            del content[rng.randint(len(content) + 1):]
        else:
            for _ in range(rng.randint(4)):  # Half of the bits in the header.
                end = rng.choice([min(20, len(content)), len(content)])
                content[rng.randint(end)] ^= 1 << rng.randint(8)
        path.write_bytes(content)
        try:
            result = data.read_idx(str(path), item_shape)
        except data.DataError as error:
            assert str(error).startswith(str(path)) and '\n' not in str(error)
        else:
            # Without a checksum, other pixels or labels are another valid file.
            assert idx(result) == (idx(array) if path.suffix else content)
            loaded += 1
    assert 200 < loaded < 1000


# -------------------------------------------------------------------------------------- Fetched


def answer(handler, content, length=None, pause=0):
    handler.send_response(200)
    handler.send_header('Content-Length', str(length or len(content)))
    handler.end_headers()
    handler.wfile.write(content[:20])
    time.sleep(pause)
    handler.wfile.write(content[20:])


# Who waits for those that stall gets a whole file in the end, and thereby fails the test.
FAULTS = {
    'not found': lambda handler, content: handler.send_error(404),
    'other bytes': lambda handler, content: answer(handler, bytes(len(content))),
    'hangs up halfway': lambda handler, content: answer(handler, content[:20], len(content)),
    'hangs up at once': lambda handler, content: None,
    'stalls halfway': lambda handler, content: answer(handler, content, pause=10),
    'stalls at once': lambda handler, content: time.sleep(10) or answer(handler, content),
    'gibberish': lambda handler, content: handler.wfile.write(b'\xff\n' * 100 + b'\r\n\r\n'),
}


SENT = {NAMES[i] + '.gz': gzip.compress(idx(make_set()[i])) for i in range(4)}


@pytest.fixture
def mirrors(monkeypatch):
    """Makes mirrors of a small set that passes for MNIST: `mirrors(way_to_send_a_file, ...)`.

    Returns the list of what they are asked for. Only the third file is sent that way.
    """
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            _, number, name = self.path.split('/')
            way, asked = made[int(number)]
            asked.append('http://%s%s' % (self.headers['Host'], self.path))
            with contextlib.suppress(OSError):  # A client that hangs up is no failure of a test.
                (way if NAMES[2] in name else answer)(self, SENT[name])

        def log_message(self, *_):
            pass

    def make(*ways):
        asked = []
        data.MIRRORS[:] = ['http://127.0.0.1:%d/%d/' % (server.server_port, len(made) + number)
                           for number in range(len(ways))]
        made.extend((way, asked) for way in ways)
        return asked
    made = []
    sums = {name: hashlib.sha256(SENT[name + '.gz']).hexdigest() for name in NAMES}
    monkeypatch.setattr(data, 'FILES', sums)
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=[.01]).start()
        yield make
        server.shutdown()


def test_download_into_a_new_folder(tmp_path, mirrors, monkeypatch):
    asked = mirrors(answer, answer)
    wanted = [data.MIRRORS[0] + name for name in SENT]
    data.MIRRORS.insert(0, 'http://127.0.0.1:1/')  # Where nobody listens.
    monkeypatch.chdir(tmp_path)
    folder = Path('~', 'folder')  # Not the home folder, as `get_file` would have it.
    for _ in range(2):
        assert_split(data.load(str(folder)), *make_set(), held_out=2)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == SENT
        assert asked == wanted


@pytest.mark.parametrize('fault', FAULTS)
def test_a_faulty_mirror_leaves_nothing_and_is_passed_over(tmp_path, mirrors, monkeypatch, fault):
    """Catches waiting for ever, content unverified or kept in part, asking a bad mirror again."""
    folder = tmp_path / 'folder'
    folder.mkdir()
    (folder / 'mine').write_bytes(b'mine')
    mirrors(FAULTS[fault])
    monkeypatch.setattr(data, 'TIMEOUT', .3)
    message = refusal(folder, data.load, str(folder), 'mnist')
    assert data.MIRRORS[0] in message and len(message) < 400
    assert socket.getdefaulttimeout() is None

    asked = mirrors(FAULTS[fault], answer)
    monkeypatch.setattr(data, 'TIMEOUT', 3)  # Enough for the good one on a busy machine.
    data.load(str(folder), 'mnist')
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert files == dict(SENT, mine=b'mine')
    (bad, good), names = data.MIRRORS, list(SENT)
    assert asked == [bad + name for name in names[:3]] + [good + name for name in names[2:]]


@pytest.mark.parametrize('dataset', ['mnist', 'synthetic'])
@pytest.mark.parametrize('error', [KeyboardInterrupt(), OSError(28, 'No space left')])
def test_an_interruption_leaves_nothing(tmp_path, mirrors, dataset, error):
    mirrors(answer)
    with mock.patch('os.replace', side_effect=error):
        with pytest.raises((KeyboardInterrupt, data.DataError)):
            data.load(str(tmp_path), dataset)
    assert {path.name for path in tmp_path.rglob('*')} <= {data.SYNTHETIC_FOLDER}
    data.load(str(tmp_path), dataset)


def test_a_set_that_came_during_the_download_stays(tmp_path, mirrors):
    def user(handler, content):
        write_set(tmp_path, make_set(train=12))
        answer(handler, content)
    mirrors(user)
    assert_split(data.load(str(tmp_path), 'mnist'), *make_set(train=12), held_out=1)


# ----------------------------------------------------------------------------------------- Made


def test_auto_falls_back_to_synthetic_digits(tmp_path, mirrors, capsys):
    mirrors(FAULTS['not found'])
    loaded = data.load(str(tmp_path), 'auto')
    output = capsys.readouterr()
    assert loaded.name == 'synthetic digits' and loaded.name in output.out
    assert output.err == loaded.warning + '\n' and len(loaded.warning) < 100
    assert 'synthetic digits' in loaded.warning and '\n' not in loaded.warning
    # Kept, but not in a way that could be taken for MNIST, once that can be downloaded.
    mirrors(answer)
    assert_split(data.load(str(tmp_path), 'auto'), *make_set(), held_out=2)


def test_synthetic_never_looks_for_mnist_and_keeps_its_digits(tmp_path, mirrors, monkeypatch):
    asked = mirrors(answer)
    write_set(tmp_path, make_set())
    (tmp_path / (NAMES[0] + '.gz')).write_bytes(b'')
    before = listing(tmp_path)
    images, labels = data.synthesize(70, 0)
    for _ in range(2):
        loaded = data.load(str(tmp_path), 'synthetic')
        assert loaded.name == 'synthetic digits' and loaded.warning is None and not asked
        assert_split(loaded, images[:60], labels[:60], images[60:], labels[60:], held_out=5)
        monkeypatch.setattr(data, 'synthesize', None)  # They need not be drawn again.
    after = listing(tmp_path)
    assert {path: after[path] for path in before} == before
    assert {path.name for path in after if path not in before} == {data.SYNTHETIC_FOLDER, *NAMES}


@pytest.fixture(scope='module')
def digits():
    return data.synthesize(6000, 1)  # Enough for ways of writing to be drawn in parts.


def test_synthetic_digits_depend_on_the_seed_only(digits):
    np.random.seed(5)
    images, labels = data.synthesize(6000, 1)
    np.testing.assert_array_equal(images, digits[0])
    np.testing.assert_array_equal(labels, digits[1])
    assert (images != data.synthesize(6000, 2)[0]).any(axis=(1, 2)).all()


def test_synthetic_digits_are_balanced_shuffled_and_all_different(digits):
    images, labels = digits
    assert (np.bincount(labels) == 600).all()
    assert (np.bincount(labels[:500]) > 25).all()
    assert (np.diff(labels.astype(int)) != 1).mean() > .8
    assert len({image.tobytes() for image in images}) == len(images)


def test_synthetic_digits_look_like_mnists(digits):
    images = digits[0] / 255
    mass = images.sum(axis=(1, 2))
    for axis in (1, 2):
        # In a box of 20 x 20 pixels.
        inked = digits[0].any(axis=axis)
        assert (28 - inked.argmax(1) - inked[:, ::-1].argmax(1)).max() <= 20
        # Centred by mass, as MNIST's on pixel (14, 14) to the nearest pixel.
        centre = (images.sum(axis=axis) * np.arange(28)).sum(1) / mass
        assert abs(centre.mean() - 14) < .1 and abs(centre - 14).max() < 1
    # As much ink (MNIST: 0.131), mostly none or full, with soft edges (MNIST: 81% and 7%).
    assert .09 < images.mean() < .15
    assert .75 < (images == 0).mean() < .88 and .04 < (images > .98).mean() < .12
    assert mass.min() > 15  # Every digit is written, large enough to read.


def test_each_digit_has_a_shape_of_its_own(digits):
    """The nearest mean image tells most of each digit: none has another's glyphs."""
    images, labels = digits[0].reshape(-1, 784) / 255, digits[1]
    means = np.stack([images[labels == digit].mean(0) for digit in range(10)])
    nearest = ((means ** 2).sum(1) - 2 * images @ means.T).argmin(1)
    assert min((nearest == labels)[labels == digit].mean() for digit in range(10)) > .75
    # And they vary; MNIST's by 42.
    assert ((images - means[labels]) ** 2).sum(1).mean() > 20


@needs_mnist
def test_mnist_tells_what_the_synthetic_digits_are(digits):
    """The nearest of 5,000 real digits reads them; a convolutional network reads 98%."""
    real = data.load(os.environ['MNIST_DIR'])
    known = real.validation_images.reshape(-1, 784) / 255
    images, labels = digits[0].reshape(-1, 784) / 255, digits[1]
    nearest = ((known ** 2).sum(1) - 2 * images @ known.T).argmin(1)
    assert (real.validation_labels[nearest] == labels).mean() > .85


# -------------------------------------------------------------------------------------- Batches


@pytest.mark.parametrize('batch_size, sizes', [(3, [3, 3, 3, 1]), (5, [5, 5]), (100, [10])])
def test_batches_hold_each_image_once(batch_size, sizes):
    images = np.repeat(np.arange(10, dtype=np.uint8), 784).reshape(-1, 28, 28)
    parts = list(data.batches(images, batch_size, seed=1, epoch=0))
    assert [part.shape for part in parts] == [(size, 28, 28) for size in sizes]
    assert np.concatenate(parts).dtype == np.uint8
    assert sorted(np.concatenate(parts)[:, 0, 0]) == list(range(10))


def test_order_of_batches_depends_on_seed_and_epoch_only():
    def order(seed, epoch, batch_size=7):
        return tuple(np.concatenate(list(data.batches(np.arange(200), batch_size, seed, epoch))))
    pairs = [(seed, epoch) for seed in range(5) for epoch in range(5)]
    orders = [order(*pair) for pair in pairs]
    assert len(set(orders)) == 25 and tuple(range(200)) not in orders
    assert orders == [order(*pair, batch_size=9) for pair in reversed(pairs)][::-1]


def test_bytes_become_floats_from_0_to_1():
    floats = data.to_float(np.arange(256, dtype=np.uint8))
    assert floats.dtype == np.float32 and floats[0] == 0 and floats[-1] == 1
    np.testing.assert_array_equal(floats * 255, np.arange(256))
