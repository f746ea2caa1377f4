"""Tests of data.py. They never leave this machine: mirrors are HTTP servers on 127.0.0.1.

The tests of MNIST itself run where the environment variable MNIST_DIR names its folder.
"""

import contextlib
import gzip
import hashlib
import http.server
import os
import random
import socket
import struct
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import data

NAMES = list(data.FILES)


def idx(array, magic=None, shape=None):
    """The bytes of an IDX file; `magic` and `shape` can lie."""
    shape = array.shape if shape is None else shape
    magic = 0x800 + len(shape) if magic is None else magic
    return struct.pack('>%dI' % (1 + len(shape)), magic, *shape) + array.tobytes()


def make_set(train=24, test=7):
    """Arrays of a small set, in the order of the four files."""
    rng = np.random.RandomState(0)
    return [rng.randint(256, size=shape).astype(np.uint8)
            for shape in [(train, 28, 28), train, (test, 28, 28), test]]


def write_set(folder, arrays, zipped=True):
    for name, array in zip(NAMES, arrays):
        if zipped:
            (folder / (name + '.gz')).write_bytes(gzip.compress(idx(array)))
        else:
            (folder / name).write_bytes(idx(array))


def listing(folder):
    """Everything in a folder: name, kind, content and modification time of each entry."""
    entries = {}
    for path in folder.iterdir():
        status = os.lstat(str(path))
        content = path.read_bytes() if path.is_file() else None
        entries[path.name] = status.st_mode, status.st_mtime_ns, content
    return entries


