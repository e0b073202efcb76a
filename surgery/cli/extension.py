"""`hf surgeon`: the console script that the `hf` command line runs as its extension of that name."""

from __future__ import annotations

from surgery.cli.main import main as surgeon


def main() -> None:
    """Run `surgeon` under the name that the user typed."""
    surgeon(prog_name="hf surgeon")


if __name__ == "__main__":
    main()
