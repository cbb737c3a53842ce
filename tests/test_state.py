import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vit_jax.errors import UserError
from vit_jax.models import create_model
from vit_jax.state import create_optimizer, create_schedule, create_state, init_train_state

ADAM = {"name": "adam", "b1": 0.9, "b2": 0.999, "weight_decay": 0.3, "decay": "all",
        "mu_dtype": "float32", "clip_norm": 0.0}  # fmt: skip
SGD = {"name": "sgd", "momentum": 0.9, "weight_decay": 0.0, "decay": "all",
       "mu_dtype": "float32", "clip_norm": 0.0}  # fmt: skip
# With decays and a floor that two steps reach, axes of 32 and more, and shorter ones.
ADAFACTOR = {"name": "adafactor", "momentum": 0.9, "decay_rate": 0.8, "b2": 0.5, "clip_norm": 0.0,
             "weight_decay": 0.3, "decay": "kernels", "mu_dtype": "float32"}  # fmt: skip
PARAMS = {"layer": {"kernel": jnp.array([[1.0, -2.0], [3.0, 0.5]]), "bias": jnp.array([0.5, 2.0])}}
GRADS = [
    jax.tree.map(lambda p, k=k: jnp.sin(k + 1.0 + 3 * p), PARAMS) for k in range(3)
]  # Anything that is not constant.


def steps(config, schedule=lambda count: 0.1 / (1 + count)):
    optimizer = create_optimizer(config, schedule)
    params, state = PARAMS, optimizer.init(PARAMS)
    for grads in GRADS:
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def numpy_adam(p, grads, weight_decay):
    m = v = np.zeros_like(p)
    for t, g in enumerate(grads):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        direction = m / (1 - 0.9 ** (t + 1)) / (np.sqrt(v / (1 - 0.999 ** (t + 1))) + 1e-8)
        p = p - 0.1 / (1 + t) * (direction + weight_decay * p)
    return p


@pytest.mark.parametrize(("decay", "bias_decay"), [("all", 0.3), ("kernels", 0.0)])
def test_adam_decays_weights_decoupled_and_times_the_learning_rate(decay, bias_decay):
    params, _ = steps(ADAM | {"decay": decay})
    for name, weight_decay in (("kernel", 0.3), ("bias", bias_decay)):
        grads = [np.asarray(g["layer"][name], np.float64) for g in GRADS]
        p = np.asarray(PARAMS["layer"][name], np.float64)
        expected = numpy_adam(p, grads, weight_decay)
        np.testing.assert_allclose(params["layer"][name], expected, rtol=1e-5)


def test_kernels_decay_at_any_depth_under_sgd_too():
    layer = {name: jnp.array(2.0) for name in ("kernel", "bias", "scale")}
    params = {"head": layer, "block": {"deeper": {"layer": layer}}, "kernel": jnp.array(2.0)}
    optimizer = create_optimizer(SGD | {"weight_decay": 0.3, "decay": "kernels"}, lambda _: 0.1)
    still = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(still, optimizer.init(params), params)
    decayed = {"kernel": -0.1 * 0.3 * 2.0, "bias": 0.0, "scale": 0.0}
    expected = {"head": decayed, "block": {"deeper": {"layer": decayed}}, "kernel": -0.06}
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), updates, expected)


def test_sgd_has_heavy_ball_momentum():
    params, _ = steps(SGD)
    p, trace = np.asarray(PARAMS["layer"]["bias"], np.float64), 0.0
    for t, grads in enumerate(GRADS):
        trace = 0.9 * trace + np.asarray(grads["layer"]["bias"], np.float64)
        p = p - 0.1 / (1 + t) * trace
    np.testing.assert_allclose(params["layer"]["bias"], p, rtol=1e-6)


@pytest.mark.parametrize("config", [ADAM, SGD])
def test_gradients_are_clipped_at_their_global_norm_before_they_make_moments(config):
    params, _ = steps(config | {"clip_norm": 0.5})
    norms = [np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(x))) for x in GRADS]
    assert min(norms) > 0.5 and np.ptp(norms) > 0.1  # Each is scaled down, by its own factor.
    p = np.asarray(PARAMS["layer"]["bias"], np.float64)
    grads = [
        np.asarray(x["layer"]["bias"], np.float64) * 0.5 / norm
        for x, norm in zip(GRADS, norms, strict=True)
    ]
    if config is ADAM:
        expected = numpy_adam(p, grads, 0.3)
    else:
        # Unrolled: gradient k counts 1, 0.9 and 0.81 in the steps from k on.
        rates = [0.1, 0.1 / 2, 0.1 / 3]
        weights = [sum(rates[t] * 0.9 ** (t - k) for t in range(k, 3)) for k in range(3)]
        expected = p - sum(weight * grad for weight, grad in zip(weights, grads, strict=True))
    np.testing.assert_allclose(params["layer"]["bias"], expected, rtol=1e-5)


