"""The networks of images: twins, masks, padding and ghost batches over spatial axes, and He et al.'s sizes."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tests.helpers import quick
from vmapbn_flax import BatchedBatchNorm, BatchedConvNet, BatchedResNet, BatchNorm, ConvNet, ResNet, VmapBatch
from vmapbn_flax.nn import images

CONV = {"num_classes": 3, "features": (4, 6)}
SMALL = {"num_classes": 3, "blocks": (1, 1), "width": 4}
LARGE = {**SMALL, "bottleneck": True, "imagenet": True}
TWINS = {
    "conv": (ConvNet(**CONV), BatchedConvNet(**CONV)),
    "resnet": (ResNet(**SMALL), BatchedResNet(**SMALL)),
    "imagenet": (ResNet(**LARGE), BatchedResNet(**LARGE)),
}
SHAPE = (9, 10, 2)  # odd and even


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def init(network, x):
    """Variables whose every leaf matters: no zero biases, no unit scales."""
    shapes = jax.eval_shape(partial(network.init, train=False), jax.random.key(0), x)
    rng = np.random.default_rng(1)

    def fill(path, leaf):
        draw = rng.normal(size=leaf.shape) if path[-1].key == "kernel" else 0.5 + rng.uniform(size=leaf.shape)
        return (draw / max(1, np.sqrt(leaf.size / leaf.shape[-1]))).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def of_examples(mask, like):
    """Weights of the examples, out of a mask of examples or of positions."""
    weights = jnp.ones(like) if mask is None else mask.reshape(*like, -1).max(-1)
    return weights != 0


@partial(quick.jit, static_argnums=0)
def step(network, variables, x, mask=None):
    """Logits in evaluation and in training, new statistics and the gradients of a masked loss."""

    def loss(params):
        logits, updates = network.apply(
            {**variables, "params": params}, x, train=True, mask=mask, mutable=["batch_stats"]
        )
        losses = -nn.log_softmax(logits)[..., 1]
        return jnp.sum(jnp.where(of_examples(mask, losses.shape), losses, 0)), (logits, updates)

    gradients, (logits, updates) = jax.grad(loss, has_aux=True)(variables["params"])
    return network.apply(variables, x, train=False, mask=mask), logits, updates, gradients


def assert_close(a, b, tolerance=1e-5):
    """Each leaf, in units of its largest entry where that is above one."""

    def check(a, b):
        a, b = np.asarray(a), np.asarray(b)
        assert np.max(np.abs(a - b)) < tolerance * max(1, np.max(np.abs(b)))

    jax.tree.map(check, a, b)


# One network in two forms.


@pytest.mark.parametrize(
    ("name", "masked"),
    [
        pytest.param("conv", False, marks=pytest.mark.slow),
        ("conv", True),
        pytest.param("resnet", False, marks=pytest.mark.slow),
        pytest.param("resnet", True, marks=pytest.mark.slow),
        pytest.param("imagenet", True, marks=pytest.mark.slow),
    ],
)
def test_twins(name, masked):
    one, batched = TWINS[name]
    x = 1 + normal(5, *SHAPE)
    mask = np.abs(normal(5, *SHAPE[:2], seed=2)) * (normal(5, *SHAPE[:2], seed=3) > -1.5) if masked else None
    variables = init(one, x[0])
    trees = [jax.eval_shape(partial(n.init, train=True), jax.random.key(0), x) for n in (VmapBatch(one), batched)]
    assert trees[0] == trees[1] == jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), variables)
    assert_close(step(VmapBatch(one), variables, x, mask), step(batched, variables, x, mask))


def test_conv_net_against_flax():
    class Flax(nn.Module):
        @nn.compact
        def __call__(self, x, *, train, mask=None):
            for i, width in enumerate(CONV["features"]):
                x = nn.Conv(width, (3, 3), use_bias=False, name=f"conv_{i}")(x)
                x = nn.BatchNorm(use_running_average=not train, use_fast_variance=False, name=f"norm_{i}")(x)
                x = nn.max_pool(nn.relu(x), (2, 2), (2, 2))
            return nn.Dense(3, name="logits")(x.reshape(len(x), -1))

    x = 1 + normal(5, *SHAPE)
    variables = init(TWINS["conv"][0], x[0])
    assert_close(step(VmapBatch(TWINS["conv"][0]), variables, x), step(Flax(), variables, x))


# Masks, padding and ghost batches.


@pytest.mark.parametrize("name", ["conv", pytest.param("resnet", marks=pytest.mark.slow)])
def test_masked_examples_disturb_nothing(name):
    one, batched = TWINS[name]
    x, mask = normal(6, *SHAPE), np.array([1, 0, 1, 1, 0, 1], bool)
    variables = init(one, x[0])
    want = step(VmapBatch(one), variables, x[mask])
    poisoned = np.where(mask[:, None, None, None], x, np.float32(np.nan))
    for network in (VmapBatch(one), batched):
        evaluated, logits, *rest = jax.device_get(step(network, variables, poisoned, mask))
        assert np.all(np.isfinite([evaluated, logits]))
        assert_close((evaluated[mask], logits[mask], *rest), want)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in ("resnet", "imagenet")])
def test_padded_images_are_the_images(name):
    """The larger size is even where the smaller one is odd: a stride has to start at the same position in both."""
    one = TWINS[name][0]
    network = VmapBatch(one)
    x = normal(5, 9, 11, 2)
    padded = np.full((5, 14, 12, 2), np.nan, np.float32)
    mask = np.zeros(padded.shape[:3], bool)
    padded[:, :9, :11], mask[:, :9, :11] = x, True
    variables = init(one, x[0])
    assert_close(step(network, variables, padded, mask), step(network, variables, x))


def test_padded_images_of_a_conv_net():
    """The dense layer sees zeros at the positions that the smaller images lack."""
    network, x = VmapBatch(TWINS["conv"][0]), normal(5, 9, 7, 2)
    padded = np.full((5, 12, 16, 2), np.nan, np.float32)
    mask = np.zeros(padded.shape[:3], bool)
    padded[:, :9, :7], mask[:, :9, :7] = x, True
    variables = init(TWINS["conv"][0], padded[0])
    logits = variables["params"]["logits"]
    kernel = logits["kernel"].reshape(3, 4, 6, 3)[:2, :1].reshape(12, 3)
    smaller = {**variables, "params": {**variables["params"], "logits": {**logits, "kernel": kernel}}}
    got, want = step(network, variables, padded, mask), step(network, smaller, x)
    got[-1].pop("logits"), want[-1].pop("logits")
    assert_close(got, want)


@pytest.mark.parametrize("name", ["conv", pytest.param("resnet", marks=pytest.mark.slow)])
def test_ghost_batches(name):
    """Each group as if alone, padding included; the average of the statistics, the sum of the gradients."""
    one = TWINS[name][0]
    x, mask = normal(3, 4, *SHAPE), np.array([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]], bool)
    ghost = VmapBatch(one.clone(norm=partial(BatchNorm, replica_axis_name="group")), axis_name=("group", "batch"))
    variables = init(one, x[0, 0])
    evaluated, logits, updates, gradients = step(ghost, variables, x, mask)
    alone = [jax.device_get(step(VmapBatch(one), variables, x[i], mask[i])) for i in range(3)]
    each = jax.tree.map(lambda *leaves: np.stack(leaves), *alone)
    assert_close((evaluated, logits), each[:2])
    assert_close(updates, jax.tree.map(partial(np.mean, axis=0), each[2]))
    assert_close(gradients, jax.tree.map(partial(np.sum, axis=0), each[3]))


def test_pooling_is_that_of_flax():
    """And its derivatives; that gradient flax takes by select-and-scatter, several times as slow on a CPU."""
    x, cotangent = normal(2, 7, 6, 3), normal(2, 3, 3, 3, seed=1)
    x[0, :2, :2] = -1  # a window without a gradient
    x = jnp.asarray(x)

    def pooled(pool):
        return quick.jit(jax.value_and_grad(lambda x: jnp.sum(cotangent * pool(x) ** 3)))(x)

    def flax_s(x):
        return nn.relu(nn.max_pool(x, (2, 2), (2, 2)))

    jax.tree.map(np.testing.assert_array_equal, pooled(images.max_pool_relu), pooled(flax_s))
    pool = quick.jit(images.max_pool_relu)
    np.testing.assert_array_equal(pool(x[0]), pool(x)[0])
    hessian = quick.jit(jax.hessian(lambda x: jnp.sum(images.max_pool_relu(x.reshape(2, 2, 1)) ** 3)))
    np.testing.assert_array_equal(hessian(jnp.array([1.0, 3, 2, 3])), np.diag([0, 18, 0, 0]))  # of equals, the first
    missing = jnp.full((2, 2, 1), jnp.nan).at[0].set(1)
    assert jnp.isnan(pool(missing)).all()


@pytest.mark.parametrize(
    ("size", "channels"),
    [(3, 1), pytest.param(3, 3, marks=pytest.mark.slow), pytest.param(5, 1, marks=pytest.mark.slow)],
)
def test_products_with_small_patches_are_the_convolution(size, channels):
    """With derivatives in every variable, in both modes, under vmap, and in bfloat16."""
    x, kernel = map(jnp.asarray, (normal(2, 7, 6, channels), normal(size, size, channels, 4, seed=1) / size))
    pad = size // 2
    options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "precision": None}

    def by(convolve):
        def result(x, kernel):
            return jnp.tanh(convolve(x, kernel, (1, 1), ((pad, pad), (pad, pad)), **options))

        one = jax.vmap(lambda x: result(x[None], kernel)[0])(x)
        gradients = jax.grad(lambda *both: jnp.sum(result(*both) ** 2), (0, 1))(x, kernel)
        narrow = result(x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16))
        return (one, result(x, kernel), gradients, jax.jvp(result, (x, kernel), (x, kernel))), narrow

    (got, narrow), (want, wanted) = (
        quick.jit(partial(by, convolve))() for convolve in (images._convolution, lax.conv_general_dilated)
    )
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-5), got, want)
    assert narrow.dtype == wanted.dtype
    np.testing.assert_allclose(narrow.astype(np.float32), wanted.astype(np.float32), atol=1e-2)


# What He et al. have.


def count(network, shape):
    tree = jax.eval_shape(partial(network.init, train=False), jax.random.key(0), jnp.ones(shape))
    sizes = jax.tree_util.tree_map_with_path(lambda path, leaf: (path[-1].key, leaf.size), tree["params"])
    leaves = jax.tree.leaves(sizes, is_leaf=lambda node: isinstance(node, tuple))
    return sum(size for _, size in leaves), sum(kind == "kernel" for kind, _ in leaves)


@pytest.mark.parametrize(("n", "millions"), [(3, 0.27), (5, 0.46), (7, 0.66), (9, 0.85), (18, 1.7)])
def test_sizes_of_table_6(unchecked, n, millions):
    parameters, layers = count(ResNet(num_classes=10, blocks=(n, n, n)), (32, 32, 3))
    assert layers == 6 * n + 2
    assert round(parameters / 1e6, 2 if millions < 1 else 1) == millions


@pytest.mark.parametrize(
    ("blocks", "bottleneck", "depth", "parameters"),
    [
        ((2, 2, 2, 2), False, 18, 11_689_512),
        ((3, 4, 6, 3), False, 34, 21_797_672),
        ((3, 4, 6, 3), True, 50, 25_557_032),
    ],
)
def test_sizes_on_imagenet(unchecked, blocks, bottleneck, depth, parameters):
    """The published numbers of parameters of ResNet-18, 34 and 50."""
    network = ResNet(num_classes=1000, blocks=blocks, width=64, bottleneck=bottleneck, imagenet=True)
    got, layers = count(network, (224, 224, 3))
    assert got == parameters
    assert layers == depth + (4 if bottleneck else 3)  # the shortcuts' projections, which a depth leaves out


# Initialisation.


@pytest.mark.parametrize("network", [ConvNet(**CONV), ResNet(**LARGE)], ids=["conv", "resnet"])
def test_biases_where_no_norm_follows(network):
    def convolutions(network):
        tree = jax.eval_shape(partial(network.init, train=False), jax.random.key(0), jnp.ones(SHAPE))
        assert ("batch_stats" in tree) == (network.norm is not None)
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree["params"])]
        return {path[-1].key for path in paths if any(entry.key.startswith("conv") for entry in path)}

    assert convolutions(network) == {"kernel"}
    assert convolutions(network.clone(norm=None)) == {"kernel", "bias"}


def test_signals_keep_their_size_without_norm():
    """He et al. 2015 (Delving Deep into Rectifiers): a kernel has the variance 2 / inputs."""
    network = ConvNet(num_classes=3, features=(64,), norm=None)
    variables = quick.jit(partial(network.init, train=False))(jax.random.key(0), jnp.ones((8, 8, 16)))
    assert np.std(variables["params"]["conv_0"]["kernel"]) == pytest.approx(np.sqrt(2 / (9 * 16)), rel=0.03)


@pytest.mark.slow
def test_zero_scale_starts_as_the_identity():
    x = normal(4, *SHAPE)
    network, stem = (ResNet(num_classes=3, blocks=blocks, width=4, zero_scale=True) for blocks in ((2,), ()))
    variables = quick.jit(partial(network.init, train=False))(jax.random.key(0), x[0])
    scales = {name: variables["params"]["stage_0_block_1"][name]["scale"] for name in ("norm_0", "norm_1")}
    assert jnp.all(scales["norm_0"] == 1)
    assert jnp.all(scales["norm_1"] == 0)
    without = {kind: {name: tree[name] for name in tree if "stage" not in name} for kind, tree in variables.items()}
    assert_close(step(VmapBatch(network), variables, x)[:2], step(VmapBatch(stem), without, x)[:2])


@pytest.mark.slow
def test_bfloat16():
    """Computed in bfloat16; parameters, statistics and logits stay in float32."""
    x = normal(32, *SHAPE)
    one = TWINS["resnet"][0]
    variables = init(one, x[0])
    narrow = one.clone(dtype=jnp.bfloat16, norm=partial(BatchNorm, dtype=jnp.bfloat16))
    got, want = step(VmapBatch(narrow), variables, x), step(VmapBatch(one), variables, x)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(got))
    assert_close(got[:3], want[:3], 0.03)


# Errors.


@pytest.mark.parametrize("name", TWINS)
def test_one_image_network_given_a_batch(unchecked, name):
    one, batched = TWINS[name]
    x = jnp.ones((5, *SHAPE))
    name = type(one).__name__
    with pytest.raises(ValueError, match=rf"{name}: got x of shape \(5, 9, 10, 2\).*VmapBatch\({name}\(\.\.\.\)\)"):
        jax.eval_shape(partial(one.init, train=False), jax.random.key(0), x)
    with pytest.raises(ValueError, match=rf"{name}: got x of shape \(9, 10\).*grey with one channel"):
        jax.eval_shape(partial(one.init, train=False), jax.random.key(0), x[0, ..., 0])
    with pytest.raises(ValueError, match=rf"Batched{name}: got x of shape \(9, 10, 2\); expected a batch.* use {name}"):
        jax.eval_shape(partial(batched.init, train=False), jax.random.key(0), x[0])


def test_images_too_small_for_the_blocks():
    with pytest.raises(ValueError, match=r"ConvNet: got images of 7x9, which 3 blocks.*at least 8 pixels"):
        ConvNet(num_classes=3).init(jax.random.key(0), jnp.ones((7, 9, 1)), train=False)


def test_zero_scale_needs_a_norm():
    with pytest.raises(ValueError, match=r"ResNet: got zero_scale=True and norm=None"):
        ResNet(num_classes=3, norm=None, zero_scale=True).init(jax.random.key(0), jnp.ones(SHAPE), train=False)


def test_batched_norm_in_a_one_image_network():
    """It would take the height of one image for the batch: instance norm in disguise."""
    network = VmapBatch(ConvNet(**CONV, norm=BatchedBatchNorm))
    with pytest.raises(ValueError, match=r"BatchedBatchNorm norm_0.*BatchedBatchNorm\(axis_name='batch'\)"):
        jax.eval_shape(partial(network.init, train=True), jax.random.key(0), jnp.ones((5, *SHAPE)))
