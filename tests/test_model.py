"""Tests of model.py, through its contract: sizes, public names, variables found by their names."""

import collections

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import model

# Sizes that nothing else in the graph has.
SHAPE = HEIGHT, WIDTH = 12, 20
SIZES = dict(code_size=7, lstm_units=13, dense_units=11, channels=(6, 4), image_shape=SHAPE)

Small = collections.namedtuple('Small', 'network result session')


def build(learning_rate=None, **arguments):
    """A network in a graph and session of its own; by default `rate:0` is its learning rate."""
    with tf.Graph().as_default():
        shape = arguments.get('image_shape', (28, 28))
        images = tf.placeholder(tf.float32, [None, *shape], 'images')
        rate = tf.placeholder_with_default(.01, [], 'rate')
        network = model.Network(**arguments)
        result = network.optimization(images, rate if learning_rate is None else learning_rate)
        session = tf.Session()
        session.run(tf.global_variables_initializer())
        return Small(network, result, session)


@pytest.fixture(scope='module')
def networks():
    return {1: build(**SIZES), 3: build(mixture_components=3, **SIZES)}


@pytest.fixture(params=[1, 3])
def small(networks, request):
    """The small network, with the standard normal prior and with a mixture, at step 0 of a fresh
    start, with weights and biases far from zero."""
    built = networks[request.param]
    with built.session.graph.as_default():
        built.session.run(tf.global_variables_initializer())
        rng = np.random.RandomState(1)
        assign(built.session, {variable: .3 * rng.randn(*variable.shape.as_list())
                               for variable in tf.trainable_variables()})
        yield built


def trainable(session):
    variables = session.graph.get_collection('trainable_variables')
    return variables, session.run(variables)


def named(session):
    """The values of the trainable variables by their names."""
    return {v.op.name: value for v, value in zip(*trainable(session))}


def assign(session, values):
    session.run([variable.initializer for variable in values],
                {variable.initializer.inputs[1]: value for variable, value in values.items()})


def pictures(count, seed=0):
    """Images with black, white and grey pixels."""
    return np.clip(np.random.RandomState(seed).normal(.3, .5, [count, *SHAPE]), 0, 1)


def fetch(small, names, images=None, **feeds):
    """The values of the public tensors of these names."""
    feeds = {name + ':0': value for name, value in feeds.items()}
    if images is not None:
        feeds['images:0'] = images
    values = small.session.run([name + ':0' for name in names.split()], feeds)
    return values if len(values) > 1 else values[0]


def noise(small, images):
    code, mu, sigma = fetch(small, 'code mu sigma', images)
    return (code - mu) / sigma


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def leaky(x):
    return np.where(x > 0, x, .1 * x)


def dense(weights, inputs, name):
    return weights[name + '/kernel'] @ inputs + weights[name + '/bias']


def log_bernoulli(images, probabilities):
    p = probabilities.astype(np.float64)
    return np.sum(images * np.log(p) + (1 - images) * np.log1p(-p), (1, 2))


def test_names_and_sizes(small):
    """A tensor without its name, a batch of one image that comes out twice, a size that is written
    into the graph."""
    assert small.result._fields == ('optimize', 'samples', 'elbo', 'reg', 'code')
    names = [tensor.name for tensor in small.result[1:]]
    assert names == ['samples:0', 'elbo:0', 'divergence:0', 'code:0']
    shapes = [value.shape for value in fetch(small, 'elbo divergence code mu', pictures(1))]
    assert shapes == [(), (1,), (1, 7), (1, 7)] and fetch(small, 'num_samples') == 100
    dimensions = {size.value for variable in tf.trainable_variables() for size in variable.shape}
    assert dimensions.issuperset(np.hstack(list(SIZES.values())))


