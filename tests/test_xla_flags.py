import functools

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import pytest

from vit_jax.analysis.attention import rollout
from vit_jax.analysis.intermediates import attention_weights
from vit_jax.doctor import reference
from vit_jax.models import create_model, model_config
from vit_jax.state import TrainState, adam
from vit_jax.steps import classification, train_step
from vit_jax.xla_flags import WITHOUT_XNNPACK, compiler_options, has_stale_weights

from .stale_weights import PRODUCT, errors_by_itself, need_fault, run

FAULTY = has_stale_weights(jaxlib.__version__)
only_faulty = pytest.mark.skipif(not FAULTY, reason="this jaxlib multiplies rightly by itself")
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(64, 32, 32, 3)).astype(np.float32)
LABELS = RNG.integers(1000, size=64).astype(np.int32)
MODEL = create_model({**model_config("ViT-B/16"), "num_layers": 1}, num_classes=1000)


@pytest.mark.parametrize(
    ("version", "faulty"),
    [("0.7.1", True), ("0.7.2", True), ("0.8.1", True), ("0.8.1.dev1", True), ("0.8.2", False)]
    + [("0.9.0.1", False), ("0.10.2", False), ("0.12.0.1", False), ("1.0", False)],
)
def test_versions_with_the_fault(version, faulty):
    assert has_stale_weights(version) == faulty


@pytest.mark.parametrize(
    "imports",
    [
        "import vit_jax",
        # Where nothing is set they are no other.
        pytest.param("import jax; import vit_jax", marks=only_faulty),
        pytest.param("import vit_jax.models.vit", marks=only_faulty),
    ],
)
def test_weights_that_are_updated_in_place_are_multiplied_by(imports):
    done = run(imports + PRODUCT)
    errors = [float(line) for line in done.stdout.split()]
    assert len(errors) == 4, done.stderr
    assert max(errors) < 1e-5


def test_without_vit_jax_this_jaxlib_is_wrong():
    need_fault()
    errors = errors_by_itself()
    assert errors[0] < 1e-5
    assert min(errors[1:]) > 0.1


def test_too_late_is_one_line_again_and_again():
    need_fault()
    code = """
import jax; jax.devices()
for _ in range(2):
    try:
        import vit_jax
    except ValueError as error:
        print(error)
"""
    lines = run(code).stdout.splitlines()
    assert len(lines) == 2
    assert all("before vit_jax was imported" in line for line in lines)
    assert all(f"start it with XLA_FLAGS={WITHOUT_XNNPACK}" in line for line in lines)


def test_a_flag_that_comes_too_late_does_not_hide_the_fault():
    need_fault()
    code = f"""
import jax, os; jax.devices()
os.environ["XLA_FLAGS"] = "{WITHOUT_XNNPACK}"
try:
    import vit_jax
except ValueError as error:
    print(error)
"""
    assert "before vit_jax was imported" in run(code).stdout


@only_faulty
def test_who_has_set_the_flag_may_import_at_any_time():
    done = run("import jax; jax.devices(); import vit_jax" + PRODUCT, flags=WITHOUT_XNNPACK)
    assert max(map(float, done.stdout.split())) < 1e-5


@only_faulty
def test_the_last_word_on_xnnpack_is_no():
    flags = f"{WITHOUT_XNNPACK} {WITHOUT_XNNPACK.replace('false', 'true')}"
    done = run("import vit_jax" + PRODUCT, flags)
    assert max(map(float, done.stdout.split())) < 1e-5


def test_a_file_of_flags_is_read(tmp_path):
    (tmp_path / "flags").write_text("--xla_force_host_platform_device_count=3\n")
    code = "import vit_jax, jax; print(jax.device_count())"
    assert run(code, str(tmp_path / "flags")).stdout.split() == ["3"]


def test_other_flags_are_kept():
    code = "import vit_jax, jax, os; print(jax.device_count(), os.environ['XLA_FLAGS'])"
    flags = "--xla_force_host_platform_device_count=3"
    assert run(code, flags).stdout.split() == ["3", flags, *[WITHOUT_XNNPACK] * FAULTY]


