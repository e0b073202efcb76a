"""The frontier of a model: quality against bytes, memory and speed, cut, rounded, healed or left."""