def test_default_sizes_and_initial_logits():
    """A default that is not the README's; initial logits that are turned or not the pixels'."""
    logits = np.random.RandomState(0).randn(28, 28)
    with tf.Graph().as_default(), tf.Session() as session:
        network = model.Network(logits=logits)
        code = network.encoder(tf.zeros([3, 28, 28])).mean()
        probabilities = network.decoder(tf.zeros([3, 14])).mean()
        assert network.prior().mean.shape == (1, 14)
        session.run(tf.global_variables_initializer())
        assert session.run(code).shape == (3, 14)
        np.testing.assert_allclose(session.run(probabilities)[1], sigmoid(logits), rtol=1e-5)
        shapes = {name: value.shape for name, value in named(session).items()}
    assert shapes['encoder/lstm/recurrent_kernel'] == (24, 4 * 24)
    assert shapes['decoder/dense_2/kernel'] == (7 * 7 * 32, 512)
    assert shapes['decoder/conv_transpose_1/kernel'] == (3, 2, 32, 32)


def test_initial_weights():
    """Weights without a seed, or always of the same; another spread or start of them."""
    runs = []
    for seed in 3, 3, 4:
        with tf.Graph().as_default(), tf.Session() as session:
            network = model.Network(seed=seed, mixture_components=200, **SIZES)
            network.decoder(network.encoder(tf.zeros([1, *SHAPE])).mean())
            network.prior()
            session.run(tf.global_variables_initializer())
            runs.append(named(session))
    constants = {'encoder/lstm/input/bias': np.repeat([0, 1, 0, 0], 13),  # Forget gates open.
                 'prior/logits': 0, 'prior/scale': .5}
    for name, one in runs[0].items():
        np.testing.assert_array_equal(one, runs[1][name])
        if 'bias' in name or name in constants:
            np.testing.assert_array_equal(one, constants.get(name, 0) + 0 * one)
            continue
        assert np.mean(one != runs[2][name]) > .9, name
        if name == 'encoder/lstm/recurrent_kernel':
            np.testing.assert_allclose(one @ one.T, np.eye(13), atol=1e-5)
        elif name == 'prior/mean':
            assert one.std() == pytest.approx(.07, rel=.1)
        elif one.ndim == 2:  # Glorot uniform.
            assert .9 < abs(one).max() / np.sqrt(6 / sum(one.shape)) <= 1, name


@pytest.mark.parametrize('small', [1], indirect=True)
def test_learning_rate_may_be_a_number_and_all_noise_depends_on_the_seed(small):
    """A rate that is ignored, samples of one seed, noise of a seed that another has for images with
    a pixel more, a batch of one image that cannot be split."""
    other = build(learning_rate=.004, seed=1, **SIZES)
    one, two = np.zeros([2, 1, *SHAPE])
    one[0, 0, :2] = two[0, 0, :3] = 1
    for images, others in (pictures(4), pictures(4)), (two, one):
        assert np.all(abs(noise(small, images) - noise(other, others)).max(1) > .1)
    assign(other.session, dict(zip(trainable(other.session)[0], trainable(small.session)[1])))
    assert np.mean(abs(fetch(small, 'samples') - fetch(other, 'samples')) > .01) > .5
    before = trainable(other.session)[1]
    other.session.run(other.result.optimize, {'images:0': pictures(1)})
    # Adam's first step moves each weight by the learning rate.
    moves = [abs(a - b).max() for a, b in zip(before, trainable(other.session)[1])]
    np.testing.assert_allclose(moves, .004, rtol=.02)


def test_encoder(small):
    """Gates in a wrong order, rows taken for columns, steps or images mixed up, activations left
    out; variables made anew by a second call."""
    images, weights, variables = pictures(3), named(small.session), tf.global_variables()
    posterior = small.network.encoder(tf.constant(images, tf.float32))
    assert tf.global_variables() == variables
    actual = [*zip(*small.session.run([posterior.mean(), posterior.stddev()])),
              *zip(*fetch(small, 'mu sigma', images))]
    for image, result in zip([*images, *images], actual):
        output, cell, outputs = np.zeros(13), 0, []
        for row in image:
            gates = dense(weights, row, 'encoder/lstm/input')
            gates += output @ weights['encoder/lstm/recurrent_kernel']
            i, f, o, candidate = gates.reshape(4, 13)
            cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(candidate)
            output = sigmoid(o) * np.tanh(cell)
            outputs.append(output)
        hidden = leaky(dense(weights, np.hstack(outputs), 'encoder/dense'))
        expected = [dense(weights, hidden, 'encoder/mu'),
                    np.logaddexp(0, dense(weights, hidden, 'encoder/sigma'))]
        np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-4)


