"""Foundation of all packages: errors, parameters, stages, the command line, files, locks, progress."""
