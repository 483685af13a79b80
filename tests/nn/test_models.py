from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import oracle
from tests.helpers.oracle import error
from tests.helpers.quick import jit
from vmapbn_flax import MLP, BatchedBatchNorm, BatchedMLP, BatchNorm, VmapBatch

SIZES = {"hidden": (6, 5), "num_classes": 3}
NETWORKS = {
    "vmapped": VmapBatch(MLP(**SIZES)),
    "batched": BatchedMLP(**SIZES),
    "plain": VmapBatch(MLP(**SIZES, norm=None)),
}
every = pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def init(network, x):
    """Variables whose every leaf matters: no zero biases, no unit scales."""
    shapes = jax.eval_shape(partial(network.init, train=False), jax.random.key(0), x)
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(1)
    return jax.tree.unflatten(tree, [np.asarray(0.5 + rng.uniform(size=leaf.shape), leaf.dtype) for leaf in leaves])


def compiled(function):
    """`function` of a network; its results are numpy's, so that nothing is compiled for what a test does with them."""
    program = jit(function, static_argnums=0)
    return lambda *args, **kwargs: jax.device_get(program(*args, **kwargs))


@compiled
def step(network, variables, x, labels, mask=None):
    """Logits, new statistics and the gradients of a masked cross-entropy."""

    def loss(params):
        logits, updates = network.apply(
            {**variables, "params": params}, x, train=True, mask=mask, mutable=["batch_stats"]
        )
        losses = -jnp.take_along_axis(nn.log_softmax(logits), labels[:, None], 1)[:, 0]
        kept = losses if mask is None else jnp.where(mask > 0, losses, 0)
        return jnp.sum(kept), (logits, updates)

    gradients, (logits, updates) = jax.grad(loss, has_aux=True)(variables["params"])
    return logits, updates, gradients


@compiled
def train(network, variables, x, mask=None):
    return network.apply(variables, x, train=True, mask=mask, mutable=["batch_stats"])


@compiled
def evaluate(network, variables, x):
    return network.apply(variables, x, train=False)


def assert_close(a, b, tolerance=1e-6):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance), a, b)


def shapes(variables):
    return jax.tree.map(jnp.shape, variables)


# The networks.


@pytest.mark.parametrize("training", [False, True])
def test_against_numpy(training):
    x = normal(8, 4)
    network = NETWORKS["vmapped"]
    variables = init(network, x)
    if training:
        logits, updates = train(network, variables, x)
    else:
        logits, updates = evaluate(network, variables, x), variables
    params, stats = jax.tree.map(partial(np.asarray, dtype=np.float64), (variables["params"], variables["batch_stats"]))
    h = np.asarray(x, np.float64)
    for i in range(2):
        dense, norm, running = params[f"dense_{i}"], params[f"norm_{i}"], stats[f"norm_{i}"]
        h = h @ dense["kernel"]
        batch = oracle.batch_norm(h, **norm)
        moved = updates["batch_stats"][f"norm_{i}"]
        for name in ("mean", "var"):
            want = 0.99 * running[name] + 0.01 * getattr(batch, name) if training else running[name]
            np.testing.assert_allclose(moved[name], want, rtol=1e-6)
        evaluated = (h - running["mean"]) / np.sqrt(running["var"] + 1e-5) * norm["scale"] + norm["bias"]
        h = 1 / (1 + np.exp(-(batch.y if training else evaluated)))
    assert error(logits, h @ params["logits"]["kernel"] + params["logits"]["bias"]) < 2e-6


def test_one_tree():
    x = jnp.ones((2, 4))

    class Flax(nn.Module):
        @nn.compact
        def __call__(self, x):
            for i, width in enumerate(SIZES["hidden"]):
                x = nn.Dense(width, use_bias=False, name=f"dense_{i}")(x)
                x = nn.sigmoid(nn.BatchNorm(use_running_average=True, name=f"norm_{i}")(x))
            return nn.Dense(SIZES["num_classes"], name="logits")(x)

    theirs = jit(Flax().init)(jax.random.key(7), x)
    # The same leaves from the same key, so the networks also start alike.
    for network, example in [(NETWORKS["vmapped"], x), (NETWORKS["batched"], x), (MLP(**SIZES), x[0])]:
        ours = jit(partial(network.init, train=True))(jax.random.key(7), example)
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    plain = init(NETWORKS["plain"], x)
    assert set(plain) == {"params"}
    assert sorted(plain["params"]) == ["dense_0", "dense_1", "logits"]
    assert all(sorted(layer) == ["bias", "kernel"] for layer in plain["params"].values())


