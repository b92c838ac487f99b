"""Trains the face recogniser that measures: another network, on other people, by another loss than `face`."""

import sys

from runtime.cli import guarded
from train.toybox.models.face import METRIC, train

if __name__ == "__main__":
    guarded(lambda: train(METRIC, sys.argv[1:]))
