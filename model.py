"""The network: an LSTM variational autoencoder as a static TensorFlow graph, and its mathematics.

A model p(x, z) = p(z) p(x|z) of images x: the prior p(z) over codes z is the standard normal or a
learned mixture of Gaussians, the likelihood p(x|z) a Bernoulli distribution for each pixel, whose
logits the decoder computes. The encoder computes the variational posterior q(z|x), a Gaussian. All
are trained to maximise the evidence lower bound (ELBO) of log p(x), in nats per image:

    ELBO(x) = E_q(z|x)[log p(x|z)] - KL(q(z|x) || p(z))

References:
    D. P. Kingma and M. Welling, Auto-Encoding Variational Bayes, 2013, arXiv:1312.6114. Eq. 3 is
        the ELBO, section 2.4 the reparameterisation, appendix B the divergence in closed form.
    J. Tomczak and M. Welling, VAE with a VampPrior, 2018, arXiv:1705.07120, on learned priors.
    Y. Burda, R. Grosse and R. Salakhutdinov, Importance Weighted Autoencoders, 2015,
        arXiv:1509.00519. Eq. 8 has the weights.
    G. Roeder, Y. Wu and D. Duvenaud, Sticking the Landing, 2017, arXiv:1703.09194. Of the gradient
        that several codes are trained by.
    S. Hochreiter and J. Schmidhuber, Long Short-Term Memory, 1997; with the forget gate of
        F. A. Gers, J. Schmidhuber and F. Cummins, Learning to Forget, 2000.
"""

import collections
import dataclasses
import math
import typing

import tensorflow.compat.v1 as tf

tf.disable_v2_behavior()

Optimization = collections.namedtuple('Optimization', 'optimize samples elbo reg code')