@pytest.mark.parametrize("mask", [None, [1, 1, 0, 1, 0, 1, 1, 1]], ids=["whole", "masked"])
def test_variants_agree(mask):
    x, labels = 3 + normal(8, 4), np.arange(8) % 3
    mask = None if mask is None else np.array(mask, bool)
    variables = init(NETWORKS["vmapped"], x)
    assert_close(*(step(NETWORKS[name], variables, x, labels, mask) for name in ("vmapped", "batched")))


def test_variants_agree_over_steps_and_load_into_each_other():
    x, labels = normal(20, 8, 4), np.arange(8) % 3
    start = init(NETWORKS["vmapped"], x[0])
    ends = {}
    for name in ("vmapped", "batched"):
        variables = start
        for batch in x:
            _, updates, gradients = step(NETWORKS[name], variables, batch, labels)
            params = jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], gradients)
            variables = {"params": params, **updates}
        ends[name] = variables
    assert_close(ends["vmapped"], ends["batched"], 1e-4)
    for variables in ends.values():
        batched, vmapped = (evaluate(NETWORKS[name], variables, x[0]) for name in ("batched", "vmapped"))
        single = np.stack([evaluate(MLP(**SIZES), variables, example) for example in x[0]])
        assert_close(batched, vmapped)
        assert_close(batched, single)


@every
def test_masked_examples_disturb_no_gradient(network):
    x, labels = normal(8, 4), np.arange(8) % 3
    variables, mask = init(network, x), np.array([1, 0, 1, 1, 0, 1, 1, 0], bool)
    poisoned = np.where(mask[:, None], x, np.array([np.nan, np.inf, -np.inf, 3e38]))
    logits, updates, gradients = step(network, variables, poisoned, labels, mask)
    kept = step(network, variables, x[mask], labels[mask])
    assert np.all(np.isfinite(logits))
    assert_close((logits[mask], updates, gradients), kept, 2e-6)


@every
def test_nothing_but_padding(network):
    x = np.full((8, 4), np.nan)
    variables = init(network, x)
    logits, updates, gradients = step(network, variables, x, np.arange(8) % 3, np.zeros(8, bool))
    assert np.all(np.isfinite(logits))
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(gradients))
    if updates:
        jax.tree.map(np.testing.assert_array_equal, updates["batch_stats"], variables["batch_stats"])


def test_norm_is_a_factory():
    x = normal(8, 4)
    norm = partial(BatchNorm, momentum=0.0, epsilon=0.5)
    network = VmapBatch(MLP(**SIZES, norm=norm))
    variables = init(network, x)
    _, updates = train(network, variables, x)
    hidden = x @ variables["params"]["dense_0"]["kernel"]
    assert error(updates["batch_stats"]["norm_0"]["mean"], np.mean(hidden, 0)) < 1e-6


# VmapBatch.


def test_tuple_of_names_is_one_flat_batch():
    x, flat = normal(8, 4), NETWORKS["vmapped"]
    norm = partial(BatchNorm, axis_name=("group", "batch"))
    nested = VmapBatch(MLP(**SIZES, norm=norm), axis_name=("group", "batch"))
    variables = init(flat, x)
    assert shapes(init(nested, x.reshape(2, 4, 4))) == shapes(variables)
    logits, updates = train(nested, variables, x.reshape(2, 4, 4))
    want, want_updates = train(flat, variables, x)
    assert_close((logits.reshape(8, 3), updates), (want, want_updates))


