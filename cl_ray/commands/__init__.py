"""The verbs of the `cl-ray` command, one file each; each has a `command(arguments)`."""
