"""The engines, one file each: fx, pt2e and onnx; each turns a cleaned-up fp32 module into a `QuantizedModel`."""