@dataclasses.dataclass
class Network:
    """Builds the parts of the graph. Parts of the same kind share their variables."""
    code_size: int = 14
    mixture_components: int = 1  # Gaussians in the prior; 1: the standard normal, not learned.
    image_shape: tuple = (28, 28)  # Height and width, multiples of 4.
    training_codes: int = 1  # For each image; above 1, of a bound that is tighter than the ELBO.
    weight_decay: float = 0.  # Factor of half the sum of the squared weights, biases apart.
    lstm_units: int = 24  # Of the LSTM's output and of its cell.
    dense_units: int = 512  # Of each hidden dense layer.
    channels: tuple = (32, 32)  # Of the decoder's maps of a quarter and of half the height.
    logits: typing.Any = 0.  # Of the pixels at first, `image_shape` or one; best the mean image's.
    seed: int = 0  # Of the initial weights and of all noise.

    def __post_init__(self):
        tf.set_random_seed(self.seed)

    def encoder(self, images):
        """The posterior q(z|x), a `Normal` over `[n, code_size]`, of float images.

        These are `[n, height, width]`, from 0 to 1."""
        with tf.variable_scope('encoder', reuse=tf.AUTO_REUSE):
            hidden = _activation(_dense(self._lstm(images), self.dense_units, 'dense'))
            mu = _dense(hidden, self.code_size, 'mu')
            sigma = tf.nn.softplus(_dense(hidden, self.code_size, 'sigma'))
            return tf.distributions.Normal(mu, sigma)

    def decoder(self, code):
        """The likelihood p(x|z), a `Bernoulli` over `[n, height, width]`, of codes.

        These are `[n, code_size]`."""
        with tf.variable_scope('decoder', reuse=tf.AUTO_REUSE):
            first, second = self.channels
            height, width = self.image_shape
            hidden = _activation(_dense(code, self.dense_units, 'dense_1'))
            hidden = _activation(_dense(hidden, height * width // 16 * first, 'dense_2'))
            maps = tf.reshape(hidden, [-1, height // 4, width // 4, first])
            maps = _activation(_conv_transpose(maps, second, 3, 'conv_transpose_1', [second]))
            # The last convolution's four channels are four neighbours in a row of pixels: it would
            # take twice as long with a stride of 4 over the columns and a single channel.
            maps = _conv_transpose(maps, 4, 4, 'conv_transpose_2', [height, width // 4, 4],
                                   self.logits)
            return tf.distributions.Bernoulli(logits=tf.reshape(maps, [-1, height, width]),
                                              dtype=tf.float32)

    def prior(self):
        """The prior p(z), a `Mixture` over `[n, code_size]`: standard normal, or learned."""
        if self.mixture_components == 1:
            return Mixture(tf.zeros([1]), tf.zeros([1, self.code_size]),
                           tf.ones([1, self.code_size]))
        with tf.variable_scope('prior', reuse=tf.AUTO_REUSE):
            shape = [self.mixture_components, self.code_size]
            mean = tf.get_variable('mean', shape, initializer=tf.random_normal_initializer(0., .07))
            return Mixture(
                tf.get_variable('logits', shape[:1], initializer=tf.zeros_initializer()),
                10 * mean,  # Its step size is ten times the others': wins 0.1 to 0.3 nats.
                tf.nn.softplus(tf.get_variable('scale', shape,
                                               initializer=tf.constant_initializer(.5))))

    def optimization(self, images, learning_rate):
        """Builds everything that trains, evaluates and samples the model.

        Besides what it returns, it names the tensors `mu`, `sigma`, `code`, `reconstruction` (pixel
        probabilities `[n, height, width]`), `elbo`, `divergence`, `samples`, `num_samples` (a
        scalar that may be fed, 100 by default), `prior_mean` (`[components, code_size]`), and of
        `code`, `[n]`, `log_prior`, log p(z), and `log_weight`, log p(x|z) p(z) / q(z|x), whose mean
        is the ELBO, too, and whose log-mean-exp over many comes near to log p(x). That over several
        codes, if these are trained on, is `bound` (Burda et al., eq. 8).

        Args:
            images: float32 tensor `[n, height, width]`, pixels from 0 to 1.
            learning_rate: number or scalar tensor.

        Returns:
            A namedtuple of
            optimize: operation that takes one step of Adam (D. P. Kingma and J. Ba, 2014).
            samples: `[num_samples, height, width]`, pixel probabilities of codes from the prior.
            elbo: scalar, the mean ELBO of the images in nats, from one code for each image.
            reg: `[n]`, the divergence KL(q(z|x) || p(z)) of each image in nats; with a learned
                prior from that one code.
            code: `[n, code_size]`, a code from each image's posterior.
        """
        step = tf.train.get_or_create_global_step()
        count = tf.shape(images)[0]
        # The images are a part of the seed: the chunks of an evaluation, all of one step, would
        # share their noise else, and the mean over them would be much less certain.
        seed = self.seed + tf.cast(tf.reduce_sum(images), tf.int64) * 2 ** 32
        # The raw operation, since `tf.random.stateless_normal` is another one in each TensorFlow.
        noise = tf.raw_ops.StatelessRandomNormal(
            shape=[count, self.training_codes * self.code_size], seed=tf.stack([seed, step]))
        # Half of the batch for each core takes 0.82 of the time of all of it for both (TensorFlow
        # 1.14, AMD Zen 5). A single image goes into both halves, since some convolutions of
        # TensorFlow 2 have no gradient for no images: of what comes out, the first `count` count.
        middle = tf.maximum(count // 2, 1)
        halves = [self._reconstruct(images[half], noise[half])
                  for half in (slice(middle), slice(count // 2, None))]
        *parts, log_likelihoods, bounds = zip(*halves)
        mu, sigma, code = (tf.identity(tf.concat(part, 0)[:count], name)
                           for part, name in zip(parts, ['mu', 'sigma', 'code']))
        posterior, prior = tf.distributions.Normal(mu, sigma), self.prior()
        log_prior = tf.identity(prior.log_prob(code), 'log_prior')
        log_ratio = tf.reduce_sum(posterior.log_prob(code), 1) - log_prior
        if self.mixture_components == 1:
            normal = tf.distributions.Normal(0., 1.)
            divergence = tf.reduce_sum(tf.distributions.kl_divergence(posterior, normal), 1)
        else:
            divergence = log_ratio
        divergence = tf.identity(divergence, 'divergence')
        # Summed half by half, so that neither half waits for the other one.
        size = tf.cast(tf.maximum(count, 2), tf.float32)
        log_likelihood = tf.add_n(log_likelihoods) / size
        elbo = objective = tf.subtract(log_likelihood, tf.reduce_mean(divergence), 'elbo')
        if self.training_codes > 1:
            objective = tf.divide(tf.add_n(bounds), size, 'bound')
        if self.weight_decay:
            objective -= self.weight_decay * tf.add_n([
                tf.nn.l2_loss(v) for v in tf.trainable_variables() if 'kernel' in v.op.name])

        likelihood = self.decoder(code)
        tf.identity(likelihood.mean(), 'reconstruction')
        tf.subtract(_log_prob(images, likelihood), log_ratio, 'log_weight')
        num_samples = tf.placeholder_with_default(100, [], 'num_samples')
        # The same noise at each step: one sees the same samples grow sharper.
        samples = self.decoder(prior.sample(num_samples, self.seed)).mean()
        samples = tf.identity(samples, 'samples')
        tf.identity(prior.mean, 'prior_mean')

        with tf.variable_scope('optimizer'):
            adam = tf.train.AdamOptimizer(learning_rate, beta2=.99)
            # No update before the last gradient; fewer operations, which saves 0.6 s of start.
            optimize = adam.minimize(-objective, step, gate_gradients=adam.GATE_GRAPH)
        return Optimization(optimize, samples, elbo, divergence, code)

    def _reconstruct(self, images, noise):
        """The posterior's parameters and a code for each image, and sums over images: of log p(x|z)
        and, of several codes, of the log of the mean of p(x|z) p(z) / q(z|x) over them."""
        posterior = self.encoder(images)
        mu, sigma = posterior.mean(), posterior.stddev()
        if self.training_codes == 1:
            code = mu + sigma * noise  # So that gradients reach mu and sigma.
            return mu, sigma, code, tf.reduce_sum(_log_prob(images, self.decoder(code))), None
        # All codes of all images in one piece, `[training_codes * n, ...]`.
        noise = tf.concat(tf.split(noise, self.training_codes, 1), 0)
        images, mus, sigmas = (tf.concat([part] * self.training_codes, 0)
                               for part in (images, mu, sigma))
        codes = mus + sigmas * noise
        # The gradient of log q goes through the codes alone, which has less noise: wins 0.3 nats.
        held = tf.distributions.Normal(tf.stop_gradient(mus), tf.stop_gradient(sigmas))
        log_p = _log_prob(images, self.decoder(codes))
        log_weights = log_p + self.prior().log_prob(codes) - tf.reduce_sum(held.log_prob(codes), 1)
        log_weights = tf.reshape(log_weights, [self.training_codes, -1])
        bound = tf.reduce_sum(tf.reduce_logsumexp(log_weights, 0) - math.log(self.training_codes))
        count = tf.shape(mu)[0]
        return mu, sigma, codes[:count], tf.reduce_sum(log_p[:count]), bound

    def _lstm(self, images):
        """The outputs of all steps, one for each row, side by side: `[n, height * lstm_units]`.

        The rows of all steps are multiplied at once, which takes half of the matrix products out of
        the recurrence.
        """
        units, (height, width) = self.lstm_units, self.image_shape
        with tf.variable_scope('lstm'):
            rows = tf.reshape(tf.transpose(images, [1, 0, 2]), [-1, width])
            # The forget gate's bias has the cell remember from the start (Gers et al., 2000).
            inputs = _dense(rows, 4 * units, 'input',
                            [0.] * units + [1.] * units + [0.] * 2 * units)
            kernel = tf.get_variable('recurrent_kernel', [units, 4 * units],
                                     initializer=tf.orthogonal_initializer())
            outputs = []
            with tf.get_default_graph().gradient_override_map({'Mul': 'MulOfEqualShapes'}):
                for gates in tf.split(inputs, height):
                    if outputs:
                        gates = tf.add_n([gates, tf.matmul(outputs[-1], kernel)])
                    i, f, o, candidate = tf.split(gates, 4, 1)
                    if not outputs:
                        cell = tf.zeros_like(f)
                    cell = tf.add_n([tf.sigmoid(f) * cell, tf.sigmoid(i) * tf.tanh(candidate)])
                    outputs.append(tf.sigmoid(o) * tf.tanh(cell))
            outputs = tf.concat(outputs, 1)
            outputs.set_shape([None, height * units])
            return outputs


class Mixture(typing.NamedTuple):
    """A mixture of diagonal Gaussians: sum_k softmax(logits)_k N(z; mean_k, scale_k^2)."""
    logits: tf.Tensor  # `[components]`
    mean: tf.Tensor  # `[components, size]`
    scale: tf.Tensor  # `[components, size]`, standard deviations.

    def log_prob(self, value):
        """The log density `[n]`, in nats, of points `[n, size]`."""
        # The squares of (value - mean) / scale, summed over dimensions by two matrix products.
        precision = self.scale ** -2
        squares = (tf.matmul(value ** 2, precision, transpose_b=True)
                   - 2 * tf.matmul(value, self.mean * precision, transpose_b=True)
                   + tf.reduce_sum(self.mean ** 2 * precision, 1))
        log_norm = tf.reduce_sum(tf.log(self.scale) + .5 * math.log(2 * math.pi), 1)
        return tf.reduce_logsumexp(tf.nn.log_softmax(self.logits) - log_norm - .5 * squares, 1)

    def sample(self, n, seed):
        """Points `[n, size]`, a pure function of the integer `seed` and of the parameters."""
        weights = tf.nn.softmax(self.logits)
        uniform = tf.raw_ops.StatelessRandomUniform(shape=[n], seed=[seed, 1])
        component = tf.minimum(tf.searchsorted(tf.cumsum(weights), uniform),
                               weights.shape[0].value - 1)  # Rounded, the sum may be below 1.
        noise = tf.raw_ops.StatelessRandomNormal(shape=[n, self.mean.shape[1]], seed=[seed, 0])
        return tf.gather(self.mean, component) + tf.gather(self.scale, component) * noise


@tf.RegisterGradient('MulOfEqualShapes')
def _mul_gradient(op, gradient):
    """TensorFlow's own sees to shapes that differ: 40% more operations, 0.9 s of each start."""
    x, y = op.inputs
    return gradient * y, gradient * x


def _log_prob(images, likelihood):
    """log p(x|z) `[n]`, for grey pixels too. As `Bernoulli.log_prob`, but a step is 5% faster."""
    logits = likelihood.logits
    return tf.reduce_sum(images * logits - tf.nn.softplus(logits), [1, 2])


def _activation(x):
    return tf.nn.leaky_relu(x, .1)  # Trains to 0.4 nats less than the rectifier does.


def _dense(inputs, units, name, bias=0.):
    with tf.variable_scope(name):
        bias = tf.get_variable('bias', [units], initializer=tf.constant_initializer(bias))
        kernel = tf.get_variable('kernel', [units, inputs.shape[1]])  # Glorot uniform.
        # Kernel first: with small batches, forward and gradient take 6% less of a step so.
        product = tf.matmul(kernel, inputs, transpose_b=True)
        return tf.nn.bias_add(tf.transpose(product), bias)


def _conv_transpose(maps, channels, size, name, bias_shape, bias=0.):
    """Doubles the height of `maps`, `[n, height, width, channels]`, by a kernel `[size, 2]`."""
    with tf.variable_scope(name):
        _, height, width, depth = maps.shape.as_list()
        kernel = tf.get_variable('kernel', [size, 2, channels, depth])
        bias = tf.get_variable('bias', bias_shape, initializer=tf.constant_initializer(bias))
        shape = [tf.shape(maps)[0], 2 * height, width, channels]
        return tf.nn.conv2d_transpose(maps, kernel, shape, [1, 2, 1, 1]) + bias
