"""What every room stands on: errors, parameters, stages, the command line, files, locks, progress."""
