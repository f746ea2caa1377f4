"""Tests of model.py, through its contract: sizes, public names, variables found by their names."""

import collections
import functools

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import model

# Sizes that nothing else in the graph has.
SHAPE = 12, 20
SIZES = dict(code_size=7, lstm_units=13, dense_units=11, channels=(6, 4), image_shape=SHAPE)
# The standard normal prior; a learned one; that, several codes of each image and a fixed rate.
KINDS = {'normal': dict(), 'mixture': dict(seed=1, mixture_components=3, weight_decay=.1),
         'codes': dict(seed=2, mixture_components=3, training_codes=3)}

Small = collections.namedtuple('Small', 'network result session start')


@functools.lru_cache(None)
def build(kind):
    """A small network in a graph and session of its own, and the values of its variables at a
    start, the weights and biases far from zero."""
    with tf.Graph().as_default():
        images = tf.placeholder(tf.float32, [None, *SHAPE], 'images')
        rate = tf.placeholder_with_default(.01, [], 'rate')
        network = model.Network(**SIZES, **KINDS[kind])
        result = network.optimization(images, .01 if kind == 'codes' else rate)
        session, variables = tf.Session(), tf.global_variables()
        session.run(tf.global_variables_initializer())
        start, rng = dict(zip(variables, session.run(variables))), np.random.RandomState(1)
        for variable in tf.trainable_variables():
            scale = .03 if variable.op.name == 'prior/mean' else .3  # For components that overlap.
            start[variable] = scale * rng.randn(*variable.shape.as_list())
        return Small(network, result, session, start)


@pytest.fixture(params=KINDS)
def small(request):
    """A network of each kind at its start."""
    built = build(request.param)
    with built.session.graph.as_default():
        assign(built.session, built.start)
        yield built


def assign(session, values):
    session.run([variable.initializer for variable in values],
                {variable.initializer.inputs[1]: value for variable, value in values.items()})


def named(session):
    """The values of the trainable variables by their names."""
    return session.run({variable.op.name: variable for variable in tf.trainable_variables()})


def fetch(small, names, **feeds):
    """The values of the public tensors of these names, where these others are fed."""
    values = small.session.run([name + ':0' for name in names.split()],
                               {name + ':0': value for name, value in feeds.items()})
    return values if len(values) > 1 else values[0]


def pictures(count, seed=0):
    """Images with black, white and grey pixels."""
    return np.clip(np.random.RandomState(seed).normal(.3, .5, [count, *SHAPE]), 0, 1)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def leaky(x):
    return np.where(x > 0, x, .1 * x)


def dense(weights, inputs, name):
    return inputs @ weights[name + '/kernel'].T + weights[name + '/bias']


def log_bernoulli(images, probabilities):
    p = probabilities.astype(np.float64)
    return np.sum(images * np.log(p) + (1 - images) * np.log1p(-p), (1, 2))


def log_normal(values, mean, scale):
    return np.sum(-.5 * ((values - mean) / scale) ** 2 - np.log(scale * np.sqrt(2 * np.pi)), -1)


def test_names_and_sizes(small):
    """A tensor without its name, one image that comes out twice, a size written into the graph."""
    assert small.result._fields == ('optimize', 'samples', 'elbo', 'reg', 'code')
    names = [tensor.name for tensor in small.result[1:]]
    assert names == ['samples:0', 'elbo:0', 'divergence:0', 'code:0']
    shapes = [value.shape for value in fetch(small, 'elbo divergence code mu', images=pictures(1))]
    assert shapes == [(), (1,), (1, 7), (1, 7)] and fetch(small, 'num_samples') == 100
    dimensions = {size.value for variable in tf.trainable_variables() for size in variable.shape}
    assert dimensions.issuperset(np.hstack(list(SIZES.values())))