@pytest.mark.parametrize("config", [ADAM, ADAFACTOR, SGD])
def test_the_first_moment_can_be_bfloat16(config):
    _, state = steps(config | {"mu_dtype": "bfloat16"})
    dtypes = [x.dtype for x in jax.tree.leaves(state) if x.size > 1]
    moments = 1 if config is SGD else 2
    assert sorted(map(str, dtypes)) == ["bfloat16"] * 2 + ["float32"] * 2 * (moments - 1)


@pytest.mark.parametrize(
    ("shape", "rows", "columns"),
    # Kept are means over one of the two longest axes each, if both have 32; else all elements.
    [((40, 33), 0, 1), ((32, 2, 48), 0, 2), ((3, 31, 50), None, None), ((64,), None, None)],
)
def test_adafactor_is_its_formulas(shape, rows, columns):
    draw = np.random.default_rng(0).normal
    p, *grads = (draw(size=shape) for _ in range(4))
    optimizer = create_optimizer(ADAFACTOR, lambda count: 0.1 / (1 + count))
    params = {"kernel": jnp.float32(p)}
    state, m, v = optimizer.init(params), 0.0, [0.0, 0.0]
    moments = sum(x.size for x in jax.tree.leaves(state) if x.size > 1)
    for t, g in enumerate(grads):
        updates, state = optimizer.update({"kernel": jnp.float32(g)}, state, params)
        params = optax.apply_updates(params, updates)
        # Shazeer and Stern's Algorithm 4, whose decay is 0 in the first step.
        decay = min(1 - (t + 1) ** -0.8, 0.5)
        squares = (
            [g**2] if rows is None else [(g**2).mean(x, keepdims=True) for x in (rows, columns)]
        )
        v = [decay * x + (1 - decay) * y for x, y in zip(v, squares, strict=False)]
        second = v[0] if rows is None else v[0] * v[1] / v[0].mean(columns, keepdims=True)
        m = 0.9 * m + 0.1 * g / np.sqrt(second)
        p = p - 0.1 / (1 + t) * (m + 0.3 * p)
        np.testing.assert_allclose(params["kernel"], p, rtol=2e-5, atol=1e-6)
    assert moments == p.size + sum(x.size for x in v)


def test_an_unknown_decay_mask_is_refused():
    with pytest.raises(UserError, match="optimizer.decay 'weights' is unknown"):
        create_optimizer(ADAM | {"decay": "weights"}, lambda count: 1.0)


def schedule(decay, end_lr=0.0, **options):
    return create_schedule(
        base_lr=0.4, decay=decay, warmup_steps=10, total_steps=110, end_lr=end_lr, **options
    )


def test_warmup_is_linear_from_zero():
    np.testing.assert_allclose([schedule("cosine")(t) for t in (0, 5, 10)], [0, 0.2, 0.4])


@pytest.mark.parametrize("end", [0.0, 0.1])
def test_cosine_decay_ends_at_its_end(end):
    expected = [end + (0.4 - end) * (1 + np.cos(np.pi * t)) / 2 for t in (0.25, 0.5, 1.0, 1.0)]
    values = [schedule("cosine", end)(t) for t in (35, 60, 110, 200)]
    np.testing.assert_allclose(values, expected, atol=1e-7)


def test_linear_decay_ends_at_its_end():
    values = [schedule("linear", end_lr=1e-5)(t) for t in (60, 110, 200)]
    np.testing.assert_allclose(values, [(0.4 + 1e-5) / 2, 1e-5, 1e-5], rtol=1e-3)


def test_rsqrt_halves_in_three_timescales_and_cools_down_to_zero():
    plain = schedule("rsqrt", timescale_steps=20)
    np.testing.assert_allclose([plain(t) for t in (5, 10, 70, 109)], 0.4 / np.sqrt([4, 1, 4, 5.95]))
    cooled = schedule("rsqrt", timescale_steps=20, cooldown_steps=40)
    found = [cooled(t) for t in (70, 80, 100, 109, 110, 200)]
    expected = [0.4 / np.sqrt(1 + (t - 10) / 20) * (110 - t) / 40 for t in (70, 80, 100, 109)]
    np.testing.assert_allclose(found, [*expected, 0, 0], rtol=1e-6)


