"""What the network's own code raises for bad input."""


class ModelError(ValueError):
    """Bad weights, configuration or input; the message is one sentence that says what was found, where, what to do."""
