import pytest

from vit_jax.export.engine_report import attention_report

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
