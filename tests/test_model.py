"""Tests of model.py, through its contract: sizes, public names, variables found by their names."""

import functools
import types

import numpy as np
import pytest
import tensorflow.compat.v1 as tf
from numpy.testing import assert_allclose, assert_array_equal

import model

# Sizes that differ from each other and from the defaults.
SHAPE = 12, 20
SIZES = dict(code_size=7, lstm_units=13, dense_units=11, channels=(6, 4), image_shape=SHAPE)
KINDS = {'normal': dict(seed=0), 'decay': dict(seed=1, mixture_components=3, weight_decay=.1),
         'mixture': dict(seed=2, mixture_components=3)}


@functools.lru_cache(None)
def build(kind):
    """Returns a small network and values of its variables to start from, far from zero."""
    with tf.Graph().as_default():
        images = tf.placeholder(tf.float32, [None, *SHAPE], 'images')
        network = model.Network(**SIZES, **KINDS[kind])
        result = network.optimization(images, tf.placeholder_with_default(.01, [], 'rate'))
        session, rng = tf.Session(), np.random.RandomState(1)
        session.run(tf.global_variables_initializer())
        start = session.run({variable: variable for variable in tf.global_variables()})
        for variable in tf.trainable_variables():
            scale = .03 if variable.op.name == 'prior/mean' else .3  # For components that overlap.
            start[variable] = scale * rng.randn(*variable.shape.as_list())
        return types.SimpleNamespace(network=network, result=result, session=session, start=start)


@pytest.fixture(params=KINDS)
def small(request):
    """A network of each kind with its initial values."""
    built = build(request.param)
    with built.session.graph.as_default():
        assign(built.session, built.start)
        yield built


def assign(session, values):
    session.run([variable.initializer for variable in values],
                {variable.initializer.inputs[1]: value for variable, value in values.items()})


def named(session):
    """Returns the values of the trainable variables by their names."""
    return session.run({variable.op.name: variable for variable in tf.trainable_variables()})


def fetch(small, names, **feeds):
    """Returns the values of the public tensors of these names while others are fed."""
    values = small.session.run([name + ':0' for name in names.split()],
                               {name + ':0': value for name, value in feeds.items()})
    return values if len(values) > 1 else values[0]


def pictures(count, seed=0):
    """Returns images with black, white and grey pixels."""
    return np.clip(np.random.RandomState(seed).normal(.3, .5, [count, *SHAPE]), 0, 1)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def swish(x):
    return x / (1 + np.exp(-2 * x))


def dense(weights, inputs, name):
    return inputs @ weights[name + '/kernel'] + weights[name + '/bias']


def log_bernoulli(images, probabilities):
    p = probabilities.astype(np.float64)
    return np.sum(images * np.log(p) + (1 - images) * np.log1p(-p), (1, 2))


def log_normal(values, mean, scale):
    return np.sum(-.5 * ((values - mean) / scale) ** 2 - np.log(scale * np.sqrt(2 * np.pi)), -1)


def test_defaults_and_initial_weights():
    """Sizes are the README's. Initial weights depend only on the seed and have Glorot's spread,
    except two; biases are 0, but 1 for forget gates and as given for pixels."""
    logits, runs = np.float32(np.random.RandomState(0).randn(28, 28)), []
    for seed in 3, 3, 4:
        with tf.Graph().as_default(), tf.Session() as session:
            network = model.Network(mixture_components=200, seed=seed, initial_logits=logits)
            network.decoder(network.encoder(tf.zeros([1, 28, 28])).mean())
            network.prior()
            session.run(tf.global_variables_initializer())
            runs.append(named(session))
    first, again, other = runs
    assert first['decoder/dense_3/kernel'].shape == (384 + 14, 7 * 7 * 32)
    assert first['decoder/conv_transpose_1/kernel'].shape == (3, 2, 32, 32)
    constants = {'encoder/lstm/input/bias': np.repeat([0, 1, 0, 0], 24), 'prior/logits': 0,
                 'prior/scale': .5, 'decoder/pixel_bias': logits}
    for name, value in first.items():
        assert_array_equal(value, again[name])
        if 'bias' in name or name in constants:
            assert_array_equal(value, constants.get(name, 0) + 0 * value)
            continue
        assert np.mean(value != other[name]) > .9, name
        *window, fan_out, fan_in = value.shape
        spread = np.sqrt(2 / (np.prod(window) * (fan_in + fan_out)))  # Glorot's.
        spread = {'prior/mean': .07, 'encoder/lstm/recurrent_kernel': 96 ** -.5}.get(name, spread)
        assert value.std() == pytest.approx(spread, rel=.1), name


