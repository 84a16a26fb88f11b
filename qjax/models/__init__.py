"""Models as pure functions: config (what it is), transformer (the forward pass), cache, generate."""
