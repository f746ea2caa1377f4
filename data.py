"""Images in: finds, downloads, verifies, reads, splits and batches 28x28 digits.

`load` gives MNIST, any other set in MNIST's format, or, where there is neither such a set nor a
network, synthetic digits that it draws itself. All images are uint8 arrays `[n, 28, 28]`, 0 for
paper and 255 for ink; all labels are uint8 arrays `[n]`.
"""

import gzip
import hashlib
import os
import socket
import stat
import struct
import sys
import tempfile
import typing
import zlib

import numpy as np

# The four files of a set, and the SHA-256 of MNIST's own, gzipped.
# Format: Y. LeCun, C. Cortes, C. Burges, http://yann.lecun.com/exdb/mnist/.
FILES = {
    'train-images-idx3-ubyte': '440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609',
    'train-labels-idx1-ubyte': '3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c',
    't10k-images-idx3-ubyte': '8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6',
    't10k-labels-idx1-ubyte': 'f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6',
}
MIRRORS = ['https://ossci-datasets.s3.amazonaws.com/mnist/',
           'https://storage.googleapis.com/cvdf-datasets/mnist/']
TIMEOUT = 10  # Seconds that a mirror may take to connect or to send the next bytes.
MNIST_FINGERPRINT = '25c98f992c005963'  # Of the content of those four files.

# A header may claim this many bytes for each byte on disk, or SMALL bytes in any case. MNIST needs
# 5 and its black-and-white version 21, where a gzip bomb has 1000.
MAX_RATIO, SMALL = 25, 2 ** 26

SYNTHETIC_FOLDER = 'synthetic_digits'  # Within the data folder.
SYNTHETIC_COUNTS = 60000, 10000  # Training (with validation) and test images.


class DataError(Exception):
    """Data that cannot be used: one line with the file, what is wrong and what to do."""


class DownloadError(DataError):
    """No mirror gave MNIST."""


class Dataset(typing.NamedTuple):
    """Images and labels, split into training, validation and test sets."""
    name: str  # 'MNIST' only if the files' content is MNIST's.
    train_images: np.ndarray
    train_labels: np.ndarray
    validation_images: np.ndarray
    validation_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    fingerprint: str  # 16 hexadecimal digits that identify the content.
    warning: typing.Optional[str] = None  # What to tell the user again at the end of the run.


