"""Finds, downloads or synthesises a set of images, reads, splits and batches it.

Images are uint8 arrays `[n, height, width]`, 0 for paper, 255 for ink; labels are integers `[n]`.
"""

import collections
import gzip
import hashlib
import http.client
import os
import pathlib
import re
import struct
import sys
import typing
import urllib.request
import zipfile

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

# MNIST (Y. LeCun et al., http://yann.lecun.com/exdb/mnist/) and the SHA-256 of its gzipped files.
FILES = {name + '-ubyte.gz': sha256 for name, sha256 in [
    ('train-images-idx3', '440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609'),
    ('train-labels-idx1', '3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c'),
    ('t10k-images-idx3', '8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6'),
    ('t10k-labels-idx1', 'f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6')]}
MIRRORS = ['https://ossci-datasets.s3.amazonaws.com/mnist/',
           'https://storage.googleapis.com/cvdf-datasets/mnist/']
TIMEOUT = 10  # Seconds that a mirror may take to connect or to send the next bytes.
MNIST_FINGERPRINT = '25c98f992c005963'  # Identifies the content of those four files.

# EMNIST's names begin with the name of a set; 7-Zip writes a dot in place of a hyphen.
IDX_NAME = re.compile(r'(?:(.+)-)?(train|t10k|test)-(images|labels)[-.]idx[13]-ubyte(?:\.gz)?')
KEYS = 'x_train', 'y_train', 'x_test', 'y_test'  # The arrays of a set, as in Keras's .npz files.
EXPECTED = ("expected four files in MNIST's format, such as train-images-idx3-ubyte.gz, or an "
            '.npz file of x_train, x_test and optionally y_train, y_test; images are uint8 '
            '[n > 1, height, width], 0-255, height, width multiples of 4; labels are integers [n]')


class RunError(Exception):
    """Ends a run. Its message is one line that tells the user what is wrong."""


class Dataset(typing.NamedTuple):
    """Images, split into training, validation and test sets."""
    name: str  # 'MNIST' only if the content is MNIST's.
    train_images: np.ndarray
    validation_images: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray  # All 0 if there are none.
    fingerprint: str  # 16 hexadecimal digits that identify the content.


