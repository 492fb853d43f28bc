"""The recipe of the bundled models: text to tokens to a trained checkpoint, through the forward pass that serves."""
