"""What is evaluated: subjects, references, prompts, seeds, and the id of it all."""
