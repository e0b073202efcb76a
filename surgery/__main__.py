"""`python -m surgery` is the `surgeon` command."""

from surgery.cli import main

main()