def test_ghost_batches():
    """Each group as if alone, and the average of the statistics that each alone would leave."""
    x = normal(3, 8, 4) * np.float32([1.0, 2.0, 4.0])[:, None, None]
    norm = partial(BatchNorm, replica_axis_name="group")
    ghost = VmapBatch(MLP(**SIZES, norm=norm), axis_name=("group", "batch"))
    variables = init(NETWORKS["vmapped"], x[0])
    logits, updates = train(ghost, variables, x)
    alone = [train(NETWORKS["vmapped"], variables, group) for group in x]
    assert_close(logits, np.stack([logits for logits, _ in alone]))
    assert_close(updates, jax.tree.map(lambda *leaves: sum(leaves) / 3, *(u for _, u in alone)))
    # Evaluation takes any batch.
    regrouped = evaluate(ghost, variables, x.reshape(1, 24, 4))
    assert_close(evaluate(ghost, variables, x).reshape(1, 24, 3), regrouped)


class Convolution(nn.Module):
    """One image (height, width, channels), as a user would write it."""

    @nn.compact
    def __call__(self, x, *, train, mask=None):
        x = nn.Conv(3, (1, 1), name="conv")(x)
        return BatchNorm(name="norm", momentum=0.0)(x, train=train, mask=mask)


@pytest.mark.parametrize("axes", [1, 3])
def test_mask_of_batch_and_spatial_axes(axes):
    x = normal(6, 4, 5, 2)
    mask = np.random.default_rng(3).integers(0, 2, x.shape[:axes])
    network = VmapBatch(Convolution())
    variables = init(network, x)
    hidden = np.asarray(x) @ variables["params"]["conv"]["kernel"][0, 0] + variables["params"]["conv"]["bias"]
    present = np.broadcast_to(mask.reshape(mask.shape + (1,) * (4 - axes)) > 0, hidden.shape)
    poisoned = np.where(present[..., :2], x, np.float32(np.nan))
    y, updates = train(network, variables, poisoned, jnp.asarray(mask))
    want = oracle.batch_norm(hidden, **variables["params"]["norm"], weights=mask)
    assert error(y, want.y, where=present) < 2e-6
    for name in ("mean", "var"):
        assert error(updates["batch_stats"]["norm"][name], getattr(want, name)) < 1e-6


class Noisy(nn.Module):
    @nn.compact
    def __call__(self, x, *, train, mask=None):
        self.sow("intermediates", "input", x)
        return nn.Dropout(0.5)(x, deterministic=not train)


@pytest.mark.parametrize("names", ["batch", ("group", "batch")])
def test_random_streams_and_other_collections(names):
    batch = (8,) if names == "batch" else (2, 4)
    x = 1 + np.arange(8 * 32, dtype=np.float32).reshape(*batch, 32)
    network = VmapBatch(Noisy(), axis_name=names)
    dropped = jit(partial(network.apply, train=True, mutable=["intermediates"]))
    y, updates = jax.device_get(dropped({}, x, rngs={"dropout": jax.random.key(0)}))
    np.testing.assert_array_equal(updates["intermediates"]["input"][0], x)
    assert set(np.unique(y / x).tolist()) == {0.0, 2.0}
    assert len(np.unique((y / x).reshape(8, 32), axis=0)) == 8  # no two examples drop alike
    np.testing.assert_array_equal(evaluate(network, {}, x), x)


class Frozen(nn.Module):
    @nn.compact
    def __call__(self, x, *, train, mask=None):
        x = BatchNorm(name="frozen")(x, train=False)
        return BatchNorm(name="moving", momentum=0.0)(x, train=train, mask=mask)


