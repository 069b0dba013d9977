"""Linear classifiers of features: multinomial logistic regression, solved to its optimum.

The features are standardised by the training set. With n of them, weights W and biases b minimise

    1/n sum_i -log softmax(W x_i + b)[y_i]  +  decay / 2 |W|^2,

which is convex, so that nothing depends on a start, an order of examples or a learning rate. The
decay is the one whose classifier, fitted on most of the training set, is best on the rest.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

DECAYS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
HOLD_OUT = 5  # one training example of so many is for the choice of the decay
ROWS = 8192  # examples whose logits are in memory at once
ITERATIONS, TOLERANCE = 200, 1e-5  # of L-BFGS: at most, and the gradient's norm at which it ends


@flax.struct.dataclass
class Linear:
    """Logits of classes: `features @ kernel + bias`; several at once with leading axes."""

    kernel: jax.Array  # (..., D, classes)
    bias: jax.Array  # (..., classes)

    def __call__(self, features: jax.Array) -> jax.Array:
        """`(..., n, D)` -> `(..., n, classes)`."""
        return features @ self.kernel + self.bias[..., None, :]


@flax.struct.dataclass
class Fitted:
    """Classifiers of several sets of features of the same examples, `G` of them."""

    linear: Linear  # of features as they are, not standardised
    decay: jax.Array  # (G,), the ones chosen
    accuracy: jax.Array  # (G,), on the training set


def fit_classifiers(features: np.ndarray, labels: np.ndarray, num_classes: int) -> Fitted:
    """A classifier of each set of features, in one compiled program.

    Args:
        features: `(G, n, D)` float32, of the training set.
        labels: `(n,)` int, from 0 to `num_classes` - 1.
        num_classes: at least 2.
    """
    count = -(-features.shape[1] // ROWS) * ROWS if features.shape[1] > ROWS else features.shape[1]
    padding = count - features.shape[1]
    mask = np.pad(np.ones(len(labels), np.float32), (0, padding))
    features = np.pad(features, ((0, 0), (0, padding), (0, 0)))
    return _fit_all(features, np.pad(labels, (0, padding)), mask, num_classes)


@functools.partial(jax.jit, static_argnames="num_classes")
@jax.default_matmul_precision("float32")  # the search along a line ends in coarser rounding
def _fit_all(features, labels, mask, num_classes):
    # One after the other: side by side, each would have a copy of the features.
    def fit(features):
        features, mean, scale = standardised(features, mask)
        last = jnp.arange(len(labels)) % HOLD_OUT == HOLD_OUT - 1
        decays = jnp.asarray(DECAYS)

        def judged(decay):
            linear = minimise(features, labels, mask * ~last, decay, num_classes)
            return accuracy(linear, features, labels, mask * last)

        # Of equally good ones the largest, which is the last.
        best = len(DECAYS) - 1 - jnp.argmax(jax.lax.map(judged, decays)[::-1])
        linear = minimise(features, labels, mask, decays[best], num_classes)
        right = accuracy(linear, features, labels, mask)
        kernel = linear.kernel / scale[:, None]
        return Fitted(Linear(kernel, linear.bias - mean @ kernel), decays[best], right)

    return jax.lax.map(fit, features)


def standardised(features: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Features `(n, D)` with mean 0 and deviation 1 over the rows of the mask; mean and deviation.

    What is the same in all rows becomes 0.
    """
    total = mask.sum()
    mean = mask @ features / total
    variance = mask @ (features - mean) ** 2 / total
    constant = variance <= 1e-10 * (1e-10 + mean**2)
    scale = jnp.where(constant, 1.0, jnp.sqrt(variance))
    return jnp.where(constant, 0.0, (features - mean) / scale), mean, scale


def accuracy(linear: Linear, features: jax.Array, labels: jax.Array, mask: jax.Array) -> jax.Array:
    """The share of rows of the mask whose most probable class is theirs."""
    right = jnp.argmax(linear(features), axis=-1) == labels
    return jnp.sum(mask * right) / jnp.maximum(mask.sum(), 1.0)


def minimise(
    features: jax.Array, labels: jax.Array, mask: jax.Array, decay: jax.Array, num_classes: int
) -> Linear:
    """The minimum of the module's equation, over the rows of a mask, by L-BFGS.

    Args:
        features: `(n, D)`; above `ROWS` a multiple of it.
        labels: `(n,)`.
        mask: `(n,)`, 1 for rows that count.
        decay: of weights, not of biases.
        num_classes: how many there are.
    """
    rows = min(ROWS, len(features))
    chunks = (
        features.reshape(-1, rows, features.shape[1]),
        labels.reshape(-1, rows),
        mask.reshape(-1, rows) / mask.sum(),
    )

    def loss(linear):
        @jax.checkpoint  # else the backward pass would hold the logits of all chunks
        def add(total, chunk):
            features, labels, weights = chunk
            losses = optax.losses.softmax_cross_entropy_with_integer_labels(
                linear(features), labels
            )
            return total + weights @ losses, None

        total, _ = jax.lax.scan(add, jnp.zeros(()), chunks)
        return total + decay / 2 * jnp.sum(linear.kernel**2)

    optimizer = optax.lbfgs()
    value_and_gradient = optax.value_and_grad_from_state(loss)

    def goes_on(carry):
        _, _, step, norm = carry
        return (step < ITERATIONS) & (norm > TOLERANCE)

    def iterate(carry):
        linear, state, step, _ = carry
        value, gradient = value_and_gradient(linear, state=state)
        updates, state = optimizer.update(
            gradient, state, linear, value=value, grad=gradient, value_fn=loss
        )
        return optax.apply_updates(linear, updates), state, step + 1, optax.tree.norm(gradient)

    start = Linear(jnp.zeros((features.shape[1], num_classes)), jnp.zeros(num_classes))
    carry = start, optimizer.init(start), jnp.zeros((), jnp.int32), jnp.asarray(jnp.inf)
    return jax.lax.while_loop(goes_on, iterate, carry)[0]
