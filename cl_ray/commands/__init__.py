"""The commands of `cl-ray`: a module each, whose function `command` takes the flags."""
