"""Speed and memory of a checkpoint in transformers, llama.cpp and vLLM, each run in a process of its own."""