def test_defaults_and_initial_weights():
    """A default that is not the README's; weights without a seed, or always of the same; another
    spread or start of them; logits that are ignored or turned."""
    logits, runs = np.float32(np.random.RandomState(0).randn(28, 28)), []
    for arguments in dict(seed=3), dict(seed=3), dict(seed=4, logits=logits):
        with tf.Graph().as_default(), tf.Session() as session:
            network = model.Network(mixture_components=200, **arguments)
            network.decoder(network.encoder(tf.zeros([1, 28, 28])).mean())
            network.prior()
            assert model.Network().prior().mean.shape == (1, 14)
            session.run(tf.global_variables_initializer())
            runs.append(named(session))
    first, again, other = runs
    assert first['decoder/dense_2/kernel'].shape == (7 * 7 * 32, 512)
    assert first['decoder/conv_transpose_1/kernel'].shape == (3, 2, 32, 32)
    assert first['decoder/conv_transpose_1/bias'].shape == (32,)
    assert np.array_equal(other['decoder/conv_transpose_2/bias'].ravel(), logits.ravel())
    constants = {'encoder/lstm/input/bias': np.repeat([0, 1, 0, 0], 24),  # Forget gates open.
                 'prior/logits': 0, 'prior/scale': np.full([200, 14], .5)}
    for name, value in first.items():
        np.testing.assert_array_equal(value, again[name])
        if 'bias' in name or name in constants:
            np.testing.assert_array_equal(value, constants.get(name, 0) + 0 * value)
            continue
        assert np.mean(value != other[name]) > .9, name
        if name == 'encoder/lstm/recurrent_kernel':
            np.testing.assert_allclose(value @ value.T, np.eye(24), atol=1e-5)
        elif name == 'prior/mean':
            assert value.std() == pytest.approx(.07, rel=.1)
        else:  # Glorot uniform.
            *window, fan_out, fan_in = value.shape
            limit = np.sqrt(6 / (np.prod(window) * (fan_in + fan_out)))
            assert .9 < abs(value).max() / limit <= 1 and value.std() > .5 * limit, name


