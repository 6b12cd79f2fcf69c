"""``python -m rconv_fast``: the command line."""

from rconv_fast.cli import main

if __name__ == "__main__":
    main()
