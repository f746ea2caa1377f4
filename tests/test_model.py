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


def named(small):
    """The values of the trainable variables by their names."""
    return {v.op.name: value for v, value in zip(*trainable(small.session))}


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


def log_bernoulli(images, probabilities):
    p = probabilities.astype(np.float64)
    return np.sum(images * np.log(p) + (1 - images) * np.log1p(-p), (1, 2))


def test_result_and_public_names(small):
    """A tensor without its name, a batch of one image that comes out twice."""
    assert small.result._fields == ('optimize', 'samples', 'elbo', 'reg', 'code')
    names = [tensor.name for tensor in small.result[1:]]
    assert names == ['samples:0', 'elbo:0', 'divergence:0', 'code:0']
    shapes = [value.shape for value in fetch(small, 'elbo divergence code mu', pictures(1))]
    assert shapes == [(), (1,), (1, 7), (1, 7)] and fetch(small, 'num_samples') == 100


def test_every_size_is_an_argument(small):
    """A size that is written into the graph."""
    dimensions = {size.value for variable in tf.trainable_variables() for size in variable.shape}
    assert dimensions.issuperset(np.hstack(list(SIZES.values())))


def test_default_sizes_and_initial_logits():
    """An argument without default; initial logits that are turned or not those of the pixels."""
    logits = np.random.RandomState(0).randn(28, 28)
    with tf.Graph().as_default(), tf.Session() as session:
        network = model.Network(code_size=2, logits=logits)
        mu = network.encoder(tf.zeros([3, 28, 28])).mean()
        probabilities = network.decoder(tf.zeros([3, 2])).mean()
        session.run(tf.global_variables_initializer())
        assert session.run(mu).shape == (3, 2)
        np.testing.assert_allclose(session.run(probabilities)[1], sigmoid(logits), rtol=1e-5)


def test_learning_rate_may_be_a_number_and_all_noise_depends_on_the_seed(small):
    """A rate that is ignored, samples of one seed, a batch of one image that cannot be split."""
    other = build(learning_rate=.004, seed=1, **SIZES)
    assert np.all(abs(noise(small, pictures(4)) - noise(other, pictures(4))).max(1) > .1)
    if other.network.mixture_components == small.network.mixture_components:
        assign(other.session, dict(zip(trainable(other.session)[0], trainable(small.session)[1])))
        assert np.mean(abs(fetch(small, 'samples') - fetch(other, 'samples')) > .01) > .5
    before = trainable(other.session)[1]
    other.session.run(other.result.optimize, {'images:0': pictures(1)})
    # Adam's first step moves each weight by the learning rate.
    moves = [abs(a - b).max() for a, b in zip(before, trainable(other.session)[1])]
    np.testing.assert_allclose(moves, .004, rtol=.02)


def test_lstm(small):
    """Gates in a wrong order, rows taken for columns, steps or images mixed up."""
    images, weights = pictures(3), named(small)
    with tf.variable_scope('encoder', reuse=True):
        outputs = small.session.run(small.network._lstm(tf.constant(images, tf.float32)))
    for image, actual in zip(images, outputs.reshape(3, HEIGHT, 13)):
        output = cell = np.zeros(13)
        for step, row in enumerate(image):
            gates = weights['encoder/lstm/input/kernel'] @ row + weights['encoder/lstm/input/bias']
            gates += output @ weights['encoder/lstm/recurrent_kernel']
            i, f, o, candidate = gates.reshape(4, 13)
            cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(candidate)
            output = sigmoid(o) * np.tanh(cell)
            np.testing.assert_allclose(actual[step], output, rtol=1e-4, atol=1e-5)


