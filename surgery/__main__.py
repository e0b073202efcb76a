"""`python -m surgery` is the `surgeon` command."""

from surgery.cli.main import main

main()
