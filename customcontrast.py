"""Entry point of the `customcontrast` command: the launcher that `make` installs runs this file."""

from runtime.cli import main

if __name__ == "__main__":
    main()