def load(data_dir, dataset='auto'):
    """Loads the images to train, validate and test on, and prints which they are.

    Args:
        data_dir: Folder of the four IDX files, gzipped or not. MNIST is downloaded into it if it
            has none of them; synthetic digits are kept in a folder of their own within it.
        dataset: 'mnist' for the IDX files, whatever set they hold; 'auto' for the same, or else
            synthetic digits if there are none and none can be downloaded; or 'synthetic'.

    Returns:
        A `Dataset`. Validation is the first twelfth of the training images: 5,000 of 60,000.

    Raises:
        DataError: the files are damaged, do not belong together, or are not to be had.
    """
    paths, warning = [], None
    if dataset != 'synthetic':
        try:
            paths = _find(data_dir) or _download(data_dir)
        except DownloadError:
            if dataset == 'mnist':
                raise
            warning = 'Warning: this run uses synthetic digits, as MNIST cannot be downloaded.'
            print(warning, file=sys.stderr)
    name = 'IDX files in %s' % data_dir if paths else 'synthetic digits'
    paths = paths or _synthetic(os.path.join(data_dir, SYNTHETIC_FOLDER))

    arrays = [read_idx(path, shape) for path, shape in zip(paths, [(28, 28), ()] * 2)]
    images, labels, test_images, test_labels = arrays
    for some, others, path in [(images, labels, paths[1]), (test_images, test_labels, paths[3])]:
        if len(some) != len(others):
            raise DataError('%s: holds %d labels for %d images; use files of one set'
                            % (path, len(others), len(some)))
    if len(images) < 2:
        raise DataError('%s: holds 1 image; at least 2 are needed, to train and to validate'
                        % paths[0])
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(repr(array.shape).encode())
        digest.update(array)
    fingerprint = digest.hexdigest()[:16]
    if fingerprint == MNIST_FINGERPRINT:
        name = 'MNIST'
    held_out = max(1, len(images) * 5000 // 60000)
    print('Data: %s: %d training, %d validation and %d test images.'
          % (name, len(images) - held_out, held_out, len(test_images)))
    return Dataset(name, images[held_out:], labels[held_out:], images[:held_out],
                   labels[:held_out], test_images, test_labels, fingerprint, warning)


def batches(images, batch_size, seed, epoch):
    """Yields all of `images` once, as arrays `[<= batch_size, ...]`, in an order that depends on
    `seed` and `epoch` alone, integers from 0 to 2**32 - 1."""
    order = np.random.RandomState([seed, epoch]).permutation(len(images))
    for start in range(0, len(images), batch_size):
        yield images[order[start:start + batch_size]]


def to_float(images):
    """Bytes as float32 from 0 to 1, as the network takes them."""
    return images / np.float32(255)


# ---------------------------------------------------------------------------------------- Found


def _find(folder):
    """Paths of the four IDX files in `folder`, or `[]` if there are none."""
    try:
        present = set(os.listdir(folder))
    except FileNotFoundError:
        present = set()
    except OSError as error:
        raise DataError('%s: cannot be read as a folder (%s); choose another with --data-dir'
                        % (folder, error.strerror)) from error
    names = [name if name in present else name + '.gz' for name in FILES]
    missing = [name for name in names if name not in present]
    if len(missing) == len(names):
        return []
    if missing:
        raise DataError('%s: is missing while others of the four files are there; add it, or move '
                        'them away to have all of them made anew'
                        % os.path.join(folder, missing[0]))
    return [os.path.join(folder, name) for name in names]


def read_idx(path, item_shape):
    """Reads one IDX file, gzipped if its name ends in '.gz', of images (`item_shape` is `(28, 28)`)
    or of labels (`()`). Returns a read-only uint8 array `[n, *item_shape]`.

    Raises:
        DataError: the file cannot be read, or is not a whole file of such items.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError('is not a file')
        with (gzip.open if path.endswith('.gz') else open)(path, 'rb') as file:
            return _parse_idx(file, item_shape, max(SMALL, MAX_RATIO * status.st_size))
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError('%s: %s; replace it with a whole copy, or move the four files away to '
                        'have them made anew' % (path, getattr(error, 'strerror', None) or error)
                        ) from error


def _parse_idx(file, item_shape, max_size):
    kind, wanted = ('images', 2051) if item_shape else ('labels', 2049)
    header = file.read(8 + 4 * len(item_shape))
    if len(header) < 8 + 4 * len(item_shape):
        raise ValueError('is truncated within its header')
    magic, count, *shape = struct.unpack('>%dI' % (len(header) // 4), header)
    if magic != wanted:
        raise ValueError('has magic number %d, not the %d of %s' % (magic, wanted, kind))
    if tuple(shape) != item_shape:
        raise ValueError('holds images of %d x %d, not 28 x 28' % tuple(shape))
    if count == 0:
        raise ValueError('holds no %s' % kind)
    size = count * int(np.prod(item_shape))
    if size > max_size:
        raise ValueError('claims %d %s, too many for its size' % (count, kind))
    content = file.read(size)
    if len(content) < size:
        raise ValueError('is truncated: it claims %d bytes of %s and holds %d'
                         % (size, kind, len(content)))
    if file.read(1):  # At the end, this also has gzip verify its checksum.
        raise ValueError('has bytes after its last %s' % kind[:-1])
    return np.frombuffer(content, np.uint8).reshape((count,) + item_shape)


# --------------------------------------------------------------------------------- Fetched, made


def _download(data_dir):
    """Downloads MNIST into `data_dir` and returns the paths of its four files.

    Nothing gets its name before all four are verified. A mirror that fails is not asked again.
    """
    from tensorflow.keras.utils import get_file  # Here, as only this needs TensorFlow.
    mirrors, failures = list(MIRRORS), []

    def fetch(folder):
        for name, sha256 in FILES.items():
            while True:
                if not mirrors:
                    raise DownloadError(
                        '%s: MNIST is not there and cannot be downloaded (%s); put its four files '
                        'there or use --dataset synthetic' % (data_dir, ', '.join(failures)))
                try:
                    # Absolute, as `get_file` takes a leading '~' for the home folder.
                    path = get_file(name + '.gz', mirrors[0] + name + '.gz', cache_subdir='',
                                    cache_dir=os.path.abspath(folder))
                    with open(path, 'rb') as file:
                        if hashlib.sha256(file.read()).hexdigest() == sha256:
                            break
                    os.remove(path)
                    raise ValueError('sends something other than %s' % name)
                except Exception as error:  # `get_file` raises nothing more particular.
                    # What a mirror sends may stand in the error: at most a short line of it.
                    reason = ' '.join(str(error).split())[-100:].split(': ')[-1]
                    failures.append('%s: %s' % (mirrors.pop(0), reason))

    previous = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        return _keep(data_dir, fetch)
    finally:
        socket.setdefaulttimeout(previous)


def _synthetic(folder):
    """Paths of the four files of synthetic digits in `folder`, drawn if they are not there."""
    train, test = SYNTHETIC_COUNTS

    def draw(unfinished):
        print('Drawing %d synthetic digits; this takes about ten seconds.' % (train + test))
        images, labels = synthesize(train + test, seed=0)
        for name, array in zip(FILES, [images[:train], labels[:train],
                                       images[train:], labels[train:]]):
            with open(os.path.join(unfinished, name), 'wb') as file:
                file.write(struct.pack('>%dI' % (1 + array.ndim), 2048 + array.ndim, *array.shape))
                file.write(array)
    return _find(folder) or _keep(folder, draw)


def _keep(folder, make):
    """Has `make` write files into a hidden folder within `folder`, and moves them there once all
    are whole; none if a set has come in the meantime. Returns the paths of the four IDX files."""
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix='.unfinished-', dir=folder) as unfinished:
            make(unfinished)
            if not _find(folder):
                for name in sorted(os.listdir(unfinished)):
                    os.replace(os.path.join(unfinished, name), os.path.join(folder, name))
        return _find(folder)
    except OSError as error:
        raise DataError('%s: cannot be written (%s); choose another with --data-dir'
                        % (folder, error.strerror)) from error


# Each digit's ways of being written. A way is strokes, with '/' where the pen is lifted; a stroke
# is points 'x,y' that a smooth curve visits, y downwards; a point given twice is a corner.
GLYPHS = [
    ['50,2 22,12 10,50 22,88 45,98 72,86 82,48 70,14 48,2',
     '66,12 46,1 20,20 10,56 28,94 58,96 78,66 78,28 58,4 40,6'],
    ['50,0 50,50 50,100',
     '34,18 50,0 50,0 50,50 50,100',
     '32,20 50,0 50,0 50,100 / 28,100 50,100 74,100'],
    ['14,24 26,6 50,0 74,12 72,38 46,68 12,98 12,98 50,96 88,98',
     '14,22 30,4 56,2 72,18 66,46 42,78 18,96 8,84 24,76 50,90 90,94'],
    ['16,14 40,0 70,8 68,32 40,46 40,46 72,56 78,80 50,100 14,90',
     '14,12 44,0 72,16 58,42 42,47 62,52 78,72 56,98 14,92',
     '16,4 74,4 74,4 42,42 42,42 74,54 76,82 46,100 12,90'],
    ['26,2 20,32 14,58 14,58 50,58 88,54 / 70,14 66,56 62,100',
     '66,100 66,50 66,2 66,2 10,68 10,68 50,68 92,68',
     '20,4 14,40 30,54 60,48 78,34 / 80,2 74,50 68,100'],
    ['80,2 28,4 28,4 22,42 22,42 56,36 80,58 72,88 42,100 12,90',
     '28,6 24,44 24,44 52,38 78,58 72,86 44,100 14,92 / 28,6 54,5 82,2'],
    ['66,2 36,26 16,62 24,92 50,98 74,82 70,58 46,52 20,70',
     '42,0 24,38 16,74 34,98 64,92 76,70 58,52 32,62 18,82'],
    ['12,8 44,6 80,4 80,4 58,46 40,100',
     '14,20 14,4 14,4 48,5 80,4 80,4 56,50 44,100',
     '12,8 44,6 80,4 80,4 58,46 40,100 / 34,52 56,50 78,48',
     '10,16 28,4 56,8 82,6 82,6 60,40 48,100'],
    ['74,14 50,0 26,12 30,34 54,48 76,68 70,92 46,100 22,88 24,66 48,48 72,32 74,14',
     '50,48 26,34 28,8 52,0 74,12 70,36 50,48 24,66 24,92 50,100 76,90 74,64 50,48'],
    ['74,20 50,2 22,14 20,40 46,50 70,34 76,10 76,10 72,56 66,100',
     '74,22 52,2 24,14 18,38 40,50 66,38 75,20 75,20 75,60 58,92 26,98'],
]


def synthesize(count, seed):
    """Draws handwritten digits, as many of each, in random order, no two alike.

    A pen follows a digit's path, one of the ways in `GLYPHS`, bent, slanted, stretched and turned
    at random. Along it falls a Gaussian spot of ink at each point, and paper blackens only so far.
    As in MNIST, the ink fits a box of 20 x 20 pixels and has its centre of mass at pixel (14, 14).

    Returns uint8 images `[count, 28, 28]` and their labels `[count]`.
    """
    rng = np.random.RandomState(seed)
    labels = rng.permutation(np.arange(count) % 10).astype(np.uint8)
    images = np.empty((count, 28, 28), np.uint8)
    for digit, glyphs in enumerate(GLYPHS):
        way = rng.randint(len(glyphs), size=count)
        for i, glyph in enumerate(glyphs):
            places, = np.nonzero((labels == digit) & (way == i))
            for some in np.array_split(places, len(places) // 250 + 1):  # Bounds the memory.
                images[some] = _draw(glyph, len(some), rng)
    return images, labels


def _draw(glyph, count, rng):
    """Draws a glyph `count` times. Points of the plane are complex numbers, `[count, points]`."""
    def normal(deviation):
        return rng.normal(scale=deviation, size=(count, 1))

    def uniform(low, high):
        return rng.uniform(low, high, size=(count, 1))

    def wobble(points, size, frequency):
        wave = normal(frequency) + 1j * normal(frequency)
        return points + size * np.exp(1j * ((points * wave).real + uniform(0, 2 * np.pi)))

    points, spline = _spline(glyph)
    points = wobble(wobble(points, .08, 2), .035, 6)
    path = wobble(points @ spline.T, .01, 15)
    path -= (.15 + normal(.2)) * path.imag  # Slant.
    path = path.real * np.exp(.05 + normal(.17)) + 1j * path.imag  # Stretch.
    path *= np.exp(1j * normal(.12))  # Turn.

    # Scale the path so that the ink, which reaches beyond it, fits the box; centre it by its mass.
    sigma = uniform(.7, 1.35)  # Of a spot of ink, in pixels.
    contrast = 1.6 * sigma  # Makes edges equally soft, about a pixel, with every pen.
    reach = sigma * np.sqrt(-2 * np.log(.5 - .5 / contrast))
    extent = np.maximum(np.ptp(path.real, 1), np.ptp(path.imag, 1))[:, None]
    path *= (uniform(19, 20) - 2 * reach) / extent
    step = np.abs(np.diff(path, axis=1))
    # Of the steps before and after a point the shorter one: the other may be the pen in the air.
    length = np.minimum(np.c_[step[:, :1], step], np.c_[step, step[:, -1:]])
    path += 14 + 14j - (path * length).sum(1, keepdims=True) / length.sum(1, keepdims=True)

    def spots(position, weight):
        distance = (position[..., None] - np.arange(28)) / sigma[..., None]
        return (weight[..., None] * np.exp(-.5 * distance ** 2)).astype(np.float32)

    # The ink is 1 in the middle of a long straight stroke, and .5 where its edge is to be.
    density = length / (np.sqrt(2 * np.pi) * sigma)
    ink = spots(path.imag, density).transpose(0, 2, 1) @ spots(path.real, np.ones_like(density))
    return np.uint8(255 * np.clip(.5 + contrast[..., None] * (ink - .5), 0, 1))


def _spline(glyph):
    """A glyph's points `[k]`, its height being 1, and the Catmull-Rom spline through each stroke.

    The spline is a matrix `[p, k]` that maps the points to `p` about equally spaced ones.
    Source: E. Catmull and R. Rom, A class of local interpolating splines, 1974.
    """
    strokes = [[complex(*map(float, point.split(','))) / 100 for point in stroke.split()]
               for stroke in glyph.split('/')]
    points = np.array(sum(strokes, []))
    units, rows, first = np.eye(len(points)), [], 0
    for stroke in strokes:
        last = first + len(stroke) - 1
        for i in range(first, last):
            p0, p1, p2, p3 = units[[max(i - 1, first), i, i + 1, min(i + 2, last)]]
            samples = int(np.ceil(abs(points[i + 1] - points[i]) / .04))
            u = np.linspace(0, 1, samples, endpoint=False)[:, None]
            rows.append(p1 + u / 2 * (p2 - p0 + u * (2 * p0 - 5 * p1 + 4 * p2 - p3
                                                     + u * (3 * p1 - p0 - 3 * p2 + p3))))
        first = last + 1
    return points, np.concatenate(rows)
