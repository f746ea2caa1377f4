"""Images in: finds, downloads, verifies, reads, splits and batches them.

`load` gives a person's own images, MNIST, or, where there are neither such images nor a network,
synthetic digits that it draws itself. All images are uint8 arrays `[n, height, width]`, 0 for paper
and 255 for ink; all labels are integers, `[n]`.
"""

import glob
import gzip
import hashlib
import http.client
import os
import re
import shutil
import stat
import struct
import sys
import typing
import urllib.request
import zipfile
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

# As they are called, by EMNIST, 7-Zip and Kaggle too, and as Keras names them in an .npz file.
IDX_NAME = re.compile(r'(?:(.+)-)?(train|t10k|test)-(images|labels)[-.]idx[13]-ubyte(?:\.gz)?')
KEYS = {'train-images': 'x_train', 'train-labels': 'y_train',
        'test-images': 'x_test', 'test-labels': 'y_test'}
MAX_SIZE = 2 ** 32  # Bytes of images that a header may claim.
IDX_TYPES = {8: 'uint8', 9: 'int8', 11: 'int16', 12: 'int32', 13: 'float32', 14: 'float64'}
BEGINNINGS = {b'<': 'a web page', b'PK': 'a zip archive', b'\x1f\x8b': 'gzipped twice',
              b'\x89PNG': 'a picture', b'\xff\xd8': 'a picture', b'\x93NUMPY': 'a NumPy array'}

MNIST_FOLDER, SYNTHETIC_FOLDER = 'MNIST', 'synthetic_digits'  # Made within the data folder.
SYNTHETIC_COUNTS = 60000, 10000  # Training (with validation) and test images.


class RunError(Exception):
    """What ends a run: one line for the user that says what is wrong and what to do."""


class Dataset(typing.NamedTuple):
    """Images, split into training, validation and test sets."""
    name: str  # 'MNIST' only if the files' content is MNIST's.
    train_images: np.ndarray
    validation_images: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray  # All 0 if there are none.
    fingerprint: str  # 16 hexadecimal digits that identify the content.


