import json

import pytest

from vit_jax.export.engine_report import attention_report, report

# Layers as TensorRT 10 prints them with detailed verbosity, in its order of keys, shortened.
FUSED = [
    {"Name": "__myl_Fc_myl0_0", "LayerType": "kgen", "TacticName": "__myl_Fc_0x1"},
    {
        "Name": "_gemm_mha_v2_myl0_6",
        "LayerType": "kgen",
        "TacticName": "_gemm_mha_v2_0xdeadbeef",
        "Metadata": "[ONNX Layer: Transformer/encoderblock_0/Softmax]",
    },
    {
        "Name": "encoderblock_0/fused_mha/Softmax_myl0_7",
        "LayerType": "gemm",
        "TacticName": "sm90_xmma_gemm",
    },
]
UNFUSED = [
    {"Name": "__myl_MaxSubExpSumDivMul_myl0_5", "LayerType": "kgen", "TacticName": "__myl_0x2"},
    {"Name": "head", "LayerType": "SoftMax", "TacticName": "softmax_cuda"},
]


@pytest.mark.parametrize(
    "layers, softmaxes, heads, fused",
    [
        (FUSED, 1, 0, True),
        (FUSED + UNFUSED, 3, 0, False),
        (UNFUSED, 2, 0, False),
        (FUSED + UNFUSED[1:], 2, 1, True),
        (FUSED, 2, 0, None),
        (["{ForeignNode[Transformer/Softmax...head]}"], 12, 0, None),
        (FUSED[:1], 0, 0, None),
    ],
)
def test_fused_attention_is_told_from_the_layers(layers, softmaxes, heads, fused):
    assert attention_report(layers, softmaxes, heads)["fused"] is fused


POOLING = {"model": json.dumps({"classifier": "map"}), "loss": "softmax"}


@pytest.mark.parametrize(
    ("layers", "softmaxes", "output", "metadata", "fused"),
    [
        # A layer whose attention is fused, and pooling that is not.
        (FUSED + UNFUSED[:1], 2, "logits", POOLING, True),
        (FUSED + UNFUSED[:1], 2, "logits", {}, False),
        (FUSED + UNFUSED[:1], 2, "logits", {"model": json.dumps({"classifier": "gap"})}, False),
        (FUSED + UNFUSED, 3, "probabilities", POOLING, True),
        (UNFUSED + UNFUSED, 4, "probabilities", POOLING, False),
        (FUSED + FUSED[1:2], 2, "logits", POOLING, True),
        # Probabilities of a sigmoid are no softmax.
        (UNFUSED[:1], 1, "probabilities", {"loss": "sigmoid"}, False),
        (UNFUSED[:1], 1, "probabilities", {"loss": "softmax"}, None),
        # A stranger's.
        (FUSED, 1, "logits", {"model": "{"}, True),
        (FUSED, 1, "logits", {"model": "[" * 100_000}, True),
        (FUSED, 1, "logits", {"model": "[1]"}, True),
    ],
)
def test_the_softmax_of_pooling_and_of_probabilities_is_no_layers(
    layers, softmaxes, output, metadata, fused
):
    found = report(layers, [{"name": output}], softmaxes, metadata)
    assert found["attention"]["fused"] is fused
