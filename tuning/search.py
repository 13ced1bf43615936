#!/usr/bin/env python3
"""Search for the balance between G and D; the same as `cl-ray tune`.

python tuning/search.py                                     # a small sweep, minutes on 2 cores
python tuning/search.py --name s1 --trials 16 --epochs 4 --metric linear_probe --seed 3
python tuning/search.py --resume s1 --trials 24             # eight more trials
python tuning/search.py --scheduler pbt --population 4      # population based training
python tuning/search.py --metric frechet --metric linear_probe        # a Pareto front
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a job's checkout is not installed

from cl_ray.tuning.tune import main

if __name__ == "__main__":
    main()