def test_parts_share_their_variables(small):
    """A second call of each part uses the variables of the first and gives the public tensors."""
    assert small.result._fields == ('optimize', 'samples', 'elbo', 'divergence')
    assert [tensor.name for tensor in small.result[1:]] == ['samples:0', 'elbo:0', 'divergence:0']
    assert {7, 13, 11, 6, 4} < {size.value for v in tf.trainable_variables() for size in v.shape}
    images, variables = np.float32(pictures(500)), tf.global_variables()
    posterior = small.network.encoder(tf.constant(images))
    prior = small.network.prior()
    code = prior.sample(500, small.network.seed)
    likelihood = small.network.decoder(code)
    assert tf.global_variables() == variables
    *parameters, code, probabilities, log_p, log_prior = small.session.run(
        [posterior.mean(), posterior.stddev(), code, likelihood.mean(),
         tf.reduce_sum(likelihood.log_prob(images), [1, 2]), prior.log_prob(code)])
    weight = fetch(small, 'log_weight', images=images, code=code, mu=0 * code, sigma=1 + 0 * code)
    assert_allclose(weight, log_p + log_prior - log_normal(code, 0, 1), 1e-4)
    assert_allclose(log_p, log_bernoulli(images, probabilities), 1e-4)
    assert_allclose(fetch(small, 'mu sigma', images=images), parameters, 1e-4, 1e-5)
    assert_allclose(fetch(small, 'reconstruction', code=code), probabilities, 1e-4)
    assert_allclose(fetch(small, 'samples', num_samples=500), probabilities, 1e-4)


def test_encoder(small):
    """The encoder equals an LSTM over the rows, and dense layers, in NumPy."""
    images, weights = pictures(3), named(small.session)
    output, cell, outputs = np.zeros([3, 13]), 0, []
    for rows in images.transpose(1, 0, 2):
        gates = dense(weights, rows, 'encoder/lstm/input')
        gates += output @ weights['encoder/lstm/recurrent_kernel']
        i, f, o, candidate = np.split(gates, 4, 1)
        cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(candidate)
        output = sigmoid(o) * np.tanh(cell)
        outputs.append(output)
    hidden = swish(dense(weights, np.hstack(outputs), 'encoder/dense'))
    mu, sigma = (dense(weights, hidden, 'encoder/' + name) for name in ('mu', 'sigma'))
    actual = fetch(small, 'mu sigma', images=images)
    assert_allclose(actual, [mu, np.logaddexp(0, sigma)], rtol=1e-4, atol=1e-4)


def test_decoder(small):
    """The decoder equals dense layers, skip connections and transposed convolutions in NumPy."""
    code, weights = np.random.RandomState(1).randn(3, 7), named(small.session)

    def conv_transpose(maps, name, margin):
        """Adds each pixel of the small map, times the kernel, to the large one."""
        kernel, (count, height, width, _) = weights[name + '/kernel'], maps.shape
        large = np.zeros((count, 2 * height + 4, width + 1, kernel.shape[2]))
        for i, j in np.ndindex(height, width):
            part = np.tensordot(maps[:, i, j], kernel, (1, 3))
            large[:, 2 * i:2 * i + len(kernel), j:j + 2] += part
        return large[:, margin:margin + 2 * height, :width] + weights[name + '/bias']

    hidden = swish(dense(weights, code, 'decoder/dense_1'))
    for name in 'decoder/dense_2', 'decoder/dense_3':
        hidden = swish(dense(weights, np.hstack([hidden, code]), name))
    maps = swish(conv_transpose(hidden.reshape(3, 3, 5, 6), 'decoder/conv_transpose_1', 0))
    logits = conv_transpose(maps, 'decoder/conv_transpose_2', 1).reshape(3, *SHAPE)
    logits += weights['decoder/pixel_bias']
    assert_allclose(fetch(small, 'reconstruction', code=code), sigmoid(logits), 1e-3, 1e-5)