def test_parts_share_their_variables(small):
    """Variables made anew by a second call, another likelihood, samples, weights of other codes."""
    images, variables = np.float32(pictures(500)), tf.global_variables()
    posterior = small.network.encoder(tf.constant(images))
    prior = small.network.prior()
    code = prior.sample(500, small.network.seed)
    likelihood = small.network.decoder(code)
    assert tf.global_variables() == variables
    *parameters, code, probabilities, log_p, log_prior = small.session.run(
        [posterior.mean(), posterior.stddev(), code, likelihood.mean(),
         tf.reduce_sum(likelihood.log_prob(images), [1, 2]), prior.log_prob(code)])
    np.testing.assert_allclose(parameters, fetch(small, 'mu sigma', images=images),
                               rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(fetch(small, 'reconstruction', code=code), probabilities, rtol=1e-4)
    np.testing.assert_allclose(fetch(small, 'samples', num_samples=500), probabilities, rtol=1e-4)
    np.testing.assert_allclose(log_p, log_bernoulli(images, probabilities), rtol=1e-5)
    weight = fetch(small, 'log_weight', images=images, code=code, mu=0 * code, sigma=1 + 0 * code)
    np.testing.assert_allclose(weight, log_p + log_prior - log_normal(code, 0, 1), rtol=1e-4)


def test_encoder(small):
    """Gates in a wrong order, columns for rows, steps or images mixed up, activations left out."""
    images, weights = pictures(3), named(small.session)
    output, cell, outputs = np.zeros([3, 13]), 0, []
    for rows in images.transpose(1, 0, 2):
        gates = dense(weights, rows, 'encoder/lstm/input')
        gates += output @ weights['encoder/lstm/recurrent_kernel']
        i, f, o, candidate = np.split(gates, 4, 1)
        cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(candidate)
        output = sigmoid(o) * np.tanh(cell)
        outputs.append(output)
    hidden = leaky(dense(weights, np.hstack(outputs), 'encoder/dense'))
    mu, sigma = (dense(weights, hidden, 'encoder/' + name) for name in ('mu', 'sigma'))
    np.testing.assert_allclose(fetch(small, 'mu sigma', images=images),
                               [mu, np.logaddexp(0, sigma)], rtol=1e-4, atol=1e-4)


def test_decoder(small):
    """Pixels in a wrong order, kernels turned or shifted, activations left out."""
    code, weights = np.random.RandomState(1).randn(3, 7), named(small.session)

    def conv_transpose(maps, name, margin):
        """Adds each place of the small map, times the kernel, to the large one."""
        kernel, (count, height, width, _) = weights[name + '/kernel'], maps.shape
        large = np.zeros((count, 2 * height + 4, width + 1, kernel.shape[2]))
        for i, j in np.ndindex(height, width):
            part = np.tensordot(maps[:, i, j], kernel, (1, 3))
            large[:, 2 * i:2 * i + len(kernel), j:j + 2] += part
        return large[:, margin:margin + 2 * height, :width] + weights[name + '/bias']

    hidden = leaky(dense(weights, code, 'decoder/dense_1'))
    maps = leaky(dense(weights, hidden, 'decoder/dense_2')).reshape(3, 3, 5, 6)
    maps = leaky(conv_transpose(maps, 'decoder/conv_transpose_1', 0))
    logits = conv_transpose(maps, 'decoder/conv_transpose_2', 1).reshape(3, *SHAPE)
    np.testing.assert_allclose(fetch(small, 'reconstruction', code=code), sigmoid(logits),
                               rtol=1e-3, atol=1e-5)


def test_extreme_logits(small):
    """A probability's logarithm, which is infinite or clipped there, and its gradient NaN."""
    images, logits = pictures(3), np.resize([-1e4, -30., 30., 1e4], SHAPE)
    images[:2] = [[[0.]], [[1.]]]
    kernel, bias = tf.trainable_variables('decoder')[-2:]
    assign(small.session, {kernel: np.zeros(kernel.shape), bias: logits.reshape(bias.shape)})
    elbo, divergence = fetch(small, 'elbo divergence', images=images)
    expected = np.sum(images * logits - np.logaddexp(0, logits), (1, 2)) - divergence
    np.testing.assert_allclose(elbo, expected.mean(), rtol=1e-5)
    small.session.run(small.result.optimize, {'images:0': images})
    assert all(np.isfinite(value).all() for value in small.session.run(tf.global_variables()))


def test_noise():
    """Noise that rows, halves or dimensions share, or each batch, step or seed; that of a seed for
    images with a pixel more; a variance in place of a deviation; a stateful operation's noise."""
    (dark, light), values = np.zeros([2, 250, *SHAPE]), []
    light[-1, 0, 0] = 1
    for small in map(build, KINDS):
        global_step = tf.train.get_global_step(small.session.graph)
        for step, images in (0, dark), (0, light), (1, dark), (1, light), (1, light):
            assign(small.session, {**small.start, global_step: step})
            code, mu, sigma = fetch(small, 'code mu sigma', images=images)
            values.append((code - mu) / sigma)
        np.testing.assert_array_equal(values.pop(), values[-1])
    values = np.vstack(values)
    assert len(np.unique(values.round(3), axis=0)) == 12 * 250
    np.testing.assert_allclose(np.percentile(values, [2.275, 50, 97.725]), [-2, 0, 2], atol=.07)
    columns = np.hstack([values[1:], values[:-1]])
    np.testing.assert_allclose(np.corrcoef(columns.T), np.eye(14), atol=.1)


@pytest.mark.parametrize('count', [1, 2, 5])
def test_elbo_and_its_parts(small, count):
    """A normalising constant, a weight, a half, a square or a sign left out; codes, components or
    sides of a divergence exchanged; a sum for a mean or the reverse; an image of an odd batch."""
    images, weights = pictures(count), named(small.session)
    logits, mean, scale = np.zeros(1), np.zeros([1, 7]), np.ones([1, 7])
    if small.network.mixture_components > 1:
        logits, mean = weights['prior/logits'], 10 * weights['prior/mean']
        scale = np.logaddexp(0, weights['prior/scale'])
    np.testing.assert_allclose(fetch(small, 'prior_mean'), mean, rtol=1e-5)
    elbo, code, mu, sigma, reconstruction, log_prior, log_weight, divergence = fetch(
        small, 'elbo code mu sigma reconstruction log_prior log_weight divergence', images=images)
    parts = logits + log_normal(code[:, None], mean, scale)
    expected = np.logaddexp.reduce(parts, 1) - np.logaddexp.reduce(logits)
    np.testing.assert_allclose(log_prior, expected, rtol=1e-4)
    log_p, log_q = log_bernoulli(images, reconstruction), log_normal(code, mu, sigma)
    np.testing.assert_allclose(log_weight, log_p + expected - log_q, rtol=1e-4)
    kl = .5 * np.sum(mu ** 2 + sigma ** 2 - 1 - 2 * np.log(sigma), 1)
    np.testing.assert_allclose(divergence, kl if len(mean) == 1 else log_q - expected, rtol=1e-4)
    np.testing.assert_allclose(elbo, (log_p - divergence).mean(), rtol=1e-5)


@pytest.mark.parametrize('small', ['codes'], indirect=True)
def test_bound_of_several_codes(small):
    """A mean or maximum of logarithms, no prior or posterior, half a batch, one image twice."""
    # Weights at which no code of three outweighs the others.
    assign(small.session, {v: small.start[v] / 2 for v in tf.trainable_variables()})
    images, rng = pictures(2).repeat(2000, 0), np.random.RandomState(0)
    mu, sigma = fetch(small, 'mu sigma', images=images)
    log_weights = [fetch(small, 'log_weight', images=images, mu=mu, sigma=sigma,
                         code=mu + sigma * rng.randn(*mu.shape)) for _ in range(3)]
    expected = np.logaddexp.reduce(np.float64(log_weights)) - np.log(3)
    for count, part in (1, expected[:2000]), (4000, expected):
        error = part.std() * (1 / count + 1 / len(part)) ** .5
        assert abs(fetch(small, 'bound', images=images[:count]) - part.mean()) < 4 * error
    assert expected.mean() - np.mean(log_weights) > 10 * error  # Or the test could not fail.


def test_samples_of_a_mixture():
    """Components drawn with wrong weights or with the noise's own numbers, one left out, or one
    after the last, where the weights, rounded, add up to less than 1; a seed that is ignored."""
    logits, mean = np.array([0., 1., -2.]), np.array([[-2., 0.], [1., 1.], [4., -3.]])
    scale, weights = np.array([[.5, 1.], [1., .2], [.3, .3]]), np.exp(logits) / np.exp(logits).sum()
    with tf.Graph().as_default(), tf.Session() as session:
        mixture = model.Mixture(*map(tf.constant, map(np.float32, [logits, mean, scale])))
        first, other = session.run([mixture.sample(100000, seed) for seed in (0, 1)])
        many = model.Mixture(tf.zeros([30000]), tf.zeros([30000, 1]), tf.ones([30000, 1]))
        assert session.run(tf.cumsum(tf.nn.softmax(many.logits)))[-1] < .9999
        quantiles = np.percentile(session.run(many.sample(100000, 0)), [2.275, 50, 97.725])
    np.testing.assert_allclose(quantiles, [-2, 0, 2], atol=.03)
    centre = weights @ mean
    spread = (mean - centre).T * weights @ (mean - centre) + np.diag(weights @ scale ** 2)
    np.testing.assert_allclose(first.mean(0), centre, atol=.02)
    np.testing.assert_allclose(np.cov(first.T, other.T), np.kron(np.eye(2), spread), atol=.04)


def slots(end):
    """Adam's moments of each trainable variable."""
    slots = {variable.op.name: variable for variable in tf.global_variables()}
    return [slots['optimizer/' + v.op.name + end] for v in tf.trainable_variables()]


def test_training_gradient(small):
    """A variable that the loss does not reach, a gradient stopped on one of its ways or, where the
    parameters of q(z|x) stand in the weights of several codes, not stopped; other decays."""
    session, images, rng = small.session, pictures(8, seed=2), np.random.RandomState(0)
    codes, parameters = small.network.training_codes, fetch(small, 'mu sigma', images=images)
    drawn = [op.outputs[0] for op in session.graph.get_operations()
             if op.type == 'StatelessRandomNormal' and op.outputs[0].shape[1] == codes * 7]
    noises = np.split(session.run(drawn[0], {'images:0': images}), codes, 1)
    session.run(small.result.optimize, {'images:0': images, 'rate:0': 0.})

    def objective():
        mu, sigma = fetch(small, 'mu sigma', images=images)
        log_weights = [fetch(small, 'log_weight', images=images, code=mu + sigma * noise,
                             **dict(zip(['mu', 'sigma'], parameters))) for noise in noises]
        squares = sum(np.sum(value ** 2) for name, value in named(session).items()
                      if name.endswith('kernel'))
        bound = fetch(small, 'elbo', images=images)
        if codes > 1:
            bound = np.logaddexp.reduce(log_weights).mean() - np.log(codes)
        return bound - small.network.weight_decay * squares / 2
    for variable, moment in zip(tf.trainable_variables(), session.run(slots('/Adam'))):
        gradient = np.float64(moment) / .1  # Adam's moment is 1 - beta1 of it.
        norm = np.linalg.norm(gradient)
        assert norm > 0, variable.name
        direction = gradient / norm + rng.randn(*gradient.shape) / np.sqrt(gradient.size)
        objectives = []
        for step in .004, -.004:
            assign(session, {**small.start, variable: small.start[variable] + step * direction})
            objectives.append(objective())
        difference = (objectives[1] - objectives[0]) / .008
        np.testing.assert_allclose(difference, np.sum(gradient * direction), rtol=.01, atol=.01,
                                   err_msg=variable.name)


def test_steps_of_adam(small):
    """Other decays or corrections, a rate that is ignored or of another step, steps that are not
    counted; a batch of one image that cannot be split."""
    parts = tf.trainable_variables(), slots('/Adam'), slots('/Adam_1')

    def read():
        return [np.hstack([np.ravel(value) for value in values]).astype(np.float64)
                for values in small.session.run(parts)]

    value, mean, square = read()
    rates = [.01] * 3 if small.network.training_codes > 1 else [.01, .02, .005]
    for step, rate in enumerate(rates, 1):
        small.session.run(small.result.optimize, {'images:0': pictures(step, step), 'rate:0': rate})
        new_value, new_mean, new_square = read()
        gradient = (new_mean - .9 * mean) / .1
        np.testing.assert_allclose(new_square, .99 * square + .01 * gradient ** 2, rtol=1e-3,
                                   atol=1e-5 * new_square.max())
        corrected = rate * (1 - .99 ** step) ** .5 / (1 - .9 ** step)
        np.testing.assert_allclose(
            value - new_value, corrected * new_mean / (new_square ** .5 + 1e-8), atol=.01 * rate)
        value, mean, square = new_value, new_mean, new_square
    assert small.session.run(tf.train.get_global_step()) == 3
