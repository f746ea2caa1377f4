"""The network: an LSTM variational autoencoder as a static TensorFlow graph, and its mathematics.

A model p(x, z) = p(z) p(x|z) of images x: the prior p(z) over codes z is the standard normal, the
likelihood p(x|z) a Bernoulli distribution for each pixel, whose logits the decoder computes. The
encoder computes the variational posterior q(z|x), a Gaussian. Both are trained to maximise the
evidence lower bound (ELBO) of log p(x), in nats per image:

    ELBO(x) = E_q(z|x)[log p(x|z)] - KL(q(z|x) || p(z))

References:
    D. P. Kingma and M. Welling, Auto-Encoding Variational Bayes, 2013, arXiv:1312.6114. Eq. 3 is
        the ELBO, section 2.4 the reparameterisation, appendix B the divergence in closed form.
    S. Hochreiter and J. Schmidhuber, Long Short-Term Memory, 1997; with the forget gate of
        F. A. Gers, J. Schmidhuber and F. Cummins, Learning to Forget, 2000.
"""

import collections

import tensorflow.compat.v1 as tf

Optimization = collections.namedtuple('Optimization', 'optimize samples elbo reg code')


class Network:
    """Builds the parts of the graph. Parts of the same kind share their variables.

    Args:
        code_size: dimensions of a code.
        lstm_units: size of the LSTM's output and of its cell.
        dense_units: size of the hidden dense layers.
        channels: channels of the decoder's feature maps of 7x7 and of 14x7.
        logits: initial logits of the pixels, a number or an array `[28, 28]`: best those of the
            images' mean, which saves the network to learn it.
        seed: of the initial weights and of all noise, an integer.
    """

    def __init__(self, code_size=14, lstm_units=24, dense_units=512, channels=(32, 32), logits=0.,
                 seed=0):
        self.code_size = code_size
        self.lstm_units = lstm_units
        self.dense_units = dense_units
        self.channels = channels
        self.logits = logits
        self.seed = seed
        tf.set_random_seed(seed)

    def encoder(self, images):
        """The posterior q(z|x), a `Normal` over `[n, code_size]`, of float images `[n, 28, 28]`."""
        with tf.variable_scope('encoder', reuse=tf.AUTO_REUSE):
            outputs = self._lstm(images)
            hidden = _activation(_dense(outputs, self.dense_units, 'dense'))
            mu = _dense(hidden, self.code_size, 'mu')
            sigma = tf.nn.softplus(_dense(hidden, self.code_size, 'sigma'))
            return tf.distributions.Normal(mu, sigma)

    def decoder(self, code):
        """The likelihood p(x|z), a `Bernoulli` over `[n, 28, 28]`, of codes `[n, code_size]`."""
        with tf.variable_scope('decoder', reuse=tf.AUTO_REUSE):
            first, second = self.channels
            hidden = _activation(_dense(code, self.dense_units, 'dense_1'))
            hidden = _activation(_dense(hidden, 7 * 7 * first, 'dense_2'))
            maps = tf.reshape(hidden, [-1, 7, 7, first])
            maps = _activation(_conv_transpose(maps, second, 3, 'conv_transpose_1', [second]))
            # The last convolution's four channels are four neighbours in a row of pixels: it would
            # take twice as long with a stride of 4 over the columns and a single channel.
            maps = _conv_transpose(maps, 4, 4, 'conv_transpose_2', [28, 7, 4], self.logits)
            return tf.distributions.Bernoulli(logits=tf.reshape(maps, [-1, 28, 28]),
                                              dtype=tf.float32)

    def optimization(self, images, learning_rate):
        """Builds everything that trains, evaluates and samples the model.

        Besides what it returns, it names the tensors `mu`, `sigma`, `code`, `reconstruction` (pixel
        probabilities `[n, 28, 28]`), `elbo`, `divergence`, `samples` and `num_samples` (a scalar
        that may be fed, 100 by default).

        Args:
            images: float32 tensor `[n, 28, 28]`, pixels from 0 to 1.
            learning_rate: number or scalar tensor.

        Returns:
            A namedtuple of
            optimize: operation that takes one step of Adam (D. P. Kingma and J. Ba, 2014).
            samples: images `[num_samples, 28, 28]`, pixel probabilities of codes from the prior.
            elbo: scalar, the mean ELBO of the images in nats, from one code for each image.
            reg: `[n]`, the divergence KL(q(z|x) || p(z)) of each image in nats.
            code: `[n, code_size]`, a code from each image's posterior.
        """
        step = tf.train.get_or_create_global_step()
        # Two cores are kept busy best by half of the batch each, with operations of one thread.
        count = tf.shape(images)[0]
        # The images are a part of the seed: the chunks of an evaluation, all of one step, would
        # share their noise else, and the mean over them would be much less certain.
        noise = self._noise(count, tf.reduce_sum(images), step)
        halves = [self._reconstruct(images[half], noise[half])
                  for half in (slice(count // 2), slice(count // 2, None))]
        *parts, cross_entropies = zip(*halves)
        mu, sigma, code = (tf.concat(p, 0, name) for p, name in zip(parts, ['mu', 'sigma', 'code']))
        posterior, prior = tf.distributions.Normal(mu, sigma), tf.distributions.Normal(0., 1.)
        divergence = tf.reduce_sum(
            tf.distributions.kl_divergence(posterior, prior), 1, name='divergence')
        # Summed half by half, so that neither half's decoder waits for the other half.
        loss = tf.add_n([*cross_entropies, tf.reduce_sum(divergence)]) / tf.cast(count, tf.float32)
        elbo = tf.negative(loss, 'elbo')
        tf.identity(self.decoder(code).mean(), 'reconstruction')

        num_samples = tf.placeholder_with_default(100, [], 'num_samples')
        # The same codes at each step: one sees samples of the same codes grow sharper.
        likelihood = self.decoder(self._noise(num_samples, 0, 0))
        samples = tf.identity(likelihood.mean(), 'samples')

        with tf.variable_scope('optimizer'):
            optimize = tf.train.AdamOptimizer(learning_rate, beta2=.99).minimize(
                loss, global_step=step, gate_gradients=tf.train.AdamOptimizer.GATE_GRAPH)
        return Optimization(optimize, samples, elbo, divergence, code)

    def _reconstruct(self, images, noise):
        """The posterior's parameters, a code for each image, and all images' cross-entropy."""
        posterior = self.encoder(images)
        mu, sigma = posterior.mean(), posterior.stddev()
        code = mu + sigma * noise
        return mu, sigma, code, _cross_entropy(images, self.decoder(code).logits)

    def _lstm(self, images):
        """The outputs of all 28 steps, side by side: `[n, 28 * lstm_units]`.

        The rows of all steps are multiplied at once, which takes half of the matrix products out of
        the recurrence.
        """
        units = self.lstm_units
        with tf.variable_scope('lstm'):
            rows = tf.reshape(tf.transpose(images, [1, 0, 2]), [-1, 28])
            # The forget gate's bias has the cell remember from the start (Gers et al., 2000).
            inputs = tf.split(_dense(rows, 4 * units, 'input', [0.] * units + [1.] * units
                                     + [0.] * 2 * units), 28)
            kernel = tf.get_variable('recurrent_kernel', [units, 4 * units],
                                     initializer=tf.orthogonal_initializer())
            outputs, cell, axis = [], None, tf.constant(1)
            # Gradients of sums and products that might broadcast would double the graph, and
            # `tf.split` adds two constants each time.
            with tf.get_default_graph().gradient_override_map({'Mul': 'MulOfEqualShapes'}):
                for gates in inputs:
                    if outputs:
                        gates = tf.add_n([gates, tf.matmul(outputs[-1], kernel)])
                    i, f, o, candidate = tf.raw_ops.Split(axis=axis, value=gates, num_split=4)
                    new = tf.sigmoid(i) * tf.tanh(candidate)
                    cell = tf.add_n([tf.sigmoid(f) * cell, new]) if outputs else new
                    outputs.append(tf.sigmoid(o) * tf.tanh(cell))
            outputs = tf.concat(outputs, 1)
            outputs.set_shape([None, 28 * units])
            return outputs

    def _noise(self, count, *seeds):
        """Standard normal noise `[count, code_size]`, a pure function of the three seeds."""
        first, second = (tf.cast(seed, tf.int64) for seed in seeds)
        return tf.random.stateless_normal([count, self.code_size],
                                          tf.stack([self.seed + (first * 2 ** 32), second]))


@tf.custom_gradient
def _cross_entropy(images, logits):
    """-log p(x|z) of all images together, in nats. Its gradient is TensorFlow's, simplified."""
    losses = tf.nn.sigmoid_cross_entropy_with_logits(labels=images, logits=logits)
    return tf.reduce_sum(losses), lambda g: (-logits * g, (tf.sigmoid(logits) - images) * g)


@tf.RegisterGradient('MulOfEqualShapes')
def _mul_gradient(op, gradient):
    x, y = op.inputs
    return gradient * y, gradient * x


@tf.RegisterGradient('MatMulOfKernel')
def _matmul_gradient(op, gradient):
    """As TensorFlow's, but with the first product transposed, which takes 40% less time."""
    inputs, kernel = op.inputs
    return (tf.transpose(tf.matmul(kernel, gradient, transpose_b=True)),
            tf.matmul(inputs, gradient, transpose_a=True))


def _activation(x):
    return tf.nn.leaky_relu(x, .1)  # Trains to 0.4 nats less than the rectifier does.


def _dense(inputs, units, name, bias=0.):
    with tf.variable_scope(name):
        kernel = tf.get_variable('kernel', [inputs.shape[1], units])  # Glorot uniform.
        bias = tf.get_variable('bias', [units], initializer=tf.constant_initializer(bias))
        with tf.get_default_graph().gradient_override_map({'MatMul': 'MatMulOfKernel'}):
            return tf.nn.bias_add(tf.matmul(inputs, kernel), bias)


def _conv_transpose(maps, channels, size, name, bias_shape, bias=0.):
    """Doubles the height of `maps`, `[n, height, width, channels]`, by a kernel `[size, 2]`."""
    with tf.variable_scope(name):
        kernel = tf.get_variable('kernel', [size, 2, channels, maps.shape[3]])
        bias = tf.get_variable('bias', bias_shape, initializer=tf.constant_initializer(bias))
        shape = [tf.shape(maps)[0], 2 * maps.shape[1].value, maps.shape[2].value, channels]
        return tf.nn.conv2d_transpose(maps, kernel, shape, [1, 2, 1, 1]) + bias