def refusal(path, item_shape=(28, 28)):
    """The message with which a file is refused: one line that names the file."""
    with pytest.raises(data.DataError) as caught:
        data.read_idx(str(path), item_shape)
    message = str(caught.value)
    assert message.startswith(str(path)) and '\n' not in message
    return message


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No test downloads from a public mirror, or through a proxy."""
    monkeypatch.setattr(data, 'MIRRORS', [])
    monkeypatch.setenv('no_proxy', '*')


@pytest.fixture
def few_digits(monkeypatch):
    monkeypatch.setattr(data, 'SYNTHETIC_COUNTS', (60, 10))


# Found


@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize('dataset', ['auto', 'mnist'])
def test_finds_any_set_in_the_format(tmp_path, capsys, zipped, dataset):
    arrays = make_set()
    write_set(tmp_path, arrays, zipped)
    before = listing(tmp_path)
    loaded = data.load(str(tmp_path), dataset)
    np.testing.assert_array_equal(loaded.validation_images, arrays[0][:2])
    np.testing.assert_array_equal(loaded.validation_labels, arrays[1][:2])
    np.testing.assert_array_equal(loaded.train_images, arrays[0][2:])
    np.testing.assert_array_equal(loaded.train_labels, arrays[1][2:])
    np.testing.assert_array_equal(loaded.test_images, arrays[2])
    np.testing.assert_array_equal(loaded.test_labels, arrays[3])
    assert all(array.dtype == np.uint8 for array in loaded[1:7])
    assert loaded.name == 'IDX files in %s' % tmp_path and loaded.warning is None
    assert loaded.name in capsys.readouterr().out
    assert listing(tmp_path) == before


@pytest.mark.parametrize('count, held_out', [(2, 1), (11, 1), (12, 1), (24, 2), (6000, 500)])
def test_holds_out_a_twelfth(tmp_path, count, held_out):
    write_set(tmp_path, make_set(train=count))
    loaded = data.load(str(tmp_path))
    assert len(loaded.validation_images) == len(loaded.validation_labels) == held_out
    assert len(loaded.train_images) == len(loaded.train_labels) == count - held_out


def test_one_training_image_cannot_be_split(tmp_path):
    write_set(tmp_path, make_set(train=1))
    with pytest.raises(data.DataError, match='holds 1 image'):
        data.load(str(tmp_path))


def test_zipped_and_plain_files_mix_and_plain_ones_come_first(tmp_path):
    arrays = make_set()
    write_set(tmp_path, make_set(train=3))
    write_set(tmp_path, arrays, zipped=False)
    (tmp_path / NAMES[2]).unlink()
    assert len(data.load(str(tmp_path)).train_images) == 22


def test_fingerprint_is_of_the_content(tmp_path):
    arrays = make_set()
    prints = []
    for number in range(6):
        folder = tmp_path / str(number)
        folder.mkdir()
        if number > 1:  # Change the last pixel or label of one more file.
            arrays[number - 2].flat[-1] ^= 1
        write_set(folder, arrays, zipped=number != 1)
        prints.append(data.load(str(folder)).fingerprint)
    assert prints[0] == prints[1] and len(set(prints)) == 5


def test_mnist_is_known_by_its_content(tmp_path, monkeypatch):
    write_set(tmp_path, make_set())
    monkeypatch.setattr(data, 'MNIST_FINGERPRINT', data.load(str(tmp_path)).fingerprint)
    assert data.load(str(tmp_path)).name == 'MNIST'


@pytest.mark.skipif('MNIST_DIR' not in os.environ, reason='MNIST_DIR names no folder of MNIST')
def test_mnist(tmp_path):
    folder = os.environ['MNIST_DIR']
    loaded = data.load(folder, 'mnist')
    assert loaded.name == 'MNIST'
    assert [len(array) for array in loaded[1:7]] == [55000, 55000, 5000, 5000, 10000, 10000]
    images = np.concatenate([loaded.validation_images, loaded.train_images])
    assert abs(images.mean() / 255 - .1307) < 1e-4
    assert list(loaded.validation_labels[:5]) == [5, 0, 4, 1, 9]
    for name, (size, sha256) in data.FILES.items():
        with open(os.path.join(folder, name + '.gz'), 'rb') as file:
            content = file.read()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (size, sha256)
        # The same images under another compression are still MNIST; with one pixel changed, not.
        plain = bytearray(gzip.decompress(content))
        plain[-1] ^= name == NAMES[2]
        (tmp_path / name).write_bytes(plain)
    assert data.load(str(tmp_path)).name != 'MNIST'
    plain = (tmp_path / NAMES[2]).read_bytes()
    (tmp_path / NAMES[2]).write_bytes(plain[:-1] + bytes([plain[-1] ^ 1]))
    assert data.load(str(tmp_path)).name == 'MNIST'


@pytest.mark.skipif('MNIST_DIR' not in os.environ, reason='MNIST_DIR names no folder of MNIST')
def test_mnist_takes_at_most_twice_its_own_memory():
    script = ('import data, resource, sys;'
              'peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;'
              'before = peak(); data.load(sys.argv[1]); print(peak() - before)')
    output = subprocess.check_output([sys.executable, '-c', script, os.environ['MNIST_DIR']],
                                     cwd=os.path.dirname(data.__file__))
    assert int(output.split()[-1]) * 1024 < 2 * 70000 * 785


# Refused


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('dataset', ['auto', 'mnist'])
def test_a_missing_file_is_named(tmp_path, name, dataset):
    write_set(tmp_path, make_set())
    (tmp_path / (name + '.gz')).unlink()
    before = listing(tmp_path)
    with pytest.raises(data.DataError) as caught:
        data.load(str(tmp_path), dataset)
    assert not isinstance(caught.value, data.DownloadError)
    assert str(tmp_path / name) in str(caught.value)
    assert 'is missing while others' in str(caught.value)
    assert listing(tmp_path) == before


def test_a_set_that_is_just_arriving_is_not_missing_a_file(tmp_path):
    arrays = make_set()
    write_set(tmp_path, arrays)
    last = tmp_path / (NAMES[3] + '.gz')
    last.rename(tmp_path / 'last')
    timer = threading.Timer(.03, (tmp_path / 'last').rename, [last])
    timer.start()
    assert len(data.load(str(tmp_path)).test_images) == 7
    timer.join()


IMAGES = make_set()[0]
LABELS = make_set()[1]
BAD_CONTENT = {  # The content of a file that should be of images, and what is said of it.
    'empty': (b'', 'truncated within its header'),
    'half a header': (idx(IMAGES)[:9], 'truncated within its header'),
    'header only': (idx(IMAGES)[:16], 'truncated'),
    'half': (idx(IMAGES)[:9000], 'truncated: it claims 18816 bytes of images and holds 8984'),
    'one byte short': (idx(IMAGES)[:-1], 'truncated'),
    'one byte more': (idx(IMAGES) + b'\0', 'bytes after its last image'),
    'two sets': (idx(IMAGES) * 2, 'bytes after its last image'),
    'text': (b'<html>Not found, sorry</html>', 'magic number'),
    'floats': (idx(IMAGES, magic=0xd03), 'magic number'),
    'labels': (idx(LABELS), r'magic number 2049 \(labels\), not the 2051 of images'),
    '27 x 28': (idx(IMAGES[:, 1:]), '27 x 28'),
    '784 x 1': (idx(IMAGES, shape=(24, 784, 1)), '784 x 1'),
    'no images': (idx(IMAGES[:0]), 'holds no images'),
    '4 billion': (idx(IMAGES, shape=(2 ** 32 - 1, 28, 28)), '4294967295 images, too many'),
    'a million': (idx(IMAGES, shape=(10 ** 6, 28, 28)), '1000000 images, too many'),
}


@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize('case', BAD_CONTENT)
def test_bad_content_is_refused(tmp_path, case, zipped):
    content, message = BAD_CONTENT[case]
    write_set(tmp_path, make_set(), zipped)
    for name in (NAMES[0], NAMES[2]):
        path = tmp_path / (name + '.gz' * zipped)
        good = path.read_bytes()
        path.write_bytes(gzip.compress(content) if zipped else content)
        before = listing(tmp_path)
        with pytest.raises(data.DataError, match=message) as caught:
            data.load(str(tmp_path))
        assert str(caught.value).startswith(str(path)) and '\n' not in str(caught.value)
        assert listing(tmp_path) == before
        path.write_bytes(good)


def test_images_where_labels_belong(tmp_path):
    path = tmp_path / 'labels.gz'
    path.write_bytes(gzip.compress(idx(IMAGES)))
    assert 'magic number 2051 (images), not the 2049 of labels' in refusal(path, ())


@pytest.mark.parametrize('damage, message', [
    (lambda content: content[:5], 'ended before'),
    (lambda content: content[:9000], 'ended before'),
    (lambda content: content[:-1], 'ended before'),
    (lambda content: content[:-8], 'ended before'),
    (lambda content: content[:-8] + bytes([content[-8] ^ 1]) + content[-7:], 'CRC check failed'),
    (lambda content: content[:-1] + bytes([content[-1] ^ 1]), 'Incorrect length'),
    (lambda content: content[:20] + b'\xff' * 9 + content[29:], ''),
    (lambda content: content + b'more', 'Not a gzipped file'),
    (lambda content: gzip.decompress(content), 'Not a gzipped file'),
    (lambda content: b'', 'truncated'),
])
def test_bad_gzip_is_refused(tmp_path, damage, message):
    path = tmp_path / 'images.gz'
    path.write_bytes(damage(gzip.compress(idx(IMAGES))))
    assert message in refusal(path)


@pytest.mark.parametrize('wrong', [1, 3])
def test_counts_that_disagree(tmp_path, wrong):
    arrays = make_set()
    arrays[wrong] = arrays[wrong][1:]
    write_set(tmp_path, arrays)
    with pytest.raises(data.DataError, match='labels for') as caught:
        data.load(str(tmp_path))
    assert str(caught.value).startswith(str(tmp_path / NAMES[wrong]))


def test_what_is_not_a_readable_file(tmp_path):
    folder, link, pipe = tmp_path / 'folder.gz', tmp_path / 'link', tmp_path / 'pipe'
    folder.mkdir()
    link.symlink_to(tmp_path / 'nowhere')
    os.mkfifo(str(pipe))
    assert 'not a file' in refusal(folder)
    assert 'No such file' in refusal(link)
    assert 'not a file' in refusal(pipe)


@pytest.mark.skipif(os.name != 'posix' or os.geteuid() == 0, reason='root may read all files')
def test_unreadable_file(tmp_path):
    path = tmp_path / 'images'
    path.write_bytes(idx(IMAGES))
    path.chmod(0)
    assert 'Permission denied' in refusal(path)


def test_a_read_that_fails_midway(tmp_path, monkeypatch):
    path = tmp_path / 'images'
    path.write_bytes(idx(IMAGES))

    def fail(*_):
        raise OSError(5, 'Input/output error')
    monkeypatch.setattr(data, '_parse_idx', fail)
    assert 'Input/output error' in refusal(path)


def test_a_dangling_link_in_the_set_is_not_a_missing_file(tmp_path):
    write_set(tmp_path, make_set())
    path = tmp_path / (NAMES[1] + '.gz')
    path.unlink()
    path.symlink_to(tmp_path / 'nowhere')
    with pytest.raises(data.DataError, match='No such file'):
        data.load(str(tmp_path))
    assert path.is_symlink()


@pytest.mark.parametrize('dataset', ['auto', 'mnist'])
def test_a_file_in_place_of_the_folder(tmp_path, dataset):
    path = tmp_path / 'file'
    path.write_bytes(b'mine')
    with pytest.raises(data.DataError, match='cannot be read as a folder') as caught:
        data.load(str(path), dataset)
    assert str(caught.value).startswith(str(path)) and path.read_bytes() == b'mine'


@pytest.mark.parametrize('claimed', [1000, 200000, 1000000, 2 ** 32 - 1])
def test_a_bomb_takes_little_memory(tmp_path, claimed):
    path = tmp_path / 'bomb.gz'
    with gzip.open(str(path), 'wb', compresslevel=1) as file:
        file.write(struct.pack('>4I', 2051, claimed, 28, 28))
        for _ in range(300):
            file.write(bytes(2 ** 20))
    script = ('import data, resource, sys\n'
              'try: data.read_idx(sys.argv[1], (28, 28))\n'
              'except data.DataError: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)')
    output = subprocess.check_output([sys.executable, '-c', script, str(path)],
                                     cwd=os.path.dirname(data.__file__))
    assert int(output) < 200 * 1024  # In kB, and with all of Python and NumPy.


def test_parser_loads_exactly_what_was_written_or_refuses(tmp_path):
    """3,000 random files: random bytes, and valid files cut short or with flipped bits."""
    rng = random.Random(0)
    loaded = refused = 0
    for case in range(3000):
        count = rng.randrange(1, 5)
        item_shape = rng.choice([(28, 28), ()])
        values = rng.choice([2, 256])  # Few values make for a rich gzip stream, many for a raw one.
        array = np.random.RandomState(case).randint(values, size=(count,) + item_shape)
        array = array.astype(np.uint8)
        zipped = rng.random() < .7
        content = bytearray(gzip.compress(idx(array)) if zipped else idx(array))
        kind = case % 3
        if kind == 0:  # Random bytes, sometimes after a good beginning.
            keep = rng.choice([0, 0, 4, 10, 16])
            content[keep:] = bytes(rng.randrange(256) for _ in range(rng.randrange(200)))
        elif kind == 1:
            del content[rng.randrange(len(content) + 1):]
        else:
            for _ in range(rng.choice([0, 1, 1, 2, 10])):
                # Half of them in the header.
                end = rng.choice([min(20, len(content)), len(content)])
                content[rng.randrange(end)] ^= 1 << rng.randrange(8)
        path = tmp_path / ('case.gz' if zipped else 'case')
        path.write_bytes(content)
        try:
            result = data.read_idx(str(path), item_shape)
        except data.DataError as error:
            assert '\n' not in str(error)
            refused += 1
        else:
            assert result.dtype == np.uint8
            if zipped or kind == 1:
                np.testing.assert_array_equal(result, array)
            else:  # Without a checksum, other pixels or labels are another valid file.
                assert idx(result) == content
            loaded += 1
    assert loaded > 100 and refused > 2000


# Fetched


class Mirror(http.server.BaseHTTPRequestHandler):
    """Serves `server.files`; `server.fault(handler, content)` may serve a request in its place."""

    def do_GET(self):
        self.server.asked.append(self.path)
        content = self.server.files[self.path.lstrip('/')]
        if not self.server.fault or not self.server.fault(self, content):
            self.answer(content)

    def answer(self, content, length=None):
        self.send_response(200)
        self.send_header('Content-Length', str(len(content) if length is None else length))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


class MirrorServer(http.server.HTTPServer):
    """A server of a thread a request."""

    def process_request(self, request, address):
        threading.Thread(target=self.serve, args=(request, address), daemon=True).start()

    def serve(self, request, address):
        with contextlib.suppress(OSError):  # A client that hangs up is no failure of a test.
            self.finish_request(request, address)
        self.shutdown_request(request)


@pytest.fixture
def mirrors(monkeypatch):
    """Makes mirrors of a small set that passes for MNIST: `mirrors(fault, fault, ...)`."""
    files = {name + '.gz': gzip.compress(idx(array)) for name, array in zip(NAMES, make_set())}
    monkeypatch.setattr(data, 'FILES', {
        name: (len(files[name + '.gz']), hashlib.sha256(files[name + '.gz']).hexdigest())
        for name in NAMES})
    servers = []

    def start(*faults):
        for fault in faults:
            server = MirrorServer(('127.0.0.1', 0), Mirror)
            server.files, server.fault, server.asked = files, fault, []
            server.end = threading.Event()
            threading.Thread(target=server.serve_forever, args=[.01], daemon=True).start()
            servers.append(server)
        data.MIRRORS[:] = ['http://127.0.0.1:%d/' % server.server_port for server in servers]
        return servers
    yield start
    for server in servers:
        server.end.set()
        server.shutdown()
        server.server_close()


def truncate(handler, content):
    handler.answer(content[:len(content) // 2])
    return True


def close_halfway(handler, content):
    handler.answer(content[:len(content) // 2], length=len(content))
    return True


def stall(handler, content):
    handler.answer(content[:len(content) // 2], length=len(content))
    return stall_at_once(handler, content)


def stall_at_once(handler, content):
    handler.server.end.wait(60)
    return True


def drip(handler, content):
    handler.answer(b'', length=len(content))
    for i in range(1000):
        handler.wfile.write(content[i:i + 1])
        handler.server.end.wait(.06)
    return True


def drip_header(handler, content):
    handler.wfile.write(b'HTTP/1.0 200 OK\r\nX-Slow: ')
    for _ in range(1000):
        handler.wfile.write(b'x')
        handler.server.end.wait(.06)
    return True


def not_found(handler, content):
    handler.send_error(404)
    return True


def other_bytes(handler, content):
    handler.answer(bytes(len(content)))
    return True


def one_bit(handler, content):
    handler.answer(content[:-1] + bytes([content[-1] ^ 1]))
    return True


def too_many_bytes(handler, content):
    handler.answer(content + bytes(1000))
    return True


def endless(handler, content):
    handler.answer(content, length=2 ** 60)
    for _ in range(1000000):
        handler.wfile.write(bytes(2 ** 16))
    return True


def gibberish(handler, content):
    handler.wfile.write(b'\xff' * 100 + b'\r\n\r\n')
    return True


def hang_up(handler, content):
    return True


def only_the_third(fault):
    """The fault in the third file only, after two good ones."""
    return lambda handler, content: NAMES[2] in handler.path and fault(handler, content)


FAULTS = [truncate, close_halfway, stall, stall_at_once, drip, drip_header, not_found, other_bytes,
          one_bit, too_many_bytes, endless, gibberish, hang_up, only_the_third(truncate),
          only_the_third(stall), only_the_third(not_found), only_the_third(other_bytes)]


def test_downloads_into_a_new_folder(tmp_path, mirrors, capsys):
    first, second = mirrors(None, None)
    folder = tmp_path / 'new' / 'folder'
    loaded = data.load(str(folder))
    np.testing.assert_array_equal(loaded.test_images, make_set()[2])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first.files
    assert len(first.asked) == 4 and not second.asked
    total = sum(map(len, first.files.values()))
    assert '%d/%d [====' % (total, total) in capsys.readouterr().out
    data.load(str(folder))
    assert len(first.asked) == 4


@pytest.mark.parametrize('fault', FAULTS)
def test_a_faulty_mirror_is_passed_over(tmp_path, mirrors, monkeypatch, fault):
    monkeypatch.setattr(data, 'TIMEOUT', 2)
    faulty, good = mirrors(fault, None)
    start = time.monotonic()
    assert len(data.load(str(tmp_path), 'mnist').train_images) == 22
    assert time.monotonic() - start < 30  # Where a mirror stalls for 60 seconds.
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == good.files
    assert len(faulty.asked) + len(good.asked) == 5  # After its fault, it is not asked again.


@pytest.mark.parametrize('fault', FAULTS)
def test_a_failed_download_leaves_nothing(tmp_path, mirrors, monkeypatch, fault):
    monkeypatch.setattr(data, 'TIMEOUT', .2)
    mirrors(fault)
    (tmp_path / 'mine').write_bytes(b'mine')
    before = listing(tmp_path)
    with pytest.raises(data.DataError) as caught:
        data.load(str(tmp_path), 'mnist')
    message = str(caught.value)
    assert '\n' not in message and message.startswith(str(tmp_path)) and data.MIRRORS[0] in message
    assert listing(tmp_path) == before


def test_no_server_at_all(tmp_path, mirrors):
    server, = mirrors(None)
    server.shutdown()
    server.server_close()
    with pytest.raises(data.DownloadError, match='refused'):
        data.load(str(tmp_path / 'folder'), 'mnist')
    assert not (tmp_path / 'folder').exists()


def test_a_name_server_that_stalls(tmp_path, mirrors, monkeypatch):
    mirrors(None)
    data.MIRRORS.insert(0, 'http://slow.invalid/')
    end, real = threading.Event(), socket.getaddrinfo

    def look_up(host, *args):
        if host == 'slow.invalid':
            end.wait(60)
        return real(host, *args)
    monkeypatch.setattr(socket, 'getaddrinfo', look_up)
    monkeypatch.setattr(data, 'TIMEOUT', 2)
    start = time.monotonic()
    data.load(str(tmp_path), 'mnist')
    end.set()
    assert time.monotonic() - start < 30


def test_an_interrupted_download_leaves_nothing(tmp_path, mirrors, monkeypatch):
    mirrors(None)

    def interrupt(*_):
        assert (tmp_path / os.listdir(str(tmp_path))[0]).is_dir()
        raise KeyboardInterrupt
    with monkeypatch.context() as context:
        context.setattr(os, 'replace', interrupt)
        with pytest.raises(KeyboardInterrupt):
            data.load(str(tmp_path), 'mnist')
    assert not list(tmp_path.iterdir())
    assert len(data.load(str(tmp_path), 'mnist').train_images) == 22


def test_simultaneous_downloads(tmp_path, mirrors):
    server, = mirrors(lambda handler, content: time.sleep(random.random() / 50))
    results = []

    def run():
        results.append(data.load(str(tmp_path), 'mnist').fingerprint)
    threads = [threading.Thread(target=run) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 6 and len(set(results)) == 1
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == server.files


def test_a_set_that_came_during_the_download_stays(tmp_path, mirrors):
    def user(handler, content):
        if NAMES[3] in handler.path:
            write_set(tmp_path, make_set(train=12))
    mirrors(user)
    assert len(data.load(str(tmp_path), 'mnist').train_images) == 11


def test_a_folder_that_cannot_be_written(tmp_path, mirrors):
    mirrors(None)
    (tmp_path / 'link').symlink_to(tmp_path / 'nowhere')
    with pytest.raises(data.DataError, match='cannot be written') as caught:
        data.load(str(tmp_path / 'link'))
    assert not isinstance(caught.value, data.DownloadError)


def test_the_published_mirrors_are_secure():
    source = open(data.__file__).read()
    assert source.count("'https://") >= 2 and source.count("'http://") == 0


# Made


def test_auto_falls_back_to_synthetic_digits(tmp_path, few_digits, mirrors, capsys):
    mirrors(not_found)
    loaded = data.load(str(tmp_path), 'auto')
    output = capsys.readouterr()
    assert loaded.name == 'synthetic digits' and loaded.name in output.out
    assert 'synthetic digits, not MNIST' in loaded.warning and '404' in loaded.warning
    assert loaded.warning in output.err and '\n' not in loaded.warning
    # Kept, but not in a way that could be taken for MNIST.
    assert [path.name for path in tmp_path.iterdir()] == [data.SYNTHETIC_FILE]
    with pytest.raises(data.DownloadError):
        data.load(str(tmp_path), 'mnist')


def test_auto_does_not_hide_a_damaged_set(tmp_path, few_digits):
    write_set(tmp_path, make_set())
    (tmp_path / (NAMES[0] + '.gz')).write_bytes(b'')
    with pytest.raises(data.DataError, match='truncated'):
        data.load(str(tmp_path), 'auto')


def test_synthetic_never_looks_for_mnist(tmp_path, few_digits, mirrors):
    server, = mirrors(None)
    write_set(tmp_path, make_set())
    (tmp_path / (NAMES[0] + '.gz')).write_bytes(b'')
    before = listing(tmp_path)
    loaded = data.load(str(tmp_path), 'synthetic')
    assert loaded.name == 'synthetic digits' and loaded.warning is None and not server.asked
    assert [len(array) for array in loaded[1:7]] == [55, 55, 5, 5, 10, 10]
    after = listing(tmp_path)
    del after[data.SYNTHETIC_FILE]
    assert after == before


def assert_same(one, other):
    assert one.fingerprint == other.fingerprint
    for a, b in zip(one[1:7], other[1:7]):
        np.testing.assert_array_equal(a, b)


def test_synthetic_digits_are_kept(tmp_path, few_digits, monkeypatch):
    first = data.load(str(tmp_path), 'synthetic')
    images, labels = data.synthesize(70, data.SYNTHETIC_SEED)
    np.testing.assert_array_equal(images, np.concatenate(
        [first.validation_images, first.train_images, first.test_images]))
    np.testing.assert_array_equal(labels, np.concatenate(
        [first.validation_labels, first.train_labels, first.test_labels]))
    monkeypatch.setattr(data, 'synthesize', None)
    assert_same(data.load(str(tmp_path), 'synthetic'), first)


@pytest.mark.parametrize('damage', [
    lambda content: b'',
    lambda content: content[:40],
    lambda content: content[:-1],
    lambda content: content + b'\0',
    lambda content: content[:3000] + bytes([content[3000] ^ 1]) + content[3001:],
    lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    lambda content: bytes(len(content)),
    # Whole, but of other digits.
    lambda content: content[:2] + hashlib.sha256(content[:2]).digest(),
    lambda content: b'S' + content[1:-32] + hashlib.sha256(b'S' + content[1:-32]).digest(),
])
def test_damaged_synthetic_digits_are_drawn_again(tmp_path, few_digits, damage):
    path = tmp_path / data.SYNTHETIC_FILE
    first = data.load(str(tmp_path), 'synthetic')
    content = path.read_bytes()
    path.write_bytes(damage(content))
    assert_same(data.load(str(tmp_path), 'synthetic'), first)
    assert path.read_bytes() == content


@pytest.mark.parametrize('constant, value', [
    ('SYNTHETIC_VERSION', -1), ('SYNTHETIC_SEED', 5), ('SYNTHETIC_COUNTS', (50, 20))])
def test_other_synthetic_digits_are_drawn_again(tmp_path, few_digits, monkeypatch, constant, value):
    data.load(str(tmp_path), 'synthetic')
    content = (tmp_path / data.SYNTHETIC_FILE).read_bytes()
    monkeypatch.setattr(data, constant, value)
    data.load(str(tmp_path), 'synthetic')
    assert (tmp_path / data.SYNTHETIC_FILE).read_bytes() != content


def test_synthetic_digits_that_cannot_be_kept(tmp_path, few_digits, capsys):
    (tmp_path / 'file').write_bytes(b'mine')
    (tmp_path / data.SYNTHETIC_FILE).mkdir()
    for folder in (tmp_path / 'file', tmp_path):
        assert len(data.load(str(folder), 'synthetic').train_images) == 55
        error = capsys.readouterr().err
        assert error.count('\n') == 1 and 'cannot be written' in error and str(folder) in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ['file', data.SYNTHETIC_FILE]


@pytest.fixture(scope='module')
def digits():
    return data.synthesize(3000, 1)


def test_synthetic_digits_depend_on_the_seed_only(digits):
    for one, other in zip(digits, data.synthesize(3000, 1)):
        np.testing.assert_array_equal(one, other)
    assert (digits[0] != data.synthesize(3000, 2)[0]).any(axis=(1, 2)).all()


def test_synthetic_digits_are_balanced_and_shuffled(digits):
    images, labels = digits
    assert images.dtype == labels.dtype == np.uint8 and images.shape == (3000, 28, 28)
    assert (np.bincount(labels) == 300).all()
    assert (np.bincount(labels[:500], minlength=10) > 25).all()
    assert (np.diff(labels.astype(int)) != 1).mean() > .8


def test_no_two_synthetic_digits_are_alike(digits):
    images, labels = digits
    for digit in range(10):
        pixels = images[labels == digit].reshape(300, 784) / 255
        squares = (pixels ** 2).sum(1)
        distances = squares[:, None] + squares - 2 * pixels @ pixels.T + 1e9 * np.eye(300)
        assert distances.min() > .02  # Of squared ink; the same picture has 0.
    many, _ = data.synthesize(12000, 1)  # Enough for each way of writing to be drawn in parts.
    assert len(set(image.tobytes() for image in many)) == len(many)


def test_synthetic_digits_look_like_mnists(digits):
    images = digits[0] / 255
    # In a box of 20 x 20 pixels.
    for axis in (1, 2):
        inked = digits[0].any(axis=axis)
        extent = 28 - inked.argmax(1) - inked[:, ::-1].argmax(1)
        assert extent.max() <= 20
    # Centred by mass, as MNIST's on pixel (14, 14) to the nearest pixel.
    mass = images.sum(axis=(1, 2))
    for axis in (1, 2):
        centre = (images.sum(axis=axis) * np.arange(28)).sum(1) / mass
        assert abs(centre.mean() - 14) < .1 and abs(centre - 14).max() < 1
    # As much ink (MNIST: 0.131), mostly none or full, with soft edges (MNIST: 81% and 7%).
    assert .09 < images.mean() < .15
    assert .75 < (images == 0).mean() < .88 and .04 < (images > .98).mean() < .12
    # Every digit is written, large enough to read.
    assert mass.min() > 15


def test_each_digit_has_a_shape_of_its_own(digits):
    """The nearest mean image tells most of the digits, so that no label has another's glyph."""
    images, labels = digits[0].reshape(3000, 784) / 255, digits[1]
    means = np.stack([images[labels == digit].mean(0) for digit in range(10)])
    nearest = ((images[:, None] - means) ** 2).sum(2).argmin(1)
    assert (nearest == labels).mean() > .8


