"""`longvid bench film`, as a script: the same options, `python benchmarks/film.py --json`."""

import sys

from longvid.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["bench", "film"]
    main()
