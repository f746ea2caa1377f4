"""Tests of data.py. One needs the .gz files of MNIST, in the folder that MNIST_DIR names."""

import contextlib
import gzip
import hashlib
import http.server
import os
import re
import threading
from unittest import mock

import numpy as np
import pytest

import data

FILES, NAMES, SYNTHESIZE = data.FILES, [name[:-3] for name in data.FILES], data.synthesize


def make_set(train=24, test=7):
    rng = np.random.RandomState(0)
    return [rng.randint(256, size=shape).astype(np.uint8)
            for shape in [(train, 16, 12), train, (test, 16, 12), test]]


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, '>u4').tobytes() + array.tobytes()


class Mirror(http.server.BaseHTTPRequestHandler):
    log_message, asked = mock.Mock(), []

    def do_GET(self):
        _, way, name = self.path.split('/')  # The address says how to send the file.
        self.asked.append((way, name))
        self.protocol_version = '\xff' if way == 'gibberish' else 'HTTP/1.0'
        self.send_response(404 if way == 'missing' else 200)
        self.end_headers()
        threading.Event().wait(5 * (way == 'stalls'))  # A client that waits gets the file.
        self.wfile.write(SENT[name] + b'\0' * (way == 'damaged'))


ARRAYS = IMAGES, LABELS, TEST_IMAGES, _ = make_set()
SENT = {name + '.gz': gzip.compress(idx(array)) for name, array in zip(NAMES, ARRAYS)}
HASHES = {name: hashlib.sha256(content).hexdigest() for name, content in SENT.items()}
SERVER = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Mirror)
threading.Thread(target=SERVER.serve_forever, daemon=True).start()
MIRROR = 'http://127.0.0.1:%d/good/' % SERVER.server_port


def write_set(folder, arrays, form='%s.gz', pack=gzip.compress, names=NAMES):
    for name, array in zip(names, arrays):
        path = folder / form.replace('%s', name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pack(idx(array)))
    if path.suffix == '.npz':
        np.savez(str(path), **dict(zip(data.KEYS, arrays)))


def load(data_dir, arrays, held_out=2):
    """Loads a set, which must be these arrays, with so many images held out for validation."""
    loaded = data.load(str(data_dir))
    images, _, *tests = arrays
    np.testing.assert_equal(loaded[1:5], (images[held_out:], images[:held_out], *tests))
    return loaded