@pytest.mark.skipif('MNIST_DIR' not in os.environ, reason='MNIST_DIR names no folder of MNIST')
def test_mnist_tells_what_the_synthetic_digits_are(digits):
    """The nearest of 5,000 real digits reads them; a convolutional network reads 98%."""
    real = data.load(os.environ['MNIST_DIR'])
    known = real.validation_images.reshape(-1, 784) / 255
    images, labels = digits[0].reshape(3000, 784) / 255, digits[1]
    nearest = ((known ** 2).sum(1) - 2 * images @ known.T).argmin(1)
    assert (real.validation_labels[nearest] == labels).mean() > .85


# Batches


@pytest.mark.parametrize('count, batch_size', [(10, 3), (10, 5), (10, 10), (10, 100), (1, 1)])
def test_batches_hold_each_image_once(count, batch_size):
    images = np.repeat(np.arange(count, dtype=np.uint8), 784).reshape(-1, 28, 28)
    parts = list(data.batches(images, batch_size, seed=1, epoch=0))
    assert all(part.dtype == np.uint8 and part.shape[1:] == (28, 28) for part in parts)
    assert [len(part) for part in parts[:-1]] == [batch_size] * (len(parts) - 1)
    assert 0 < len(parts[-1]) <= batch_size
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)[:, 0, 0]), np.arange(count))


def test_order_of_batches_depends_on_seed_and_epoch_only():
    images = np.arange(200, dtype=np.uint8)

    def order(seed, epoch):
        np.random.seed(epoch)
        return tuple(np.concatenate(list(data.batches(images, 7, seed, epoch))))
    pairs = [(seed, epoch) for seed in range(5) for epoch in range(5)]
    orders = [order(*pair) for pair in pairs]
    assert len(set(orders)) == 25 and tuple(images) not in orders
    assert orders == [order(*pair) for pair in reversed(pairs)][::-1]
    assert orders[1] == tuple(np.concatenate(list(data.batches(images, 9, 0, 1))))
