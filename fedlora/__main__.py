"""`python -m fedlora`: the command, where its script is not on the path."""

from fedlora.cli import main

if __name__ == "__main__":
    main()