def test_extreme_logits(small):
    """The ELBO is exact and its gradient finite where probabilities round to 0 or 1."""
    images, logits = pictures(3), np.resize([-1e4, -30., 30., 1e4], SHAPE)
    images[:2] = [[[0.]], [[1.]]]
    kernel, bias, pixel_bias = tf.trainable_variables('decoder')[-3:]
    assign(small.session, {kernel: np.zeros(kernel.shape), bias: [0.] * 4, pixel_bias: logits})
    elbo, divergence = fetch(small, 'elbo divergence', images=images)
    expected = np.sum(images * logits - np.logaddexp(0, logits), (1, 2)) - divergence
    assert_allclose(elbo, expected.mean(), rtol=1e-5)
    small.session.run(small.result.optimize, {'images:0': images})
    assert all(np.isfinite(value).all() for value in small.session.run(tf.global_variables()))


def test_noise():
    """Codes are mu + sigma times standard normal noise, which is the same only for the same code
    of the same image, batch, step and seed."""
    (dark, light), values = np.zeros([2, 125, *SHAPE]), []
    light[-1, 0, 0] = 1
    for small in map(build, KINDS):
        global_step = tf.train.get_global_step(small.session.graph)
        for step, images in (0, dark), (0, light), (1, dark), (1, light), (1, light):
            assign(small.session, {**small.start, global_step: step})
            code, mu, sigma = fetch(small, 'code mu sigma', images=images, num_codes=2)
            values.append((code - np.repeat(mu, 2, 0)) / np.repeat(sigma, 2, 0))
        assert_array_equal(values.pop(), values[-1])
    values = np.vstack(values)
    assert len(np.unique(values.round(3), axis=0)) == 12 * 250
    assert_allclose(np.percentile(values, [2.275, 50, 97.725]), [-2, 0, 2], atol=.07)
    columns = np.hstack([values[1:], values[:-1]])
    assert_allclose(np.corrcoef(columns.T), np.eye(14), atol=.1)


@pytest.mark.parametrize('count', [1, 2, 5])
def test_elbo_and_its_parts(small, count):
    """For any number of images and of codes, the ELBO and its parts equal formulas in NumPy."""
    images, weights, codes = pictures(count), named(small.session), 1 + small.network.seed
    logits, mean, scale = np.zeros(1), np.zeros([1, 7]), np.ones([1, 7])
    if small.network.mixture_components > 1:
        logits, mean = weights['prior/logits'], 10 * weights['prior/mean']
        scale = np.logaddexp(0, weights['prior/scale'])
    assert_allclose(fetch(small, 'prior_mean'), mean, rtol=1e-5)
    elbo, code, mu, sigma, reconstruction, log_prior, log_weight, divergence = fetch(
        small, 'elbo code mu sigma reconstruction log_prior log_weight divergence', images=images,
        num_codes=codes)
    parts = logits + log_normal(code[:, None], mean, scale)
    expected = np.logaddexp.reduce(parts, 1) - np.logaddexp.reduce(logits)
    assert_allclose(log_prior, expected, rtol=1e-4)
    log_q = log_normal(code, *np.repeat([mu, sigma], codes, axis=1))
    log_p = log_bernoulli(np.repeat(images, codes, axis=0), reconstruction)
    assert_allclose(log_weight, log_p + expected - log_q, rtol=1e-4)
    kl = .5 * np.sum(mu ** 2 + sigma ** 2 - 1 - 2 * np.log(sigma), 1)
    estimate = (log_q - expected).reshape(count, codes).mean(1)
    assert_allclose(divergence, kl if len(mean) == 1 else estimate, rtol=1e-4)
    assert_allclose(elbo, log_p.mean() - divergence.mean(), rtol=1e-5)


