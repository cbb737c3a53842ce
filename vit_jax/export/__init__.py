"""From a checkpoint to an engine: `to_tf`, `to_onnx`, `to_tensorrt`, with the parity of each hop."""
