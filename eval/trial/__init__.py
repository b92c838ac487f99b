"""Whether similarity metrics measure identity: trials on photos whose subject and view are known."""
