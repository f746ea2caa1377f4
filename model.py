"""The network: an LSTM variational autoencoder as a static TensorFlow graph, and its mathematics.

Images x and latent codes z have the model p(x, z) = p(z) p(x|z). The prior p(z) is a standard
normal or a learned mixture of Gaussians; the likelihood p(x|z), which the decoder computes, is a
Bernoulli distribution for each pixel. The encoder computes the variational posterior q(z|x), a
diagonal Gaussian. Training maximises the evidence lower bound (ELBO) of log p(x), in nats:

    ELBO(x) = E_q(z|x)[log p(x|z)] - KL(q(z|x) || p(z))

References:
    D. P. Kingma and M. Welling, Auto-Encoding Variational Bayes, 2013, arXiv:1312.6114: the ELBO
        (eq. 3), the reparameterisation (section 2.4), the divergence (appendix B).
    J. Tomczak and M. Welling, VAE with a VampPrior, 2018, arXiv:1705.07120: learned priors.
    Y. Burda et al., Importance Weighted Autoencoders, 2015, arXiv:1509.00519: many codes (eq. 8).
    G. Roeder et al., Sticking the Landing, 2017, arXiv:1703.09194: a gradient with less noise.
"""

import collections
import dataclasses
import math
import typing

import tensorflow.compat.v1 as tf

tf.disable_v2_behavior()

Model = collections.namedtuple('Model', 'optimize samples elbo divergence')


