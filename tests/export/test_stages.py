import itertools

import pytest

from vit_jax.errors import UserError
from vit_jax.export.stages import CONVERTERS, PACKAGES, obstacles, resolve

OLD, NEW = ("0.7.1", True), ("0.12.0", False)
# README has it without -e, which is for a clone that is changed.
HINT = r"pip install -e '\.\[export-newest\]' && pip install --no-deps jax2onnx"
ONNX = {"onnx", "onnx_ir", "onnxscript", "onnxruntime"}
STAGES = [None, ["tf"], ["onnx"], ["tf", "onnx"], ["tf", "onnx", "tensorrt"]]


def can(jax, missing, stage, converter):
    """By the README: what each stage needs of JAX and of packages."""
    graphs = jax is OLD and "tensorflow" not in missing
    if stage == "tf":
        return graphs
    return not ONNX & missing and (
        (converter in (None, "jax2tf") and graphs and "tf2onnx" not in missing)
        or (converter in (None, "jax2onnx") and "jax2onnx" not in missing)
    )


@pytest.mark.parametrize("jax", [OLD, NEW], ids=["0.7.1", "newest"])
@pytest.mark.parametrize("converter", [None, *CONVERTERS])
@pytest.mark.parametrize("needs_onnx", [False, True])
def test_what_was_asked_for_is_done_or_refused_and_the_default_is_what_can_be(
    jax, converter, needs_onnx
):
    subsets = itertools.chain.from_iterable(
        itertools.combinations(PACKAGES, n) for n in range(len(PACKAGES) + 1)
    )
    for missing, stages in itertools.product(map(set, subsets), STAGES):
        asked = [s for s in stages or () if s != "tensorrt"]
        default = ["onnx"] if converter == "jax2onnx" else ["tf", "onnx"]
        possible = [s for s in asked or default if can(jax, missing, s, converter)]
        if asked:
            fails = possible != asked
        else:
            fails = not possible or ((converter or needs_onnx) and "onnx" not in possible)
        arguments = stages, converter, obstacles(*jax, missing)
        if fails:
            with pytest.raises(UserError, match=r"^stage (tf|onnx): .*: pip install") as error:
                resolve(*arguments, needs_onnx=needs_onnx)
            assert "\n" not in str(error.value)
            continue
        found = resolve(*arguments, needs_onnx=needs_onnx)
        assert list(found.stages) == possible
        assert len(found.left_out) == len(asked or default) - len(possible)
        if "onnx" in possible:
            assert converter in (None, found.converter)
            assert can(jax, missing, "onnx", found.converter)


def test_the_newest_jax_with_jax2onnx_makes_the_onnx_file_and_says_what_it_leaves_out():
    found = resolve(None, None, obstacles(*NEW, {"tf2onnx"}))
    assert (found.stages, found.converter) == (("onnx",), "jax2onnx")
    (line,) = found.left_out
    assert line == (
        "left out: the SavedModel, since JAX 0.12.0 emits no TensorFlow graph; to have it "
        "pip install -e '.[export]' (jax==0.7.1)"
    )


def test_jax_0_7_1_makes_both_by_jax2tf_and_leaves_nothing_out():
    assert resolve(None, None, obstacles(*OLD, set())) == (("tf", "onnx"), "jax2tf", ())
    assert resolve(None, None, obstacles(*OLD, {"tf2onnx"}))[1] == "jax2onnx"


@pytest.mark.parametrize(
    "stages, converter, jax, missing, message",
    [
        (["tf"], None, NEW, (), "stage tf: JAX 0.12.0 emits no .* or use --stages onnx"),
        (None, "jax2tf", NEW, (), "stage onnx: JAX 0.12.0 .* or use --converter jax2onnx"),
        (None, None, NEW, ["jax2onnx"], f"stage onnx: jax2onnx is not installed: {HINT}$"),
        (None, "jax2onnx", OLD, ["jax2onnx"], "jax2onnx is not .* or use --converter jax2tf"),
        (["onnx"], None, OLD, ["tf2onnx", "jax2onnx"], r"tf2onnx is not installed: .*\[export\]"),
        (["onnx"], None, NEW, ["onnxruntime"], f"onnxruntime is not installed: {HINT}"),
    ],
)
def test_a_refusal_names_what_is_missing_and_the_way_out(stages, converter, jax, missing, message):
    with pytest.raises(UserError, match=message):
        resolve(stages, converter, obstacles(*jax, missing))