def test_frozen_norm_in_a_training_network():
    x = normal(8, 3)
    network = VmapBatch(Frozen())
    variables = init(network, x)
    y, updates = train(network, variables, x)
    stats, params = variables["batch_stats"]["frozen"], variables["params"]
    jax.tree.map(np.testing.assert_array_equal, updates["batch_stats"]["frozen"], stats)
    hidden = (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * params["frozen"]["scale"] + params["frozen"]["bias"]
    assert error(y, oracle.batch_norm(hidden, **params["moving"]).y) < 2e-6


def test_inside_a_larger_network():
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x, *, train, mask=None):
            return 2 * VmapBatch(MLP(**SIZES, name="body"))(x, train=train, mask=mask)

    x = normal(8, 4)
    variables = init(NETWORKS["vmapped"], x)
    logits, updates = train(Outer(), {kind: {"body": tree} for kind, tree in variables.items()}, x)
    want, want_updates = train(NETWORKS["vmapped"], variables, x)
    assert_close(logits / 2, want)
    assert_close(updates["batch_stats"]["body"], want_updates["batch_stats"])


@pytest.mark.parametrize(
    ("lift", "module", "expected"), [(None, None, "MLP_0"), ("foo", None, "foo"), (None, "body", "body")]
)
def test_names_inside_a_larger_network(lift, module, expected):
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return VmapBatch(MLP(**SIZES, name=module), name=lift)(x, train=False)

    variables = jax.eval_shape(Outer().init, jax.random.key(0), jnp.ones((8, 4)))
    assert {kind: list(tree) for kind, tree in variables.items()} == {"params": [expected], "batch_stats": [expected]}
    inner = jax.eval_shape(partial(NETWORKS["vmapped"].init, train=False), jax.random.key(0), jnp.ones((8, 4)))
    assert {kind: tree[expected] for kind, tree in variables.items()} == inner


def test_one_module_under_two_lifts_is_shared():
    class Outer(nn.Module):
        def setup(self):
            self.body = MLP(**SIZES)
            self.pairs, self.batch = VmapBatch(self.body, axis_name=("group", "batch")), VmapBatch(self.body)

        def __call__(self, x):
            return self.batch(x, train=False) + self.pairs(x[None], train=False)[0]

    variables = jax.eval_shape(Outer().init, jax.random.key(0), jnp.ones((8, 4)))
    assert list(variables["params"]) == ["body"]


def test_members_are_one_more_vmap():
    """A sweep: networks and momenta differ by member, and each member is what it would be alone."""
    x, members = normal(8, 4), 3
    variables = init(NETWORKS["vmapped"], x)
    stack = jax.tree.map(lambda leaf: np.stack([leaf * (1 + i) for i in range(members)]), variables)
    momenta = np.float32([0.0, 0.5, 0.9])

    def run(variables, momentum):
        network = VmapBatch(MLP(**SIZES, norm=partial(BatchNorm, momentum=momentum)))
        return network.apply(variables, jnp.asarray(x), train=True, mutable=["batch_stats"])

    together, run = jit(jax.vmap(run))(stack, momenta), jit(run)
    alone = [run(jax.tree.map(lambda leaf, i=i: leaf[i], stack), momenta[i]) for i in range(members)]
    assert_close(together, jax.tree.map(lambda *leaves: np.stack(leaves), *alone), 1e-5)


# Errors.


@pytest.mark.parametrize("training", [False, True])
def test_one_example_network_given_a_batch(unchecked, training):
    variables = init(NETWORKS["vmapped"], jnp.ones((8, 4)))
    with pytest.raises(ValueError, match=r"MLP: got x of shape \(8, 4\).*VmapBatch\(MLP\(\.\.\.\)\)"):
        MLP(**SIZES).apply(variables, jnp.ones((8, 4)), train=training, mutable=["batch_stats"])
    with pytest.raises(ValueError, match=r"MLP: got x of shape \(2, 4\)"):
        NETWORKS["vmapped"].apply(variables, jnp.ones((8, 2, 4)), train=training, mutable=["batch_stats"])


@pytest.mark.parametrize("training", [False, True])
def test_batched_network_given_one_example(unchecked, training):
    variables = init(NETWORKS["vmapped"], jnp.ones((8, 4)))
    with pytest.raises(ValueError, match=r"BatchedMLP: got x of shape \(4,\); expected a batch"):
        BatchedMLP(**SIZES).apply(variables, jnp.ones(4), train=training, mutable=["batch_stats"])