def test_samples_of_a_mixture():
    """Samples have the mixture's mean and covariance, and are independent for different seeds."""
    weights, mean = np.array([.3, .6, .1]), np.array([[-2., 0.], [1., 1.], [4., -3.]])
    scale = np.array([[.5, 1.], [1., .2], [.3, .3]])
    with tf.Graph().as_default(), tf.Session() as session:
        mixture = model.Mixture(*map(tf.constant, map(np.float32, [np.log(weights), mean, scale])))
        first, other = session.run([mixture.sample(100000, seed) for seed in (0, 1)])
    centre = weights @ mean
    spread = (mean - centre).T * weights @ (mean - centre) + np.diag(weights @ scale ** 2)
    assert_allclose(first.mean(0), centre, atol=.02)
    assert_allclose(np.cov(first.T, other.T), np.kron(np.eye(2), spread), atol=.04)


def slots(end):
    """Returns Adam's moments of each trainable variable."""
    slots = {variable.op.name: variable for variable in tf.global_variables()}
    return [slots['optimizer/' + v.op.name + end] for v in tf.trainable_variables()]


def test_training_gradient(small):
    """The gradient of each variable equals finite differences of the objective, the log-mean-exp of
    log_weight over the codes, with fixed parameters in its log q(z|x), minus the L2 penalty."""
    session, images, rng = small.session, pictures(8, seed=3), np.random.RandomState(0)
    codes, parameters = 1 + small.network.seed, fetch(small, 'mu sigma', images=images)
    mu, sigma = np.repeat(parameters, codes, axis=1)
    noise = (fetch(small, 'code', images=images, num_codes=codes) - mu) / sigma

    def objective():
        mu, sigma = np.repeat(fetch(small, 'mu sigma', images=images), codes, axis=1)
        log_weight = fetch(small, 'log_weight', images=images, code=mu + sigma * noise,
                           num_codes=codes, **dict(zip(['mu', 'sigma'], parameters)))
        bound = np.logaddexp.reduce(log_weight.reshape(-1, codes), axis=1).mean()
        kernels = [value for name, value in named(session).items() if name.endswith('kernel')]
        return bound - small.network.weight_decay * sum(map(np.sum, map(np.square, kernels))) / 2
    session.run(small.result.optimize, {'images:0': images, 'rate:0': 0., 'num_codes:0': codes})
    for variable, moment in zip(tf.trainable_variables(), session.run(slots('/Adam'))):
        gradient = np.float64(moment) / .1  # Adam's moment is 1 - beta1 of it.
        norm = np.linalg.norm(gradient)
        assert norm > 0, variable.name
        direction = gradient / norm + rng.randn(*gradient.shape) / np.sqrt(gradient.size)
        objectives = []
        for step in .002, -.002:
            assign(session, {**small.start, variable: small.start[variable] + step * direction})
            objectives.append(objective())
        difference = (objectives[1] - objectives[0]) / .004
        assert_allclose(difference, np.sum(gradient * direction), .02, .01, err_msg=variable.name)


def test_steps_of_adam(small):
    """Each step, on any number of images, is Adam's with beta1 .9, beta2 .99 and the fed rate."""
    parts = tf.trainable_variables(), slots('/Adam'), slots('/Adam_1')

    def read():
        return [np.hstack([np.ravel(value) for value in values]).astype(np.float64)
                for values in small.session.run(parts)]

    value, mean, square = read()  # Of all variables, side by side.
    for step, rate in enumerate([.01, .02, .005], 1):
        small.session.run(small.result.optimize, {'images:0': pictures(step, step), 'rate:0': rate})
        new_value, new_mean, new_square = read()
        gradient = (new_mean - .9 * mean) / .1
        expected = .99 * square + .01 * gradient ** 2
        assert_allclose(new_square, expected, 1e-3, 1e-5 * new_square.max())
        corrected = rate * (1 - .99 ** step) ** .5 / (1 - .9 ** step)
        expected = value - corrected * new_mean / (new_square ** .5 + 1e-8)
        assert_allclose(new_value, expected, atol=.01 * rate)
        value, mean, square = new_value, new_mean, new_square
    assert small.session.run(tf.train.get_global_step()) == 3
