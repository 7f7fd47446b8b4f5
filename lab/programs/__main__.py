"""`python -m lab.programs`: go.mod and go.sum up to date, after a version in go.mod was changed."""

import sys

from lab.programs import tidy
from lab.programs.errors import SetupError

if __name__ == "__main__":
    try:
        tidy(print)
    except SetupError as error:
        sys.exit(f"lab.programs: {error}")
