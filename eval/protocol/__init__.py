"""The evaluation protocol: subjects, references, prompts, seeds, and its id."""
