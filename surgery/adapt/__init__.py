"""An adapter of the dense model, carried onto a folder that was cut from it."""