def test_bits_hyper_rule_drops_at_30_60_and_90_percent_of_all_steps():
    # Of a data set with less than 20,000 images: 500 steps, 100 of them warm-up.
    rate = create_schedule(
        base_lr=0.003, decay="staircase", warmup_steps=100, total_steps=500, end_lr=0.0
    )
    # Its code asks whether the step is above a drop: at the drop itself the rate is as before.
    found = [rate(t) for t in (50, 100, 150, 151, 300, 301, 450, 451, 499)]
    expected = [1.5e-3, *[3e-3] * 2, *[3e-4] * 2, *[3e-5] * 2, *[3e-6] * 2]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_drops_are_where_they_are_set():
    # The published hyper-rule has 200, 300 and 400 of 500 steps.
    rate = create_schedule(base_lr=1.0, decay="staircase", warmup_steps=0, total_steps=500,
                           end_lr=0.0, drops=(0.4, 0.6, 0.8))  # fmt: skip
    assert [t for t in range(1, 500) if float(rate(t)) < float(rate(t - 1))] == [201, 301, 401]


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_any_decay_may_cool_down(decay):
    expected = [schedule(decay)(t) * share for t, share in ((60, 1), (90, 1), (100, 0.5), (110, 0))]
    found = [schedule(decay, cooldown_steps=20)(t) for t in (60, 90, 100, 110)]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_cooldown_that_begins_in_the_warmup_is_refused():
    schedule("rsqrt", cooldown_steps=100)
    with pytest.raises(
        UserError, match="schedule.cooldown is 101 steps but the run has 110, of wh"
    ):
        schedule("rsqrt", cooldown_steps=101)


def test_no_warmup_starts_at_the_base_rate():
    rate = create_schedule(base_lr=0.4, decay="linear", warmup_steps=0, total_steps=9, end_lr=0.0)
    assert rate(0) == pytest.approx(0.4)


@pytest.mark.parametrize("warmup", [10, 11])
def test_a_warmup_as_long_as_the_run_is_refused(warmup):
    with pytest.raises(UserError, match=f"schedule.warmup is {warmup} steps but the run has 10"):
        create_schedule(
            base_lr=1.0, decay="linear", warmup_steps=warmup, total_steps=10, end_lr=0.0
        )


def test_an_unknown_decay_is_refused():
    with pytest.raises(UserError, match="schedule.decay 'step' is unknown"):
        schedule("step")


MODEL = create_model(
    {"architecture": "vit", "patch_size": 4, "hidden_size": 8, "num_layers": 1, "mlp_dim": 8,
     "num_heads": 2, "num_classes": 3}
)  # fmt: skip


def initial(seed, average=True):
    optimizer = create_optimizer(ADAM, lambda count: 1.0)
    return init_train_state(MODEL, optimizer, seed=seed, image_size=8, average=average)


fresh = jax.jit(initial)


def test_the_seed_decides_parameters_and_randomness():
    first, same, other = fresh(0), fresh(0), fresh(1)
    kernel = [state.params["embedding"]["kernel"] for state in (first, same, other)]
    np.testing.assert_array_equal(kernel[0], kernel[1])
    assert not np.allclose(kernel[0], kernel[2])
    keys = [jax.random.key_data(state.rng) for state in (first, same, other)]
    assert np.array_equal(keys[0], keys[1])
    assert not np.array_equal(keys[0], keys[2])


def test_a_fresh_state_is_at_step_0_and_its_key_is_not_that_of_the_parameters():
    state = fresh(0)
    assert (state.step.dtype, int(state.step)) == (jnp.int32, 0)
    drawn = jax.jit(MODEL.init)(state.rng, np.zeros((1, 8, 8, 3)))["params"]
    assert not np.allclose(drawn["embedding"]["kernel"], state.params["embedding"]["kernel"])


def test_the_average_is_evaluated_where_there_is_one():
    with_average, without = (
        jax.eval_shape(functools.partial(initial, 0, average)) for average in (True, False)
    )
    assert without.eval_params is without.params
    assert with_average.eval_params is with_average.ema_params


def aligned(shape, value):
    """An array that JAX would take as it lies, without a copy: it begins at a multiple of 64."""
    raw = np.zeros(4 * int(np.prod(shape)) + 64, np.uint8)
    start = -raw.ctypes.data % 64
    array = raw[start : start + 4 * int(np.prod(shape))].view(np.float32).reshape(shape)
    array[:] = value
    return array


def test_parameters_that_are_given_are_in_the_average_too_and_own_their_memory():
    host = jax.tree.map(lambda x: aligned(x.shape, 2.0), jax.eval_shape(initial, 0).params)
    optimizer = create_optimizer(ADAM, lambda count: 1.0)
    create = jax.jit(lambda params: create_state(params, optimizer, seed=0, average=True))
    state = jax.block_until_ready(create(jax.tree.map(jax.device_put, host)))
    for array in jax.tree.leaves(host):
        array[:] = 5.0
    arrays = jax.tree.leaves((state.params, state.ema_params))
    assert len(arrays) == 2 * len(jax.tree.leaves(host))
    assert all(np.all(x == 2.0) for x in arrays)
