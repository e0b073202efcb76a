"""Five questions to an index, one line each: two indexes of one model on different texts, and two revisions.

python examples/questions.py index-on-web index-on-code org/name@step-1000 org/name@step-2000
"""

from __future__ import annotations

import sys

import surgery


def opened(name: str) -> surgery.Model:
    """A model named as MODEL or MODEL@REVISION."""
    source, _, revision = name.partition("@")
    return surgery.open_model(source, revision=revision or None)


def main(first: str, second: str, before: str, after: str) -> None:
    """Print the answers, for the model `before` whose indexes on two texts are `first` and `second`."""
    one, other = surgery.ChannelIndex.load(first), surgery.ChannelIndex.load(second)

    print("supernodes in both:", surgery.common_supernodes(one, other))
    print("their share:", surgery.supernode_overlap(one, other))
    print("LP and movement:", surgery.lp_against_movement(one, opened(before), opened(after)).median)
    print("supernodes that are activation outliers:", surgery.supernode_outliers(one))
    print("share of the top 1% in layer 0:", surgery.concentration(one, 0))
    print("layers that differ:", list(surgery.differing_layers(one, other)))


if __name__ == "__main__":
    main(*sys.argv[1:5])
