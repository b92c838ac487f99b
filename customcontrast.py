"""The command of this checkout, `customcontrast`: what `make` puts into the environment runs this file."""

from runtime.cli import main

if __name__ == "__main__":
    main()