def load(data_dir):
    """Loads the images to train, validate and test on, and prints which they are.

    Args:
        data_dir: An .npz file; or a folder with one, or with the four files of a set in MNIST's
            format, also in subfolders; or 'folder/SET' for files 'SET-train-images-idx3-ubyte' etc.
            A folder that is missing or holds some of MNIST's .gz files is filled by a download.

    Returns:
        A `Dataset`, of synthetic digits if that download fails. The first twelfth of the training
        images is for validation: files should hold them in random order.

    Raises:
        RunError: the files are damaged, incomplete, ambiguous or not supported.
    """
    data_dir = pathlib.Path(data_dir).absolute()
    name = 'images in %.25s' % data_dir.name
    try:
        download_missing(data_dir)
        arrays = read(data_dir)
    except ConnectionError as error:
        print('Warning: MNIST cannot be downloaded (%s): this run uses synthetic digits.' % error,
              file=sys.stderr)
        name, arrays = 'synthetic digits', [*synthesize(60000, 0), *synthesize(10000, 1)]
    content = b''.join(repr(array.shape).encode() + array.tobytes() for array in arrays)
    fingerprint = hashlib.sha256(content).hexdigest()[:16]
    name = 'MNIST' if fingerprint == MNIST_FINGERPRINT else name
    images, _, test_images, test_labels = arrays
    count = max(1, len(images) // 12)
    print('Data: %s: %d training, %d validation and %d test images of %d x %d.' % (
        name, len(images) - count, count, len(test_images), *images.shape[1:]), flush=True)
    return Dataset(name, images[count:], images[:count], test_images, test_labels, fingerprint)


def batches(images, batch_size, seed, epoch):
    """Yields all of `images` once, as arrays `[<= batch_size, ...]`, in an order that depends only
    on the integers `seed` and `epoch`."""
    order = np.random.RandomState([seed, epoch]).permutation(len(images))
    for start in range(0, len(images), batch_size):
        yield images[order[start:start + batch_size]]


def binarise(images, *seed):
    """Returns 255 with probability pixel / 255, else 0, for each pixel; `seed` fixes the draw."""
    noise = np.random.RandomState(seed).randint(255, size=images.shape, dtype=np.uint8)  # To 254.
    return np.uint8(255) * (noise < images)


def to_float(images):
    """Returns bytes as float32 from 0 to 1, as the network takes them."""
    return images / np.float32(255)


def write_atomically(path, content):
    """Replaces the content of a file atomically: a run that is killed leaves the old content."""
    unfinished = path.with_name('.unfinished-' + path.name)
    with unfinished.open('wb') as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def find(data_dir):
    """Returns a dictionary of the paths of a set's files, with the keys `KEYS` or just 'npz'. Looks
    in a folder, then one and two levels below it; for 'folder/SET', if there is no such folder, at
    the files in 'folder' whose names begin with 'SET-'."""
    if data_dir.suffix == '.npz' or data_dir.is_file():
        return {'npz': data_dir}  # `read` refuses other files.
    folder, set_name = (data_dir, None) if data_dir.is_dir() else (data_dir.parent, data_dir.name)
    for subfolders in [''] if set_name else ['', '*/', '*/*/']:
        found = collections.defaultdict(list)
        for path in sorted(filter(pathlib.Path.is_file, folder.glob(subfolders + '[!.]*'))):
            match = IDX_NAME.fullmatch(path.name)
            if match and set_name in (None, match.group(1)):
                part, kind = match.group(2, 3)
                key = ('x_' if kind == 'images' else 'y_') + part.replace('t10k', 'test')
            elif path.suffix == '.npz' and not set_name and path.name != 'training_state.npz':
                key = 'npz'
            else:
                continue
            if path.with_suffix('') not in found[key]:  # Skips NAME.gz, which sorts after NAME.
                found[key].append(path)
        if found:
            break
    if len(found) > 1:
        found.pop('npz', None)  # The files in MNIST's format are used.
    for paths in found.values():
        if len(paths) > 1:
            raise RunError('%s: several sets; choose one, for example with --data-dir %s' % (
                ', '.join(map(str, paths)), paths[0].parent / IDX_NAME.sub(r'\1', paths[0].name)))
    return {key: path for key, (path,) in found.items()}


def read(data_dir):
    """Reads and checks a set. Returns its four arrays in the order of `KEYS`."""
    arrays, paths = {}, find(data_dir)
    if 'npz' not in paths and len(paths) < 4:
        names = sorted(path.name for path in (paths.values() if paths else data_dir.glob('[!.]*')))
        raise RunError('%s: no full set among %s; %s' % (data_dir, ', '.join(names[:9]), EXPECTED))
    for key, path in paths.items():
        try:
            if key == 'npz':
                with zipfile.ZipFile(path), np.load(path) as file:  # ZipFile refuses .npy files.
                    arrays = {name: file[name] for name in KEYS if name[0] == 'x' or name in file}
            else:
                arrays[key] = read_idx(path)
        except Exception as error:  # Damaged and foreign files can raise anything.
            raise RunError('%s: cannot be read (%s); %s' % (path, error, EXPECTED)) from error
    for x, y in KEYS[:2], KEYS[2:]:  # An .npz file may lack labels.
        arrays.setdefault(y, np.zeros(arrays[x].shape[:1], np.uint8))
    arrays = [arrays[key] for key in KEYS]
    shape = arrays[0].shape[1:]
    valid = all(
        images.dtype == np.uint8 and images.ndim == 3 and images.shape[1:] == shape
        and len(images) > 1 and images.size and images.max() > 1  # Not scaled to 1.
        and labels.dtype.kind in 'iu' and labels.shape == images.shape[:1]
        for images, labels in [arrays[:2], arrays[2:]])
    if not valid or any(size % 4 for size in shape):
        found = ', '.join('%s %s %s' % (k, a.dtype, list(a.shape)) for k, a in zip(KEYS, arrays))
        raise RunError('%s: holds %s; %s' % (data_dir, found, EXPECTED))
    return arrays


def read_idx(path):
    """Reads an IDX file of uint8, gzipped or not, as an array."""
    content = path.read_bytes()
    if content[:2] == b'\x1f\x8b':
        content = gzip.decompress(content)
    if content[:3] != b'\0\0\x08':
        raise ValueError('not an IDX file of unsigned bytes')
    shape = struct.unpack_from('>%dI' % content[3], content, 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


def download_missing(data_dir):
    """Downloads the files of MNIST that a folder lacks, if it holds nothing else. Raises
    `ConnectionError` if this fails."""
    if not data_dir.is_dir() and find(data_dir):  # A file, or a set such as folder/emnist-letters.
        return
    present = {path.name: path for path in data_dir.glob('[!.]*')}  # Empty for a missing folder.
    if all(name in FILES and hashlib.sha256(path.read_bytes()).hexdigest() == FILES[name]
           for name, path in present.items()):
        for name in sorted(set(FILES).difference(present)):
            content = fetch(name)
            data_dir.mkdir(parents=True, exist_ok=True)
            write_atomically(data_dir / name, content)


def fetch(name):
    """Returns the content of one of MNIST's files from the first mirror that has it."""
    for mirror in MIRRORS:
        print('Downloading %s' % (mirror + name), flush=True)
        try:
            with urllib.request.urlopen(mirror + name, timeout=TIMEOUT) as response:
                content = response.read()
            if hashlib.sha256(content).hexdigest() == FILES[name]:
                return content
            reason = 'wrong SHA-256'
        except (OSError, http.client.HTTPException) as error:
            reason = error
    raise ConnectionError(reason)


def synthesize(count, seed):
    """Draws digits in matplotlib's typefaces and moves their corners at random. Returns images
    `[count, 28, 28]` and labels `[count]`."""
    glyphs = []
    for path in sorted(pathlib.Path(matplotlib.get_data_path(), 'fonts', 'ttf').glob('*.ttf')):
        if re.match(r'DejaVu(?!.*Display)|STIXGeneral|cm(b|r|ss|tt)10', path.name):  # With digits.
            font = ImageFont.truetype(str(path), 54)
            for digit in range(10):
                glyphs.append(Image.new('L', (56, 56)))
                ImageDraw.Draw(glyphs[-1]).text((28, 30), str(digit), 255, font, anchor='mm')
    rng = np.random.RandomState(seed)
    picks = rng.randint(len(glyphs), size=count)  # Each typeface has ten glyphs, in order.
    corners = [0, 0, 0, 56, 56, 56, 56, 0] + rng.uniform(-9, 9, [count, 8])  # x, y, for QUAD.
    images = [glyphs[pick].transform((28, 28), Image.QUAD, quad, Image.BILINEAR)
              for pick, quad in zip(picks, corners)]
    return np.stack([np.asarray(image) for image in images]), np.uint8(picks % 10)
