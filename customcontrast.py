"""Entry point of the `customcontrast` command: the launcher that `make` installs runs this file."""

import os
from pathlib import Path

from runtime.cli import main

if __name__ == "__main__":
    # The processes that a command starts find the code from any working directory, as this one does.
    paths = [str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH")]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    main()
