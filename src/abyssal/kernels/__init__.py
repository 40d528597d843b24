"""The few operations that decide the speed, each with a plain reference beside it. Tensors in, tensors out."""
