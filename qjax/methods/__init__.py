"""How a float model becomes a quantized one."""
