"""Methods that change a layer's input before it is quantized, without changing what the model computes."""
