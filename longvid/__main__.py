"""`python -m longvid`: the command line."""

from longvid.cli import main

if __name__ == "__main__":
    main()