@every
def test_train_has_no_default(network):
    with pytest.raises(TypeError, match="train"):
        network.init(jax.random.key(0), jnp.ones((8, 4)))


def test_one_example_network_in_training_without_its_axis():
    variables = init(NETWORKS["vmapped"], jnp.ones((8, 4)))
    with pytest.raises(NameError, match=r"norm_0.*'batch'.*VmapBatch\(module, axis_name='batch'\)"):
        MLP(**SIZES).apply(variables, jnp.ones(4), train=True, mutable=["batch_stats"])


def test_one_example_batch_names_the_layer():
    with pytest.raises(ValueError, match=r"norm_0: got a training batch of one value"):
        step(NETWORKS["vmapped"], init(NETWORKS["vmapped"], jnp.ones((8, 4))), jnp.ones((1, 4)), jnp.zeros(1, int))


def test_mapped_axis_in_neither():
    network = VmapBatch(MLP(**SIZES), axis_name=("group", "batch"))
    variables = init(NETWORKS["vmapped"], jnp.ones((8, 4)))
    with pytest.raises(ValueError, match=r"norm_0.*'group'") as caught:
        train(network, variables, jnp.ones((2, 4, 4)))
    message = str(caught.value)
    assert "BatchNorm(axis_name=('batch', 'group'))" in message
    assert "BatchNorm(axis_name='batch', replica_axis_name='group')" in message
    # Both suggestions, written as the message has them, work.
    for norm in (
        partial(BatchNorm, axis_name=("batch", "group")),
        partial(BatchNorm, axis_name="batch", replica_axis_name="group"),
    ):
        mended = VmapBatch(MLP(**SIZES, norm=norm), axis_name=("group", "batch"))
        assert train(mended, variables, jnp.ones((2, 4, 4)))[0].shape == (2, 4, 3)
    assert evaluate(network, variables, jnp.ones((2, 4, 4))).shape == (2, 4, 3)


def test_named_axis_that_is_not_mapped():
    norm = partial(BatchNorm, replica_axis_name="group")
    variables = init(NETWORKS["vmapped"], jnp.ones((8, 4)))
    with pytest.raises(NameError, match=r"norm_0.*'group'") as caught:
        train(VmapBatch(MLP(**SIZES, norm=norm)), variables, jnp.ones((8, 4)))
    assert "VmapBatch(module, axis_name=('group', 'batch'))" in str(caught.value)


def test_batched_norm_under_a_named_batch():
    """The textbook layer on the positions of one example would be instance norm in disguise."""
    network = VmapBatch(MLP(**SIZES, norm=BatchedBatchNorm))
    with pytest.raises(ValueError, match=r"BatchedBatchNorm norm_0.*BatchedBatchNorm\(axis_name='batch'\)"):
        jax.eval_shape(partial(network.init, train=True), jax.random.key(0), jnp.ones((8, 4)))


@pytest.mark.parametrize(
    ("names", "shape"), [("batch", (8, 2)), ("batch", (7,)), ("batch", ()), (("group", "batch"), (2,))]
)
def test_mask_shapes(names, shape):
    x = jnp.ones((8, 4) if names == "batch" else (2, 4, 4))
    norm = partial(BatchNorm, axis_name=names)
    network = VmapBatch(MLP(**SIZES, norm=norm), axis_name=names)
    expected = "8,|8, 4" if names == "batch" else "2, 4"
    with pytest.raises(ValueError, match=rf"got a mask of shape \({', '.join(map(str, shape))},?\).*\(({expected})\)"):
        network.apply(
            init(NETWORKS["vmapped"], jnp.ones((8, 4))), x, train=True, mask=jnp.ones(shape), mutable=["batch_stats"]
        )


@pytest.mark.parametrize("network", [NETWORKS["vmapped"], NETWORKS["plain"]], ids=["vmapped", "plain"])
def test_train_and_weights_are_checked_by_the_lift(unchecked, network):
    """Where they are known: the layers see tracers of the masks."""
    variables, x = init(network, jnp.ones((8, 4))), jnp.ones((8, 4))
    with pytest.raises(TypeError, match="VmapBatch: got train='False'; expected True or False"):
        network.apply(variables, x, train="False")
    with pytest.raises(
        ValueError, match=r"VmapBatch: got a mask with the weight -0\.5; expected finite weights of zero"
    ):
        network.apply(variables, x, train=True, mask=jnp.ones(8).at[3].set(-0.5), mutable=["batch_stats"])