def test_decoder(small):
    """Pixels in a wrong order, kernels turned or shifted, activations left out."""
    codes, weights = np.random.RandomState(1).randn(3, 7), named(small)

    def leaky(x):
        return np.where(x > 0, x, .1 * x)

    def dense(inputs, name):
        return weights['decoder/%s/kernel' % name] @ inputs + weights['decoder/%s/bias' % name]

    def conv_transpose(maps, name, margin):
        """Adds each place of the small map, times the kernel, to the large one."""
        kernel, (height, width, _) = weights['decoder/%s/kernel' % name], maps.shape
        large = np.zeros((2 * height + 4, width + 1, kernel.shape[2]))
        for i, j in np.ndindex(height, width):
            large[2 * i:2 * i + len(kernel), j:j + 2] += kernel @ maps[i, j]
        return large[margin:margin + 2 * height, :width] + weights['decoder/%s/bias' % name]

    for code, image in zip(codes, fetch(small, 'reconstruction', code=codes)):
        hidden = leaky(dense(leaky(dense(code, 'dense_1')), 'dense_2'))
        maps = hidden.reshape(HEIGHT // 4, WIDTH // 4, -1)
        maps = leaky(conv_transpose(maps, 'conv_transpose_1', 0))
        logits = conv_transpose(maps, 'conv_transpose_2', 1)
        np.testing.assert_allclose(image, sigmoid(logits.reshape(SHAPE)), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('small', [1], indirect=True)
def test_divergence(small):
    """A term without its half, a variance in place of a deviation, a sum over the wrong axis."""
    actual, mu, sigma = fetch(small, 'divergence mu sigma', pictures(4))
    mu, sigma = mu.astype(np.float64), sigma.astype(np.float64)
    assert mu.std() > .1 and sigma.std() > .1
    closed = .5 * np.sum(mu ** 2 + sigma ** 2 - 1 - 2 * np.log(sigma), 1)
    np.testing.assert_allclose(actual, closed, rtol=1e-4)

    samples = np.random.RandomState(0).randn(100000, 1, mu.shape[1])
    log_ratios = np.sum(.5 * (mu + sigma * samples) ** 2 - .5 * samples ** 2 - np.log(sigma), 2)
    error = log_ratios.std(0) / np.sqrt(len(samples))
    assert np.all(abs(actual - log_ratios.mean(0)) < 5 * error)


@pytest.mark.parametrize('logit', [-1e4, -30., 30., 1e4])
def test_extreme_logits(small, logit):
    """A probability's logarithm, which is infinite or clipped there, and its gradient NaN."""
    images = pictures(3)
    images[:2] = [[[0.]], [[1.]]]
    kernel, bias = tf.trainable_variables('decoder')[-2:]
    weights, old = small.session.run([kernel, bias])
    assign(small.session, {kernel: 0 * weights, bias: np.full(old.shape, logit)})
    elbo, divergence = fetch(small, 'elbo divergence', images)
    expected = np.sum(images * logit - np.logaddexp(0, logit), (1, 2)) - divergence
    np.testing.assert_allclose(elbo, expected.mean(), rtol=1e-5)

    assign(small.session, {kernel: weights})
    elbo, _ = small.session.run([small.result.elbo, small.result.optimize], {'images:0': images})
    assert np.isfinite(elbo)
    assert all(np.isfinite(value).all() for value in small.session.run(tf.global_variables()))


def test_elbo_is_the_mean_of_its_parts(small):
    """A sum for a mean or the reverse, a sign, a weight on the divergence."""
    for count in 1, 2, 5:
        images = pictures(count)
        elbo, reconstruction, divergence = fetch(small, 'elbo reconstruction divergence', images)
        parts = log_bernoulli(images, reconstruction) - divergence
        np.testing.assert_allclose(elbo, parts.mean(), rtol=1e-5)


def test_noise_is_standard_normal(small):
    """Noise that rows, halves or dimensions share; a variance in place of a deviation."""
    values = noise(small, pictures(3000))
    assert len(np.unique(values.round(3), axis=0)) == 3000
    quantiles = np.percentile(values, [2.275, 15.866, 50, 84.134, 97.725])
    np.testing.assert_allclose(quantiles, [-2, -1, 0, 1, 2], atol=.07)
    columns = np.hstack([values[1:], values[:-1]])
    np.testing.assert_allclose(np.corrcoef(columns.T), np.eye(14), atol=.1)


def test_noise_depends_on_step_and_batch_only(small):
    """Noise from a stateful operation, or the same noise at each step or for each batch."""
    images = pictures(6)
    code = fetch(small, 'code', images)
    np.testing.assert_array_equal(code, fetch(small, 'code', images))
    first = noise(small, images)
    assert np.all(abs(first - noise(small, pictures(6, seed=1))).max(1) > .1)
    small.session.run(small.result.optimize, {'images:0': images, 'rate:0': 0.})
    assert small.session.run(tf.train.get_global_step()) == 1
    assert np.all(abs(first - noise(small, images)).max(1) > .1)
    assign(small.session, {tf.train.get_global_step(): 0})
    np.testing.assert_array_equal(code, fetch(small, 'code', images))


def test_encoder_and_decoder_return_distributions_and_share_variables(small):
    """Variables made anew by a second call, a likelihood of another kind."""
    images, code = pictures(3), np.random.RandomState(0).randn(3, 7)
    mu, sigma = fetch(small, 'mu sigma', images)
    expected = fetch(small, 'reconstruction', code=code)
    variables = tf.global_variables()
    posterior = small.network.encoder(tf.constant(images, tf.float32))
    likelihood = small.network.decoder(tf.constant(code, tf.float32))
    assert tf.global_variables() == variables
    mean, stddev, log_q, probabilities, log_p = small.session.run([
        posterior.mean(), posterior.stddev(), posterior.log_prob(code.astype(np.float32)),
        likelihood.mean(), likelihood.log_prob(images.astype(np.float32))])
    np.testing.assert_allclose(mean, mu, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(stddev, sigma, rtol=1e-4)
    np.testing.assert_allclose(probabilities, expected, rtol=1e-5)
    log_normal = -.5 * ((code - mu) / sigma) ** 2 - np.log(sigma) - .5 * np.log(2 * np.pi)
    np.testing.assert_allclose(log_q, log_normal, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(log_p.sum((1, 2)), log_bernoulli(images, expected), rtol=1e-5)


def log_mixture(codes, logits, mean, scale):
    """Of each code, the log density of a mixture of Gaussians."""
    squares = (((codes[:, None] - mean) / scale) ** 2).sum(2)
    parts = logits - squares / 2 - np.log(scale * np.sqrt(2 * np.pi)).sum(1)
    return np.logaddexp.reduce(parts, 1) - np.logaddexp.reduce(logits)


def prior(network):
    """The parameters of the prior, found by its variables' names, or those of the standard normal.
    """
    weights = named(network)
    if 'prior/mean' not in weights:
        return np.zeros(1), np.zeros([1, 7]), np.ones([1, 7])
    return (weights['prior/logits'], 10 * weights['prior/mean'],
            np.logaddexp(0, weights['prior/scale']))


def test_log_prior_and_log_weight(small):
    """A normalising constant, a weight or a square left out; codes or components mixed up."""
    images, code = pictures(5), 2 * np.random.RandomState(0).randn(5, 7)
    mu, sigma = fetch(small, 'mu sigma', images)
    log_prior, log_weight, divergence, reconstruction = fetch(
        small, 'log_prior log_weight divergence reconstruction', images, code=code)
    expected = log_mixture(code, *prior(small))
    np.testing.assert_allclose(log_prior, expected, rtol=1e-5)
    log_q = np.concatenate([log_mixture(z, np.zeros(1), m, s) for z, m, s in zip(
        code[:, None], mu[:, None], sigma[:, None])])
    np.testing.assert_allclose(
        log_weight, log_bernoulli(images, reconstruction) + expected - log_q, rtol=1e-4)
    if small.network.mixture_components > 1:
        np.testing.assert_allclose(divergence, log_q - expected, rtol=1e-4)


def test_mean_divergence_from_a_mixture_is_its_integral():
    """A divergence with its sides exchanged, or from one component only."""
    network = build(mixture_components=3, code_size=1)
    with network.session.graph.as_default():
        mean, logits, scale = tf.trainable_variables('prior')
        assign(network.session, {logits: [0., 1., -1.], mean: [[-.2], [.05], [.3]],
                                 scale: [[-1.], [1.], [0.]]})
    mu, sigma, parameters = .7, .6, prior(network)
    z = np.linspace(-6, 8, 20001)[:, None]
    log_q = log_mixture(z, np.zeros(1), np.full([1, 1], mu), np.full([1, 1], sigma))
    integral = np.sum(np.exp(log_q) * (log_q - log_mixture(z, *parameters))) * (z[1] - z[0])
    code = mu + sigma * np.random.RandomState(0).randn(20000, 1)
    values = fetch(network, 'divergence', np.zeros([20000, 28, 28]), code=code,
                   mu=np.full_like(code, mu), sigma=np.full_like(code, sigma))
    assert abs(values.mean() - integral) < 5 * values.std() / np.sqrt(20000)


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


@pytest.mark.parametrize('small', [1], indirect=True)
def test_samples_are_decoded_from_the_prior(small):
    """Codes that are not standard normal, a decoder of their own, a fixed number of samples."""
    samples = fetch(small, 'samples', num_samples=3000)
    np.testing.assert_array_equal(samples, fetch(small, 'samples', num_samples=3000))
    assert len(np.unique(samples[:, 6], axis=0)) == 3000
    decoded = fetch(small, 'reconstruction', code=np.random.RandomState(0).randn(3000, 7))
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


def test_seed_of_the_weights():
    """Weights without a seed, or always of the same."""
    runs = []
    for seed in 3, 3, 4:
        with tf.Graph().as_default(), tf.Session() as session:
            network = model.Network(seed=seed, **SIZES)
            network.decoder(network.encoder(tf.zeros([1, *SHAPE])).mean())
            session.run(tf.global_variables_initializer())
            variables, values = trainable(session)
            runs.append(values)
    for variable, one, same, other in zip(variables, *runs):
        np.testing.assert_array_equal(one, same)
        assert 'bias' in variable.name or np.mean(one != other) > .9, variable.name
        if variable.op.name == 'encoder/lstm/input/bias':  # Forget gates open (Gers et al., 2000).
            np.testing.assert_array_equal(one.reshape(4, -1).mean(1), [0, 1, 0, 0])
