"""`python -m cl_ray` is `cl-ray`."""

from cl_ray.cli import main

if __name__ == "__main__":
    main()
