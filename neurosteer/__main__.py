"""`python -m neurosteer` does what the command `neurosteer` does."""

from neurosteer.cli import main

if __name__ == "__main__":
    main()
