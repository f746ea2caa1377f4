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
        channels: channels of the decoder's feature maps of 7x7 and of 14x14.
        seed: of the initial weights and of all noise, an integer.
    """

    def __init__(self, code_size=16, lstm_units=32, dense_units=512, channels=(32, 16), seed=0):
        self.code_size = code_size
        self.lstm_units = lstm_units
        self.dense_units = dense_units
        self.channels = channels
        self.seed = seed
        tf.set_random_seed(seed)

    def encoder(self, images):
        """The posterior q(z|x), a `Normal` over `[n, code_size]`, of float images `[n, 28, 28]`."""
        with tf.variable_scope('encoder', reuse=tf.AUTO_REUSE):
            outputs = self._lstm(images)
            hidden = tf.nn.relu(_dense(outputs, self.dense_units, 'dense'))
            mu = _dense(hidden, self.code_size, 'mu')
            sigma = tf.nn.softplus(_dense(hidden, self.code_size, 'sigma'))
            return tf.distributions.Normal(mu, sigma)

    def decoder(self, code):
        """The likelihood p(x|z), a `Bernoulli` over `[n, 28, 28]`, of codes `[n, code_size]`."""
        large, small = self.channels
        with tf.variable_scope('decoder', reuse=tf.AUTO_REUSE):
            hidden = tf.nn.relu(_dense(code, self.dense_units, 'dense_1'))
            hidden = tf.nn.relu(_dense(hidden, 7 * 7 * large, 'dense_2'))
            maps = tf.reshape(hidden, [-1, 7, 7, large])
            maps = tf.nn.relu(_conv_transpose(maps, small, 3, 'conv_transpose_1'))
            logits = _conv_transpose(maps, 1, 5, 'conv_transpose_2')
            return tf.distributions.Bernoulli(logits=tf.squeeze(logits, 3), dtype=tf.float32)

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
        prior = tf.distributions.Normal(0., 1.)
        posterior = self.encoder(images)
        mu = tf.identity(posterior.mean(), 'mu')
        sigma = tf.identity(posterior.stddev(), 'sigma')
        # The batch itself is a part of the seed: the chunks of an evaluation, all of one step, would
        # share their noise else, and its mean over them would be ten times as uncertain.
        noise = self._noise(tf.shape(mu)[0], tf.cast(tf.reduce_sum(images), tf.int64), step)
        code = tf.add(mu, sigma * noise, 'code')
        likelihood = self.decoder(code)
        tf.identity(likelihood.mean(), 'reconstruction')

        with tf.variable_scope('loss'):
            log_likelihood = tf.reduce_sum(likelihood.log_prob(images), [1, 2])
            kl = tf.reduce_sum(tf.distributions.kl_divergence(posterior, prior), 1)
        divergence = tf.identity(kl, 'divergence')
        elbo = tf.reduce_mean(log_likelihood - divergence, name='elbo')

        num_samples = tf.placeholder_with_default(100, [], 'num_samples')
        # The same codes at each step: one sees samples of the same codes grow sharper.
        likelihood = self.decoder(self._noise(num_samples, 0, 0))
        samples = tf.identity(likelihood.mean(), 'samples')

        with tf.variable_scope('optimizer'):
            optimize = tf.train.AdamOptimizer(learning_rate).minimize(-elbo, global_step=step)
        return Optimization(optimize, samples, elbo, divergence, code)

    def _lstm(self, images):
        """The outputs of all 28 steps, side by side: `[n, 28 * lstm_units]`.

        The rows of all steps are multiplied at once, which takes half of the matrix products out of
        the recurrence.
        """
        units = self.lstm_units
        with tf.variable_scope('lstm'):
            rows = tf.reshape(tf.transpose(images, [1, 0, 2]), [-1, 28])
            inputs = tf.split(_dense(rows, 4 * units, 'input'), 28)
            kernel = tf.get_variable('recurrent_kernel', [units, 4 * units],
                                     initializer=tf.orthogonal_initializer())
            outputs, cell, output = [], 0., None
            for gates in inputs:
                if output is not None:
                    gates += tf.matmul(output, kernel)
                i, f, o, candidate = tf.split(gates, 4, 1)
                # The 1 has the cell remember from the start (Gers et al., 2000).
                cell = tf.sigmoid(f + 1.) * cell + tf.sigmoid(i) * tf.tanh(candidate)
                output = tf.sigmoid(o) * tf.tanh(cell)
                outputs.append(output)
            outputs = tf.concat(outputs, 1)
            outputs.set_shape([None, 28 * units])
            return outputs

    def _noise(self, count, *seeds):
        """Standard normal noise `[count, code_size]`, a pure function of the three seeds."""
        first, second = (tf.cast(seed, tf.int64) for seed in seeds)
        return tf.random.stateless_normal([count, self.code_size],
                                          tf.stack([self.seed + (first * 2 ** 32), second]))


def _dense(inputs, units, name):
    with tf.variable_scope(name):
        kernel = tf.get_variable('kernel', [inputs.shape[1], units])  # Glorot uniform.
        bias = tf.get_variable('bias', [units], initializer=tf.zeros_initializer())
        return tf.nn.bias_add(tf.matmul(inputs, kernel), bias)


def _conv_transpose(maps, channels, size, name):
    """Doubles the height and width of `maps`, `[n, height, width, channels]`."""
    with tf.variable_scope(name):
        kernel = tf.get_variable('kernel', [size, size, channels, maps.shape[3]])
        bias = tf.get_variable('bias', [channels], initializer=tf.zeros_initializer())
        shape = [tf.shape(maps)[0], 2 * maps.shape[1].value, 2 * maps.shape[2].value, channels]
        return tf.nn.bias_add(tf.nn.conv2d_transpose(maps, kernel, shape, [1, 2, 2, 1]), bias)