def test_decoder(small):
    """Pixels in a wrong order, kernels turned or shifted, activations left out; variables made anew
    by a second call; a likelihood of another kind."""
    codes, weights = np.random.RandomState(1).randn(3, 7), named(small.session)
    variables = tf.global_variables()
    likelihood = small.network.decoder(tf.constant(codes, tf.float32))
    assert tf.global_variables() == variables

    def conv_transpose(maps, name, margin):
        """Adds each place of the small map, times the kernel, to the large one."""
        kernel, (height, width, _) = weights[name + '/kernel'], maps.shape
        large = np.zeros((2 * height + 4, width + 1, kernel.shape[2]))
        for i, j in np.ndindex(height, width):
            large[2 * i:2 * i + len(kernel), j:j + 2] += kernel @ maps[i, j]
        return large[margin:margin + 2 * height, :width] + weights[name + '/bias']

    reconstruction, images = fetch(small, 'reconstruction', code=codes), pictures(3)
    for code, image in zip(codes, reconstruction):
        hidden = leaky(dense(weights, code, 'decoder/dense_1'))
        maps = leaky(dense(weights, hidden, 'decoder/dense_2'))
        maps = maps.reshape(HEIGHT // 4, WIDTH // 4, -1)
        maps = leaky(conv_transpose(maps, 'decoder/conv_transpose_1', 0))
        logits = conv_transpose(maps, 'decoder/conv_transpose_2', 1)
        np.testing.assert_allclose(image, sigmoid(logits.reshape(SHAPE)), rtol=1e-3, atol=1e-5)
    probabilities, log_p = small.session.run(
        [likelihood.mean(), likelihood.log_prob(np.float32(images))])
    np.testing.assert_allclose(probabilities, reconstruction, rtol=1e-5)
    np.testing.assert_allclose(log_p.sum((1, 2)), log_bernoulli(images, probabilities), rtol=1e-5)


@pytest.mark.parametrize('logit', [-1e4, -30., 30., 1e4])
def test_extreme_logits(small, logit):
    """A probability's logarithm, which is infinite or clipped there, and its gradient NaN."""
    images = pictures(3)
    images[:2] = [[[0.]], [[1.]]]
    kernel, bias = tf.trainable_variables('decoder')[-2:]
    assign(small.session, {kernel: np.zeros(kernel.shape), bias: np.full(bias.shape, logit)})
    elbo, divergence = fetch(small, 'elbo divergence', images)
    expected = np.sum(images * logit - np.logaddexp(0, logit), (1, 2)) - divergence
    np.testing.assert_allclose(elbo, expected.mean(), rtol=1e-5)
    small.session.run(small.result.optimize, {'images:0': images})
    assert all(np.isfinite(value).all() for value in small.session.run(tf.global_variables()))


def test_noise(small):
    """Noise that rows, halves or dimensions share, or each batch or step; a variance in place of a
    deviation; a stateful operation's noise."""
    values = noise(small, pictures(3000))
    assert len(np.unique(values.round(3), axis=0)) == 3000
    quantiles = np.percentile(values, [2.275, 15.866, 50, 84.134, 97.725])
    np.testing.assert_allclose(quantiles, [-2, -1, 0, 1, 2], atol=.07)
    columns = np.hstack([values[1:], values[:-1]])
    np.testing.assert_allclose(np.corrcoef(columns.T), np.eye(14), atol=.1)

    images = pictures(6)
    first = noise(small, images)
    assert np.all(abs(first - noise(small, pictures(6, seed=1))).max(1) > .1)
    small.session.run(small.result.optimize, {'images:0': images, 'rate:0': 0.})
    assert small.session.run(tf.train.get_global_step()) == 1
    assert np.all(abs(first - noise(small, images)).max(1) > .1)
    assign(small.session, {tf.train.get_global_step(): 0})
    np.testing.assert_array_equal(first, noise(small, images))


def log_mixture(codes, logits, mean, scale):
    """Of each code, the log density of a mixture of Gaussians."""
    squares = (((codes[:, None] - mean) / scale) ** 2).sum(2)
    parts = logits - squares / 2 - np.log(scale * np.sqrt(2 * np.pi)).sum(1)
    return np.logaddexp.reduce(parts, 1) - np.logaddexp.reduce(logits)


def prior(network):
    """The parameters of the prior, found by its variables' names, or those of the standard normal.
    """
    weights = named(network.session)
    if 'prior/mean' not in weights:
        return np.zeros(1), np.zeros([1, 7]), np.ones([1, 7])
    return (weights['prior/logits'], 10 * weights['prior/mean'],
            np.logaddexp(0, weights['prior/scale']))


@pytest.mark.parametrize('count', [1, 2, 5])
def test_elbo_and_its_parts(small, count):
    """A normalising constant, a weight, a half, a square or a sign left out; codes, components or
    sides of a divergence exchanged; a sum for a mean or the reverse; an image of an odd batch."""
    images = pictures(count)
    elbo, code, mu, sigma, reconstruction, log_prior, log_weight, divergence = fetch(
        small, 'elbo code mu sigma reconstruction log_prior log_weight divergence', images)
    expected = log_mixture(code, *prior(small))
    np.testing.assert_allclose(log_prior, expected, rtol=1e-4)
    log_q = np.sum(-.5 * ((code - mu) / sigma) ** 2 - np.log(sigma * np.sqrt(2 * np.pi)), 1)
    log_p = log_bernoulli(images, reconstruction)
    np.testing.assert_allclose(log_weight, log_p + expected - log_q, rtol=1e-4)
    if small.network.mixture_components > 1:
        closed = log_q - expected
    else:
        closed = .5 * np.sum(mu ** 2 + sigma ** 2 - 1 - 2 * np.log(sigma), 1)
    np.testing.assert_allclose(divergence, closed, rtol=1e-4)
    np.testing.assert_allclose(elbo, (log_p - divergence).mean(), rtol=1e-5)
    # Of codes that are fed in place of those.
    fed = 2 * np.random.RandomState(0).randn(count, 7)
    np.testing.assert_allclose(fetch(small, 'log_prior', images, code=fed),
                               log_mixture(fed, *prior(small)), rtol=1e-5)


def test_samples_of_a_mixture():
    """Components drawn with wrong weights or with the noise's own numbers, one left out."""
    logits, mean = np.array([0., 1., -2.]), np.array([[-2., 0.], [1., 1.], [4., -3.]])
    scale, weights = np.array([[.5, 1.], [1., .2], [.3, .3]]), np.exp(logits) / np.exp(logits).sum()
    with tf.Graph().as_default(), tf.Session() as session:
        mixture = model.Mixture(*map(tf.constant, map(np.float32, [logits, mean, scale])))
        first, second, other = session.run([mixture.sample(100000, seed) for seed in (0, 0, 1)])
    np.testing.assert_array_equal(first, second)
    assert (first != other).mean() > .99
    centre = weights @ mean
    spread = (mean - centre).T * weights @ (mean - centre) + np.diag(weights @ scale ** 2)
    np.testing.assert_allclose(first.mean(0), centre, atol=.02)
    np.testing.assert_allclose(np.cov(first.T), spread, atol=.04)


def test_samples_of_many_components():
    """A component after the last one, where the weights, rounded, add up to less than 1."""
    with tf.Graph().as_default(), tf.Session() as session:
        mixture = model.Mixture(tf.zeros([30000]), tf.zeros([30000, 1]), tf.ones([30000, 1]))
        assert session.run(tf.cumsum(tf.nn.softmax(mixture.logits)))[-1] < .9999
        session.run(mixture.sample(100000, 0))


def test_samples_are_decoded_from_the_prior(small):
    """Codes that are not the prior's, a decoder of their own, a fixed number of samples, others at
    each step."""
    samples = fetch(small, 'samples', num_samples=3000)
    assign(small.session, {tf.train.get_global_step(): 1})
    np.testing.assert_array_equal(samples, fetch(small, 'samples', num_samples=3000))
    assert len(np.unique(samples[:, 6], axis=0)) == 3000
    rng, (logits, mean, scale) = np.random.RandomState(0), prior(small)
    np.testing.assert_allclose(fetch(small, 'prior_mean'), mean, rtol=1e-5)
    component = rng.choice(len(logits), 3000, p=np.exp(logits) / np.exp(logits).sum())
    decoded = fetch(small, 'reconstruction',
                    code=mean[component] + scale[component] * rng.randn(3000, 7))
    error = decoded.std(0) * np.sqrt(2 / 3000)
    assert np.all(abs(samples.mean(0) - decoded.mean(0)) < 6 * error)
    np.testing.assert_allclose(samples.std(0), decoded.std(0), rtol=.15)


def assert_gradient(small, objective):
    """Each variable's gradient, as Adam has it, is that of this tensor by finite differences."""
    session, images = small.session, pictures(8)
    session.run(small.result.optimize, {'images:0': images, 'rate:0': 0.})
    assign(session, {tf.train.get_global_step(): 0})  # For the noise of that step.
    rng = np.random.RandomState(0)
    for variable, value in zip(*trainable(session)):
        slot, = (v for v in tf.global_variables() if v.op.name.endswith(variable.op.name + '/Adam'))
        gradient = session.run(slot).astype(np.float64) / .1  # Adam's moment is 1 - beta1 of it.
        norm = np.linalg.norm(gradient)
        assert norm > 0, variable.name
        direction = gradient / norm + rng.randn(*value.shape) / np.sqrt(value.size)
        losses = []
        for step in .01, -.01:
            assign(session, {variable: value + step * direction})
            losses.append(-fetch(small, objective, images))
        assign(session, {variable: value})
        difference = (losses[0] - losses[1]) / .02
        np.testing.assert_allclose(difference, np.sum(gradient * direction), rtol=.03, atol=.03,
                                   err_msg=variable.name)


def test_training_gradient(small):
    """A variable that the loss does not reach, a gradient stopped on one of its ways."""
    assert_gradient(small, 'elbo')


def test_bound_of_several_codes():
    """A mean of logarithms, weights without prior or posterior, half a batch, one code only."""
    several = build(training_codes=3, mixture_components=3, **SIZES)
    with several.session.graph.as_default():
        rng = np.random.RandomState(1)
        assign(several.session, {variable: .1 * rng.randn(*variable.shape.as_list())
                                 for variable in tf.trainable_variables()})
        image = pictures(1)
        images = image.repeat(4000, 0)
        mu, sigma = fetch(several, 'mu sigma', image)
        code = mu + sigma * rng.randn(30000, 7)
        log_weight = np.float64(fetch(several, 'log_weight', image.repeat(30000, 0), code=code,
                                      mu=mu.repeat(30000, 0), sigma=sigma.repeat(30000, 0)))
        expected = np.logaddexp.reduce(log_weight.reshape(3, -1)) - np.log(3)
        error = expected.std() * (1 / 4000 + 1 / 10000) ** .5
        assert abs(fetch(several, 'bound', images) - expected.mean()) < 5 * error
        assert expected.mean() - log_weight.mean() > 10 * error  # Or the test could not fail.
        assert abs(fetch(several, 'elbo', images) - log_weight.mean()) < 5 * log_weight.std() / 60
        assert_gradient(several, 'bound')


def test_steps_of_adam(small):
    """Other decays of the moments, another correction of their bias, a rate of another step."""
    variables, values = trainable(small.session)
    slots = {v.op.name: v for v in tf.global_variables()}
    moments = [[slots['optimizer/%s/Adam%s' % (v.op.name, end)] for v in variables]
               for end in ('', '_1')]
    old_means = old_squares = [np.zeros_like(value) for value in values]
    for step, rate in (1, .01), (2, .02), (3, .005):
        small.session.run(small.result.optimize, {'images:0': pictures(8, step), 'rate:0': rate})
        means, squares = small.session.run(moments)
        corrected, moved = rate * (1 - .99 ** step) ** .5 / (1 - .9 ** step), trainable(
            small.session)[1]
        for value, new, *numbers in zip(values, moved, old_means, means, old_squares, squares):
            old_mean, mean, old_square, square = np.float64(numbers)
            gradient = (mean - .9 * old_mean) / .1
            np.testing.assert_allclose(square, .99 * old_square + .01 * gradient ** 2, rtol=1e-3,
                                       atol=1e-5 * square.max())
            np.testing.assert_allclose(value - new, corrected * mean / (square ** .5 + 1e-8),
                                       atol=.01 * rate)
        values, old_means, old_squares = moved, means, squares
