"""``python -m abyssal`` is the command line."""

from abyssal.cli import main

if __name__ == "__main__":
    main()
