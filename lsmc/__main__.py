"""`python -m lsmc`: the command line, as torchrun starts it."""

from lsmc.cli import main

if __name__ == "__main__":
    main()