def test_complex_example():
    """Spatial axes, lifted; padded, too."""

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x, *, train, mask=None):
            x = nn.Dense(3, use_bias=False, dtype=jnp.complex64, name="dense")(x)
            return BatchNorm(momentum=0.0, name="norm")(x, train=train, mask=mask)

    x = (normal(6, 4, 4, 2) + 1j * normal(6, 4, 4, 2, seed=1)).astype(np.complex64)
    network, mask = VmapBatch(Network()), np.arange(6) < 5
    variables = jit(partial(network.init, train=True))(jax.random.key(0), x)
    y, updates = train(network, variables, np.where(mask[:, None, None, None], x, np.complex64(np.nan)), mask)
    want, want_updates = train(network, variables, x[:5])
    assert_close((y[:5], updates), (want, want_updates), 2e-6)
    hidden = np.asarray(x[:5]) @ variables["params"]["dense"]["kernel"]
    var = (np.abs(hidden - hidden.mean((0, 1, 2))) ** 2).mean((0, 1, 2))
    assert error(updates["batch_stats"]["norm"]["var"], var, relative=True) < 1e-6


def test_too_few_axes():
    with pytest.raises(ValueError, match=r"got x of shape \(4,\).*\('group', 'batch'\)"):
        VmapBatch(MLP(**SIZES), axis_name=("group", "batch")).init(jax.random.key(0), jnp.ones(4), train=False)


def test_kernels_of_a_standard_deviation():
    network = MLP(hidden=(300, 200), num_classes=100, norm=None, kernel_std=0.05)
    variables = jit(partial(network.init, train=False))(jax.random.key(0), jnp.ones(400))
    kernels = [layer["kernel"] for layer in variables["params"].values()]
    assert [kernel.shape for kernel in kernels] == [(400, 300), (300, 200), (200, 100)]
    for kernel in kernels:  # its standard error is std / sqrt(2 n)
        np.testing.assert_allclose(np.std(kernel), 0.05, rtol=4 / np.sqrt(2 * kernel.size))
        np.testing.assert_allclose(np.mean(kernel), 0, atol=4 * 0.05 / np.sqrt(kernel.size))


class Denses(nn.Module):
    """The dense layers of `MLP(**SIZES)` alone, as flax initialises them."""

    @nn.compact
    def __call__(self, x):
        for i, width in enumerate(SIZES["hidden"]):
            x = nn.Dense(width, use_bias=False, name=f"dense_{i}")(x)
        return nn.Dense(SIZES["num_classes"], name="logits")(x)


def test_kernels_are_those_of_flax_by_default():
    expected = jit(Denses().init)(jax.random.key(3), jnp.ones(4))["params"]
    got = jit(partial(MLP(**SIZES).init, train=False))(jax.random.key(3), jnp.ones(4))["params"]
    for name, leaves in expected.items():
        np.testing.assert_array_equal(got[name]["kernel"], leaves["kernel"])


@pytest.mark.parametrize("name", NETWORKS)
def test_inputs_of_the_sigmoids_are_sown(name):
    """As the layers before them give them; and only for who asks."""
    network, x = NETWORKS[name], normal(7, 4)
    variables = init(network, x)
    _, kept = jit(partial(network.apply, train=False, capture_intermediates=True))(variables, x)
    kept, last = kept["intermediates"], "dense" if name == "plain" else "norm"
    for i, width in enumerate(SIZES["hidden"]):
        (sown,), (given,) = kept[f"pre_activation_{i}"], kept[f"{last}_{i}"]["__call__"]
        assert sown.shape == (7, width)
        np.testing.assert_array_equal(sown, given)
    assert set(variables) <= {"params", "batch_stats"}
