"""The commands of the `surgeon` command line, one file each; `options` and `session` are what they share."""
