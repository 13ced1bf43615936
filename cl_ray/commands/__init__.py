"""The verbs of `cl-ray`, a module each, with a function `command` that takes the flags."""