@dataclasses.dataclass
class Network:
    """Builds the graph. Repeated calls of `encoder`, `decoder` or `prior` share variables."""
    code_size: int = 14
    mixture_components: int = 1  # Gaussians in a learned prior; 1 is the fixed standard normal.
    image_shape: tuple = (28, 28)  # Height and width, multiples of 4.
    weight_decay: float = 0.  # L2 penalty: this times half the sum of all squared kernels.
    lstm_units: int = 24
    dense_units: int = 384  # Units of each hidden dense layer, except the decoder's last.
    channels: tuple = (32, 32)  # Of the decoder's maps at a quarter and at half the height.
    initial_logits: typing.Any = 0.  # Of the pixel bias: a number or `[height, width]`.
    seed: int = 0  # Determines the initial weights and all noise.

    def __post_init__(self):
        tf.set_random_seed(self.seed)

    def encoder(self, images):
        """Returns the posterior q(z|x), a `Normal` over `[n, code_size]`, for float32 images
        `[n, height, width]` from 0 to 1."""
        with tf.variable_scope('encoder', reuse=tf.AUTO_REUSE):
            hidden = _activation(_dense(self._lstm(images), self.dense_units, 'dense'))
            mu = _dense(hidden, self.code_size, 'mu')
            sigma = tf.nn.softplus(_dense(hidden, self.code_size, 'sigma'))
            return tf.distributions.Normal(mu, sigma)

    def decoder(self, code):
        """Returns the likelihood p(x|z), a `Bernoulli` over `[n, height, width]`, for codes
        `[n, code_size]`."""
        with tf.variable_scope('decoder', reuse=tf.AUTO_REUSE):
            (first, second), (height, width) = self.channels, self.image_shape
            hidden = _activation(_dense(code, self.dense_units, 'dense_1'))
            # Skip connections keep more dimensions in use (A. B. Dieng et al., 2019).
            hidden = tf.concat([hidden, code], 1)
            hidden = _activation(_dense(hidden, self.dense_units, 'dense_2'))
            hidden = tf.concat([hidden, code], 1)
            hidden = _activation(_dense(hidden, height * width // 16 * first, 'dense_3'))
            # Only the height is doubled, twice; the last four channels are four adjacent pixels of
            # a row. This is faster than doubling the width as well.
            maps = tf.reshape(hidden, [-1, height // 4, width // 4, first])
            maps = _activation(_conv_transpose(maps, second, size=3, name='conv_transpose_1'))
            maps = _conv_transpose(maps, channels=4, size=4, name='conv_transpose_2')
            initial = tf.constant_initializer(self.initial_logits)
            bias = tf.get_variable('pixel_bias', self.image_shape, initializer=initial)
            logits = tf.reshape(maps, [-1, height, width]) + bias
            return tf.distributions.Bernoulli(logits, dtype=tf.float32)  # For grey images, too.

    def prior(self):
        """Returns the prior p(z) over `[n, code_size]`, a `Mixture` of one or more Gaussians."""
        shape = [self.mixture_components, self.code_size]
        if self.mixture_components == 1:
            return Mixture(tf.zeros([1]), tf.zeros(shape), tf.ones(shape))
        with tf.variable_scope('prior', reuse=tf.AUTO_REUSE):
            logits = tf.get_variable('logits', shape[:1], initializer=tf.zeros_initializer())
            mean = tf.get_variable('mean', shape, initializer=tf.random_normal_initializer(0, .07))
            scale = tf.get_variable('scale', shape, initializer=tf.constant_initializer(.5))
            # The factor makes the means learn ten times as fast, which improves the ELBO.
            return Mixture(logits, 10 * mean, tf.nn.softplus(scale))

    def optimization(self, images, learning_rate):
        """Builds everything that trains, evaluates and samples the model. README.md lists the
        tensors that are fetched and fed by name.

        Args:
            images: float32 tensor `[n, height, width]` with values from 0 to 1.
            learning_rate: number or scalar tensor.

        Returns:
            A namedtuple of
            optimize: operation that takes one step of Adam (D. P. Kingma and J. Ba, 2014).
            samples: `[num_samples, height, width]`, pixel probabilities, decoded from the prior.
            elbo: scalar, the mean ELBO of the images in nats, estimated from their codes.
            divergence: `[n]`, KL(q(z|x) || p(z)) in nats: exact for the standard normal prior,
                estimated from the codes for a learned one.
        """
        step = tf.train.get_or_create_global_step()
        num_codes = tf.placeholder_with_default(1, [], 'num_codes')
        # mu, sigma and code may be fed: everything below then uses the values that are fed.
        mu, sigma = _in_halves(self._encode, images)
        mu, sigma = tf.identity(mu, 'mu'), tf.identity(sigma, 'sigma')
        noise = self._noise(images, num_codes, step)
        codes = mu[:, None] + sigma[:, None] * noise  # The reparameterisation.
        code = tf.reshape(codes, [-1, self.code_size], 'code')
        origin = tf.range(tf.shape(code)[0]) // num_codes  # The image that each code belongs to.
        mean, log_likelihood = _in_halves(self._decode, code, tf.gather(images, origin))
        tf.identity(mean, 'reconstruction')
        # The gradient of log q(z|x) reaches mu and sigma only through the code, which makes it less
        # noisy (Roeder et al.). With several codes this is biased (G. Tucker et al., 2018,
        # arXiv:1810.04152), but trains to a better bound than the full gradient.
        frozen_posterior = tf.distributions.Normal(tf.gather(tf.stop_gradient(mu), origin),
                                                   tf.gather(tf.stop_gradient(sigma), origin))
        prior = self.prior()
        tf.identity(prior.means, 'prior_mean')
        log_prior = tf.identity(prior.log_prob(code), 'log_prior')
        log_posterior = tf.reduce_sum(frozen_posterior.log_prob(code), 1)
        log_weight = tf.subtract(log_likelihood + log_prior, log_posterior, 'log_weight')
        # With one code, this estimates the ELBO; with several, a tighter bound, up to a constant.
        objective = tf.reduce_mean(tf.reduce_logsumexp(tf.reshape(log_weight, [-1, num_codes]), 1))
        if self.weight_decay:
            objective -= self.weight_decay * tf.add_n([
                tf.nn.l2_loss(v) for v in tf.trainable_variables() if 'kernel' in v.op.name])
        with tf.variable_scope('optimizer'):
            adam = tf.train.AdamOptimizer(learning_rate, beta2=.99)
            # GATE_GRAPH builds fewer operations, so that training starts sooner.
            optimize = adam.minimize(-objective, step, gate_gradients=adam.GATE_GRAPH)

        if self.mixture_components == 1:
            divergence = .5 * tf.reduce_sum(mu ** 2 + sigma ** 2 - 1 - 2 * tf.log(sigma), 1)
        else:
            divergence = tf.reduce_mean(tf.reshape(log_posterior - log_prior, [-1, num_codes]), 1)
        divergence = tf.identity(divergence, 'divergence')
        elbo = tf.subtract(tf.reduce_mean(log_likelihood), tf.reduce_mean(divergence), 'elbo')
        # The noise depends on the seed alone, so that one sees samples improve in training.
        num_samples = tf.placeholder_with_default(100, [], 'num_samples')
        samples = self.decoder(prior.sample(num_samples, self.seed)).mean()
        return Model(optimize, tf.identity(samples, 'samples'), elbo, divergence)

    def _noise(self, images, num_codes, step):
        """Returns standard normal noise `[n, num_codes, code_size]`, a function of the seed, the
        batch and the step, so that a resumed run draws what an uninterrupted one would."""
        # The batches of an evaluation share a step, but hardly ever the sum of their pixels.
        batch_hash = tf.cast(tf.reduce_sum(images), tf.int64)
        # `tf.random.stateless_normal` would build an operation that TensorFlow 1.14 lacks.
        return tf.raw_ops.StatelessRandomNormal(
            shape=[tf.shape(images)[0], num_codes, self.code_size],
            seed=[self.seed + 2 ** 32 * batch_hash, step])

    def _encode(self, images):
        """Returns mu and sigma of q(z|x), both `[n, code_size]`."""
        posterior = self.encoder(images)
        return posterior.mean(), posterior.stddev()

    def _decode(self, code, images):
        """Returns the pixel probabilities `[n, height, width]` and log p(x|z), `[n]`."""
        likelihood = self.decoder(code)
        return likelihood.mean(), tf.reduce_sum(likelihood.log_prob(images), [1, 2])

    def _lstm(self, images):
        """Returns the outputs of all steps, one for each row, as `[n, height * lstm_units]`."""
        units, (height, width) = self.lstm_units, self.image_shape
        # The inputs of all steps are multiplied at once, outside of the recurrence.
        rows = tf.reshape(tf.transpose(images, [1, 0, 2]), [-1, width])
        # Biases of i, f, o, candidate. 1 opens the forget gates at first (F. A. Gers et al., 2000).
        inputs = _dense(rows, 4 * units, 'lstm/input', [0] * units + [1] * units + [0] * 2 * units)
        kernel = tf.get_variable('lstm/recurrent_kernel', [units, 4 * units],
                                 initializer=tf.orthogonal_initializer())
        outputs = []
        output = cell = tf.zeros([tf.shape(images)[0], units])
        # The gradient of `add_n`, unlike that of `+`, builds no operations for broadcasting.
        for gates in tf.split(inputs, height):
            gates = tf.add_n([gates, tf.matmul(output, kernel)])
            i, f, o, candidate = tf.split(gates, 4, 1)
            cell = tf.add_n([tf.sigmoid(f) * cell, tf.sigmoid(i) * tf.tanh(candidate)])
            output = tf.sigmoid(o) * tf.tanh(cell)
            outputs.append(output)
        return tf.concat(outputs, 1)


class Mixture(typing.NamedTuple):
    """A mixture of diagonal Gaussians: sum_k softmax(logits)_k N(z; mean_k, scale_k^2)."""
    logits: tf.Tensor  # `[components]`
    means: tf.Tensor  # `[components, size]`
    scales: tf.Tensor  # `[components, size]`, standard deviations.

    def log_prob(self, value):
        """Returns the log density `[...]`, in nats, of points `[..., size]`."""
        # The sum of ((value - mean) / scale) ** 2, without an array of [..., components, size].
        precision = self.scales ** -2
        squares = (tf.tensordot(value ** 2, precision, [[-1], [1]])
                   - 2 * tf.tensordot(value, self.means * precision, [[-1], [1]])
                   + tf.reduce_sum(self.means ** 2 * precision, 1))
        log_norm = tf.reduce_sum(tf.log(self.scales) + .5 * math.log(2 * math.pi), 1)
        return tf.reduce_logsumexp(tf.nn.log_softmax(self.logits) - log_norm - .5 * squares, -1)

    def sample(self, n, seed):
        """Returns points `[n, size]`, a pure function of the integer `seed` and the parameters."""
        component = tf.raw_ops.StatelessMultinomial(
            logits=self.logits[None], num_samples=n, seed=[seed, 1])[0]
        noise = tf.raw_ops.StatelessRandomNormal(shape=[n, self.means.shape[1]], seed=[seed, 0])
        return tf.gather(self.means, component) + tf.gather(self.scales, component) * noise


def _in_halves(function, *tensors):
    """Calls `function` on both halves of a batch, which run in parallel, and joins the results.
    Without this, a step takes 1.2 times as long."""
    count = tf.shape(tensors[0])[0]
    # Convolutions of an empty half have no gradient: a single image is computed twice, kept once.
    first = function(*[tensor[:tf.maximum(count // 2, 1)] for tensor in tensors])
    second = function(*[tensor[count // 2:] for tensor in tensors])
    return [tf.concat(halves, 0)[:count] for halves in zip(first, second)]


def _activation(x):
    """Swish with beta = 2 (P. Ramachandran et al., 2017, arXiv:1710.05941)."""
    return x * tf.sigmoid(2. * x)


def _dense(inputs, units, name, bias_init=0.):
    with tf.variable_scope(name):
        kernel = tf.get_variable('kernel', [inputs.shape[1], units])  # Glorot uniform.
        bias = tf.get_variable('bias', [units], initializer=tf.constant_initializer(bias_init))
        return tf.nn.xw_plus_b(inputs, kernel, bias)


def _conv_transpose(maps, channels, size, name):
    """Doubles the height of `maps`, `[n, height, width, channels]`, by a kernel `[size, 2]`."""
    with tf.variable_scope(name):
        _, height, width, depth = maps.shape.as_list()
        kernel = tf.get_variable('kernel', [size, 2, channels, depth])
        bias = tf.get_variable('bias', [channels], initializer=tf.zeros_initializer())
        shape = [tf.shape(maps)[0], 2 * height, width, channels]
        return tf.nn.conv2d_transpose(maps, kernel, shape, [1, 2, 1, 1]) + bias