def load(data_dir, dataset='auto'):
    """Loads the images to train, validate and test on, and prints which they are.

    Args:
        data_dir: Folder of a set of images, or one of several sets in a folder. If there is no such
            folder, or nothing in it, MNIST is downloaded into it; synthetic digits are kept in a
            folder of their own within it.
        dataset: 'mnist' for the set in the folder, whatever it is; 'auto' for the same, or else
            synthetic digits if there is none and none can be downloaded; or 'synthetic'.

    Returns:
        A `Dataset`. Validation is the first twelfth of the training images: 5,000 of 60,000.

    Raises:
        RunError: the files are damaged, not understood, do not belong together, or are not to be
            had.
    """
    files, name = {}, 'synthetic digits'
    if dataset != 'synthetic':
        files = _find(data_dir)
        if not files:
            try:
                contents = _download(data_dir)
            except RunError:
                if dataset == 'mnist':
                    raise
                print('Warning: this run uses synthetic digits, as MNIST cannot be downloaded.',
                      file=sys.stderr)
            else:
                _keep(os.path.join(data_dir, MNIST_FOLDER), contents)
                files = _find(data_dir)
    if files:
        name = os.path.basename(os.path.abspath(data_dir)).encode('utf-8', 'replace').decode()
        name = 'images in ' + (name if len(name) < 25 else name[:22] + '...')
    else:
        folder = os.path.join(data_dir, SYNTHETIC_FOLDER)
        if not os.path.isdir(folder) or not os.listdir(folder):
            _keep(folder, _synthetic_files())
        files = _find(folder)

    arrays = _read(files)
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(repr(array.shape).encode())
        digest.update(np.ascontiguousarray(array))
    fingerprint = digest.hexdigest()[:16]
    if fingerprint == MNIST_FINGERPRINT:
        name = 'MNIST'
    images, _, test_images, test_labels = arrays
    held_out = max(1, len(images) * 5000 // 60000)
    print('Data: %s: %d training, %d validation and %d test images of %d x %d.' % (
        name, len(images) - held_out, held_out, len(test_images), *images.shape[1:]), flush=True)
    return Dataset(name, images[held_out:], images[:held_out], test_images, test_labels,
                   fingerprint)


def batches(images, batch_size, seed, epoch):
    """Yields all of `images` once, as arrays `[<= batch_size, ...]`, in an order that depends on
    `seed` and `epoch` alone, integers from 0 to 2**32 - 1."""
    order = np.random.RandomState([seed, epoch]).permutation(len(images))
    for start in range(0, len(images), batch_size):
        yield images[order[start:start + batch_size]]


def binarise(images, *seed):
    """Black or white, 0 or 255, at random: white with the pixel's grey value, from 0 to 1, as
    probability (to within .002, as a byte of noise decides). A pure function of `images` and of the
    integers `seed`; what is black or white stays so."""
    noise = np.frombuffer(np.random.RandomState(seed).bytes(images.size), np.uint8)
    noise = noise.reshape(images.shape)
    return np.uint8(255) * ((noise < images) | (noise == images) & (images > 127))


def to_float(images):
    """Bytes as float32 from 0 to 1, as the network takes them."""
    return images / np.float32(255)


# ---------------------------------------------------------------------------------------- Found


def _find(data_dir):
    """The one set in a data folder, or else the nearest below it: paths of IDX files by the keys of
    `KEYS`, or that of an .npz file by 'npz'. Empty if there is no such folder, or nothing in it."""
    if data_dir.endswith('.npz') and not os.path.isdir(data_dir):
        return {'npz': data_dir}
    folder, depths, sets = data_dir, range(1, 5), {}
    if not os.path.isdir(data_dir):  # Perhaps it is how files in a folder start: one of its sets.
        folder, depths = os.path.dirname(os.path.normpath(data_dir)), [1]
    for depth in depths:
        for path in sorted(glob.glob(os.path.join(glob.escape(folder), *['*'] * depth))):
            where, name = os.path.split(path)
            match = IDX_NAME.fullmatch(name)
            if os.path.isdir(path) or depth > 1 and os.path.basename(where) == SYNTHETIC_FOLDER:
                continue
            if match:
                prefix, part, kind = match.groups('')
                files = sets.setdefault(os.path.normpath(os.path.join(where, prefix)), {})
                # Of a file packed and unpacked the latter, which comes first.
                files.setdefault('%s-%s' % (part.replace('t10k', 'test'), kind), path)
            elif name.endswith('.npz') and _may_hold_images(path):
                sets[os.path.normpath(path)] = {'npz': path}
        if sets:
            break
    names = {name: min(files.values()) if name == os.path.normpath(folder) else name
             for name, files in sets.items()}
    chosen = [name for name, files in sets.items() if folder == data_dir or any(
        path.startswith(os.path.normpath(data_dir)) for path in files.values())]
    if len(chosen) > 1:
        raise RunError('%s: holds several sets of images (%s); choose one, as by --data-dir %s'
                       % (data_dir, ', '.join(names[name] for name in chosen), names[chosen[0]]))
    if chosen:
        return sets[chosen[0]]
    try:
        present = [name for name in sorted(os.listdir(data_dir))
                   if not name.startswith('.') and name != SYNTHETIC_FOLDER]
    except FileNotFoundError:
        if folder and sets:
            raise RunError('%s: is not there; beside it are the sets %s: choose one of these, or '
                           'another folder' % (data_dir, ', '.join(names.values()))) from None
        return {}
    except OSError as error:
        raise RunError('%s: cannot be read as a folder (%s); choose another with --data-dir'
                       % (data_dir, error.strerror)) from error
    if present:
        raise RunError(
            "%s: holds no images that are understood, only %s; put the four files of a set in "
            "MNIST's format there, such as train-images-idx3-ubyte.gz, or an .npz file of uint8 "
            "arrays x_train and x_test, or choose another folder with --data-dir"
            % (data_dir, ', '.join(present[:5]) + ', ...' * (len(present) > 5)))
    return {}


def _may_hold_images(path):
    """Whether an .npz file has images or is damaged, as `_read_npz` then says."""
    try:
        with zipfile.ZipFile(path) as file:
            return 'x_train.npy' in file.namelist()
    except Exception:  # Whatever may be in a file.
        return True


def _read(files):
    """Reads and checks what `_find` found: training images and labels, test images and labels."""
    if 'npz' in files:
        arrays = _read_npz(files['npz'])
        files = {role: '%s (%s)' % (files['npz'], key) for role, key in KEYS.items()}
    else:
        for role in KEYS:
            if role not in files:
                raise RunError('%s: is without %s, as the other three files of a set; add that file'
                               % (sorted(files.values())[0], role))
        arrays = [_read_idx(files[role], 3 if 'images' in role else 1) for role in KEYS]
    images, labels, test_images, test_labels = arrays
    shape = images.shape[1:]
    for some, others, role in (images, labels, 'train-'), (test_images, test_labels, 'test-'):
        if len(some) != len(others):
            raise RunError('%s: holds %d labels for %d images; use files of one set'
                           % (files[role + 'labels'], len(others), len(some)))
        if some.shape[1:] != shape:
            raise RunError('%s: holds images of %d x %d, but the training images are of %d x %d; '
                           'use files of one set' % (files['test-images'], *some.shape[1:], *shape))
    if len(images) < 2:
        raise RunError('%s: holds 1 image; at least 2 are needed, to train and to validate'
                       % files['train-images'])
    if shape[0] % 4 or shape[1] % 4:
        margins = [(margin // 2, margin - margin // 2) for margin in (-size % 4 for size in shape)]
        raise RunError("%s: holds images of %d x %d, but height and width must be multiples of 4; "
                       "np.pad(x, [(0, 0), %s, %s], 'constant') makes them so"
                       % (files['train-images'], *shape, *margins))
    return arrays


def _read_idx(path, dimensions):
    """Reads one IDX file, gzipped or not, of images (3 dimensions) or of labels (1). Returns a
    read-only uint8 array of so many dimensions."""
    kind = 'images' if dimensions == 3 else 'labels'
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError('is not a file')
        with open(path, 'rb') as file:
            zipped = file.read(2) == b'\x1f\x8b'
        with (gzip.open if zipped else open)(path, 'rb') as file:
            header = file.read(4 + 4 * dimensions)
            if header[:4] != bytes([0, 0, 8, dimensions]):
                raise ValueError('is %s, not the IDX file of uint8 in %d dimensions that holds %s'
                                 % (_kind_of_file(header), dimensions, kind))
            if len(header) < 4 + 4 * dimensions:
                raise ValueError('is truncated within its header')
            shape = struct.unpack('>%dI' % dimensions, header[4:])
            size = shape[0] * (shape[1] * shape[2] if dimensions == 3 else 1)
            if not 0 < size <= MAX_SIZE:
                raise ValueError('claims to hold %s %s' % (' x '.join(map(str, shape)), kind))
            content = file.read(size)
            if len(content) < size:
                raise ValueError('is truncated: it claims %d bytes of %s and holds %d'
                                 % (size, kind, len(content)))
            if file.read(1):  # At the end, this also has gzip verify its checksum.
                raise ValueError('has bytes after its last %s' % kind[:-1])
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise RunError('%s: %s; replace it with a whole copy, or choose another folder with '
                       '--data-dir' % (path, getattr(error, 'strerror', None) or error)) from error
    return np.frombuffer(content, np.uint8).reshape(shape)


def _kind_of_file(start):
    """What a file is that starts with these bytes, for who wonders why it is not understood."""
    if start[:2] == b'\0\0' and len(start) > 3 and start[2] in IDX_TYPES:
        return 'an IDX file of %s in %d dimensions' % (IDX_TYPES[start[2]], start[3])
    kinds = [BEGINNINGS[some] for some in BEGINNINGS if start.lstrip().startswith(some)]
    return kinds[0] if kinds else 'one that starts with %r' % start if start else 'empty'


def _read_npz(path):
    """Reads images and labels of Keras's names from an .npz file; labels are 0 if it has none."""
    arrays = []
    try:
        # The first says best what is no such file, the second never unpickles.
        with zipfile.ZipFile(path), np.load(path) as file:
            for key in KEYS.values():
                if key[0] == 'y' and key not in file.files:
                    arrays.append(np.zeros(len(arrays[-1]), np.uint8))
                    continue
                array = file[key]
                what = '%s is %s of %s' % (key, list(array.shape), array.dtype)
                if key[0] == 'y':
                    if array.ndim != 1 or array.dtype.kind not in 'iu':
                        raise ValueError(what)
                    small = array.size and array.min() >= 0 and array.max() < 256
                    arrays.append(np.uint8(array) if small else array)  # As in an IDX file.
                    continue
                if array.ndim not in (3, 4) or array.size == 0 or array.dtype.kind not in 'biuf':
                    raise ValueError(what)
                low, high = array.min(), array.max()
                if not 0 <= low < high:
                    raise ValueError('%s from %g to %g, not from 0 to 255' % (what, low, high))
                if array.ndim == 4 or array.dtype != np.uint8 or high <= 1:
                    scale = '255 * ' if high <= 1 else '' if high <= 255 else '255 / %g * ' % high
                    grey = '' if array.ndim == 3 else (
                        '[..., :3].mean(-1)' if array.shape[3] < 5 else '.mean(1)')
                    raise ValueError('%s from %g to %g; make it np.uint8(%s%s%s)' % (
                        what, low, high, scale, key, grey))
                arrays.append(array)
    except Exception as error:  # Whatever may be in a file.
        raise RunError('%s: %s; expected are images x_train and x_test, [n, height, width] of '
                       'uint8, and labels y_train and y_test, [n] of integers, or no labels'
                       % (path, getattr(error, 'strerror', None) or ' '.join(str(error).split()))
                       ) from error
    return arrays


# --------------------------------------------------------------------------------- Fetched, made


def _download(data_dir):
    """Downloads MNIST: the content of each file, verified, by its name."""
    contents, failures = {}, []
    for mirror in MIRRORS:
        try:
            for name, sha256 in FILES.items():
                if name + '.gz' not in contents:
                    with urllib.request.urlopen(mirror + name + '.gz', timeout=TIMEOUT) as response:
                        content = response.read()
                    if hashlib.sha256(content).hexdigest() != sha256:
                        raise ValueError('sends something other than %s' % name)
                    contents[name + '.gz'] = content
            return contents
        except (OSError, ValueError, http.client.HTTPException) as error:
            # What a mirror sends may stand in the error: at most a short line of it.
            failures.append('%s: %s' % (mirror, ' '.join(str(error).split())[-100:]))
    raise RunError('%s: MNIST is not there and cannot be downloaded (%s); put its four files there '
                   'or use --dataset synthetic' % (data_dir, ', '.join(failures)))


def _keep(folder, contents):
    """Writes files into a hidden folder beside, and renames it: all are there, or none. What is
    left where a run is killed meanwhile, the next one takes up."""
    unfinished = os.path.join(os.path.dirname(folder), '.unfinished-' + os.path.basename(folder))
    try:
        os.makedirs(unfinished, exist_ok=True)
        for name, content in contents.items():
            # Not emptied first: another run, which writes the same, may rename it at any moment.
            file = os.open(os.path.join(unfinished, name), os.O_WRONLY | os.O_CREAT, 0o666)
            with open(file, 'wb') as file:
                file.write(content)
                file.truncate()
        os.rename(unfinished, folder)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if not os.path.isdir(folder):  # Else another run was faster.
            raise RunError('%s: cannot be written (%s); choose another with --data-dir'
                           % (folder, error.strerror)) from error


def _synthetic_files():
    """Draws the synthetic digits: the content of the four files by name."""
    train, test = SYNTHETIC_COUNTS
    print('Drawing %d synthetic digits; this takes about ten seconds.' % (train + test), flush=True)
    images, labels = synthesize(train + test, seed=0)
    arrays = images[:train], labels[:train], images[train:], labels[train:]
    return {name: struct.pack('>%dI' % (1 + array.ndim), 2048 + array.ndim, *array.shape)
            + array.tobytes() for name, array in zip(FILES, arrays)}


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