def refusal(data_dir):
    """Returns the line with which `load` refuses. Nothing is fetched or written."""
    before = sorted(data_dir.parent.rglob('*'))
    with pytest.raises(data.RunError, match=r'^%s[^\n]+\Z' % re.escape(str(data_dir))) as caught:
        data.load(str(data_dir))
    assert sorted(data_dir.parent.rglob('*')) == before and not Mirror.asked
    return str(caught.value)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty data folder. The mirror is local and other arrays stand for synthetic digits."""
    monkeypatch.setenv('no_proxy', '*')
    Mirror.asked.clear()
    with mock.patch.multiple(data, FILES=HASHES, MIRRORS=[MIRROR], TIMEOUT=.3, synthesize=(
            lambda count, seed: make_set(count // 1000 + seed)[:2])):
        yield tmp_path


@pytest.mark.skipif('MNIST_DIR' not in os.environ, reason='MNIST_DIR is not set')
def test_mnist_is_known_by_its_sums_and_its_content(folder):
    mirror = 'file://%s/' % os.path.abspath(os.environ['MNIST_DIR'])
    with mock.patch.multiple(data, FILES=FILES, MIRRORS=[mirror]):
        assert data.load(str(folder)).name == 'MNIST'


@pytest.mark.parametrize('pack, old, new', [
    (bytes, '', ''), (bytes, '-idx', '.idx'), (gzip.compress, 't10k', 'test')])
@pytest.mark.parametrize('form', [
    '%s', '%s.gz', 'emnist-digits-%s.gz', 'MNIST/raw/%s', '%s/%s', 'mine.npz', 'a/mine.npz'])
def test_names_and_containers_do_not_matter(folder, monkeypatch, form, pack, old, new):
    """Files nearby, in IDX format and unzipped come first. Only the content makes them MNIST."""
    names, fingerprint = [name.replace(old, new) for name in NAMES], '6f41142476bef656'
    (folder / 'training_state.npz').write_bytes(b'of a run in the same folder')
    write_set(folder, make_set(3), 'further/' + form)
    write_set(folder, make_set(4), form.replace('.npz', '') + '.npz')
    write_set(folder, make_set(5), form + '.gz', names=names)
    write_set(folder, [np.asfortranarray(array) for array in ARRAYS], form, pack, names)
    monkeypatch.chdir(folder)
    for path in folder, '.':
        name, *_, found = load(path, ARRAYS)
        assert found == fingerprint and re.match('images in test_names.{9,20}$', name)
    with mock.patch('data.MNIST_FINGERPRINT', fingerprint):
        assert load(folder, ARRAYS).name == 'MNIST'


@pytest.mark.parametrize('end', ['-%s', '/%s', '.npz'])
def test_only_the_chosen_one_of_several_sets_is_loaded(folder, capsys, end):
    """A missing folder that cannot be downloaded gives synthetic digits. Nothing is written."""
    data.MIRRORS[0] = MIRROR.replace('good', 'missing')
    write_set(folder, make_set(2), 'MNIST_x' + end)
    write_set(folder, make_set(23), 'MNIST_y' + end)
    write_set(folder / 'beside', ARRAYS)
    one, other = (re.sub('.%s', '', str(folder / name) + end) for name in ('MNIST_x', 'MNIST_y'))
    assert other in refusal(folder) and refusal(folder).split()[-1] == one  # As an example.
    load(one, make_set(2), 1)
    load(os.path.relpath(other), make_set(23), 1)
    for path in folder / 'MNIST', os.path.relpath(str(folder / 'MNIST')), folder / 'beside/MNIST':
        loaded = load(path, make_set(60)[:2] + make_set(11)[:2], 5)
        assert loaded.name == 'synthetic digits' and not os.path.exists(str(path))
        assert re.fullmatch('Warning: .*MNIST.*\n', capsys.readouterr().err)


@pytest.mark.parametrize('keys, array', [
    ('x_test', IMAGES / np.float32(255)), ('x_test', IMAGES // 255), ('x_train', IMAGES // 255),
    ('x_test', IMAGES * 1.), ('x', IMAGES[..., None]), ('x', IMAGES[..., None].repeat(4, 3)),
    ('x', IMAGES[:1]), ('x_test', IMAGES[:0]), ('x_test', IMAGES[:, 4:]), ('x', IMAGES[:, 2:]),
    ('x', IMAGES[..., 1:]), ('x_test', LABELS), ('y_train', LABELS / 2), ('y_train', LABELS[1:])])
def test_labels_may_be_missing_and_what_does_not_fit_is_refused(folder, keys, array):
    arrays = {'x_train': IMAGES, 'x_test': TEST_IMAGES}
    np.savez(str(folder / 'mine.npz'), **arrays)
    load(folder, [IMAGES, None, TEST_IMAGES, np.zeros(7)])
    arrays.update((key, array) for key in data.KEYS if key.startswith(keys))
    np.savez(str(folder / 'mine.npz'), **arrays)
    assert '%s %s' % (array.dtype, list(array.shape)) in refusal(folder)


def test_other_files_are_left_alone_and_at_most_nine_are_listed(folder):
    for name in 'abcdefghijkl':
        (folder / name).write_bytes(b'PK\3\4')
    write_set(folder, ARRAYS, 'z/a/b/%s')  # This is one level too deep.
    assert re.search('a, b, c, d, e, f, g, h, i[^,].* .npz', refusal(folder))
    write_set(folder / 'incomplete', make_set(9)[:3])
    write_set(folder / 'floats', ARRAYS, pack=lambda content: b'\0\0\r' + content[3:])
    assert all(refusal(folder / name) for name in ['a', 'missing.npz', 'incomplete', 'floats'])
    for array, text in (None, 'allow_pickle'), (IMAGES, 'x_test is not a file'):
        np.savez(str(folder / 'mine.npz'), x_train=array)
        assert text in refusal(folder / 'mine.npz')
    load(folder / 'z', ARRAYS)


def test_what_is_loaded_is_exactly_what_was_written(folder):
    write_set(folder, ARRAYS)
    rng, raw = np.random.RandomState(0), idx(TEST_IMAGES)
    for case in range(1000):
        content = gzip.compress(raw) if case % 2 else raw
        size = len(content) + rng.choice([0, 0, 1, -1, -len(content), -rng.randint(len(content))])
        content = bytearray(content[:size].ljust(size, b'\0'))
        for _ in range(rng.randint(3) if size else 0):
            content[rng.randint(-9, rng.choice([9, 9999])) % size] ^= 1 << rng.randint(8)
        (folder / (NAMES[2] + '.gz')).write_bytes(content)
        with contextlib.suppress(data.RunError):
            assert idx(data.load(str(folder)).test_images) == (raw if case % 2 else content)


@pytest.mark.parametrize('fault', ['missing', 'damaged', 'gibberish', 'stalls'])
def test_only_missing_files_are_downloaded_from_the_first_good_mirror(folder, fault):
    data.MIRRORS.insert(0, MIRROR.replace('good', fault))
    names = sorted(SENT)
    for name in names[:2]:
        (folder / name).write_bytes(SENT[name])
    (folder / ('.unfinished-' + names[2])).write_bytes(b'in part' * 10 ** 5)
    for _ in range(2):
        load(folder, ARRAYS)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == SENT
    assert Mirror.asked == [(way, name) for name in names[2:] for way in (fault, 'good')]


def test_a_failed_write_keeps_the_old_content(folder):
    """After it, a file is unchanged, and a download is completed by the next run."""
    path = folder / 'file'
    data.write_atomically(path, b'old')
    for action in lambda: data.write_atomically(path, b'new'), lambda: data.load(str(folder / 'x')):
        with mock.patch('os.fsync', side_effect=OSError), pytest.raises(OSError):
            action()
    assert path.read_bytes() == b'old' and not [*folder.glob('x/[!.]*')]
    load(folder / 'x', ARRAYS)


def test_synthetic_digits_are_legible_and_all_different():
    """They depend only on the seed, and the nearest mean image tells most of them."""
    (digits, labels), (others, answers) = SYNTHESIZE(2000, 1), SYNTHESIZE(2000, 2)
    assert all(map(np.array_equal, (digits, labels), SYNTHESIZE(2000, 1)))
    assert digits.dtype == np.uint8 and len(np.unique(np.r_[digits, others], axis=0)) == 4000
    means = np.stack([digits[labels == digit].mean(0).ravel() for digit in range(10)])
    nearest = ((means ** 2).sum(1) - others.reshape(2000, 784) @ (2 * means.T)).argmin(1)
    assert (nearest == answers).mean() > .6


def test_batches_hold_each_image_once_in_an_order_of_seed_and_epoch_alone():
    numbers = list(range(256))
    orders = [np.concatenate([*data.batches(np.arange(256), *how)]).tolist()
              for how in [(7, 1, 2), (300, 1, 2), (7, 1, 3), (7, 2, 2), (7, 2, 1)]]
    assert all(sorted(order) == numbers for order in orders) and orders[0] == orders[1]
    assert len(set(map(str, [numbers, *orders]))) == 5
    assert [len(batch) for batch in data.batches(np.arange(256), 7, 0, 0)] == [7] * 36 + [4]


def test_binarised_pixels_have_their_grey_value_as_probability():
    """Black and white pixels stay. Each image, pixel and seed has noise of its own."""
    images = np.tile(np.arange(256, dtype=np.uint8), (20000, 1))
    binary, floats = data.binarise(images, 5, 1), data.to_float(images[0])
    assert floats.dtype == np.float32 and floats[-1] == 1 and (floats * 255 == images[0]).all()
    assert abs(data.to_float(binary).mean(0) - floats).max() < 4 * .5 / 20000 ** .5
    assert binary.dtype == np.uint8 and len(np.unique(binary[:99], axis=0)) == 99
    same = [np.array_equal(binary, data.binarise(*how)) for how in [
        (binary, 7), (images, 5, 1), (images, 5, 2), (images, 4, 1)]]
    assert same == [True, True, False, False]
