"""From a checkpoint to an engine: `to_tf`, `to_onnx`, `to_tensorrt`; `parity` checks each stage."""
