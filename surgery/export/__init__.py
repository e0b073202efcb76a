"""Checkpoints in the file formats of other runtimes: GGUF, which llama.cpp loads."""