def test_six_steps_lose_what_they_lose_in_64_bits():
    init = jax.jit(MODEL.init)(jax.random.key(0), np.zeros((1, 32, 32, 3)))["params"]
    optimizer = adam(lambda _: 1e-3, b1=0.9, b2=0.999, weight_decay=0.0, decay="all",
                     mu_dtype="float32", clip_norm=0.0)  # fmt: skip
    state = TrainState(jnp.zeros((), jnp.int32), init, optimizer.init(init), None,
                       jax.random.key(1))  # fmt: skip
    exact = losses_in_64_bits(jax.tree.map(lambda x: np.asarray(x, np.float64), init), steps=6)
    step = jax.jit(
        functools.partial(
            train_step, objective=classification(MODEL, "softmax"), optimizer=optimizer
        ),
        donate_argnums=0,
    )
    losses = []
    for _ in range(6):
        state, metrics = step(state, {"image": jnp.asarray(IMAGES), "label": jnp.asarray(LABELS)})
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses, exact, atol=1e-4)
    assert losses[0] == pytest.approx(np.log(1000), abs=1e-4)  # The head starts at zero.
    assert losses[-1] < losses[0] - 1


def losses_in_64_bits(params, steps):
    """Adam (Kingma & Ba, 2015, Algorithm 1) with the gradients of `doctor.reference`."""
    mean = variance = jax.tree.map(np.zeros_like, params)
    losses = []
    for t in range(1, steps + 1):
        loss, gradients = reference.loss(params, IMAGES.astype(np.float64), LABELS)
        grads = gradients()
        losses.append(loss)
        mean = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, mean, grads)
        variance = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, variance, grads)
        params = jax.tree.map(
            lambda p, m, v, t=t: (
                p - 1e-3 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
            ),
            params,
            mean,
            variance,
        )
    return losses


def test_a_model_that_is_looked_into_gives_the_same_at_every_call():
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
    params = jax.eval_shape(MODEL.init, jax.random.key(0), images)["params"]
    for seed in range(2):  # Other images, and other weights where the last ones lay.
        rng = np.random.default_rng(seed)
        params = jax.tree.map(
            lambda x, rng=rng: np.asarray(rng.normal(size=x.shape) / 20, np.float32), params
        )
        images = rng.normal(size=IMAGES.shape).astype(np.float32)
        expected = weights_in_64_bits(params, images)
        weights = attention_weights(MODEL, params, images)[:, 0]
        np.testing.assert_allclose(weights, expected, atol=1e-5)
        mixed = expected.mean(1) + np.eye(5)
        mixed /= mixed.sum(-1, keepdims=True)
        np.testing.assert_allclose(rollout(weights[:, None]), mixed, atol=1e-5)
        # Operation by operation, too, as whoever calls the module itself does.
        logits = MODEL.apply({"params": params}, images)
        exact, _ = reference.logits(to_64_bits(params), images.astype(np.float64))
        np.testing.assert_allclose(logits, exact, atol=1e-5 * np.abs(exact).max())


def to_64_bits(params):
    return jax.tree.map(lambda x: x.astype(np.float64), params)


def weights_in_64_bits(params, images):
    """Eq. 6 of the first layer, [batch, heads, tokens, tokens], one head at a time."""
    params = to_64_bits(params)
    block = params["Transformer"]["encoderblock_0"]
    patches = images.reshape(-1, 2, 16, 2, 16, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 4, 768)
    x = patches @ params["embedding"]["kernel"].reshape(768, 768) + params["embedding"]["bias"]
    z = np.concatenate([np.repeat(params["cls"], len(x), 0), x], 1)
    z = z + params["Transformer"]["posembed_input"]["pos_embedding"]
    z = (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + 1e-6)
    z = z * block["LayerNorm_0"]["scale"] + block["LayerNorm_0"]["bias"]
    heads = []
    for h in range(12):
        q, k = (
            z @ p["kernel"][:, h] + p["bias"][h]
            for p in (block["MultiHeadDotProductAttention_1"][n] for n in ("query", "key"))
        )
        scores = np.exp(q @ k.swapaxes(1, 2) / 8)
        heads.append(scores / scores.sum(-1, keepdims=True))
    return np.stack(heads, 1)


def test_every_option_of_the_compiler_is_one_that_this_jax_has(monkeypatch):
    """Those for GPUs can be given to any of its compilers, which refuse what they do not know."""
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    options = compiler_options("gpu")
    assert options
    assert jax.jit(lambda x: x + 1, compiler_options=options)(1) == 2
    with pytest.raises(Exception, match="No such compile option: 'xla_gpu_none'"):
        jax.jit(lambda x: x + 1, compiler_options={"xla_gpu_none": True})(1)
    assert compiler_options("cpu") == compiler_options("tpu") == {}


def test_what_a_user_sets_is_left_alone(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=true")
    assert "xla_gpu_enable_triton_gemm" not in compiler_options("gpu")
