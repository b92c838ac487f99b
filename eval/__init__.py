"""DreamBench: generate images of held-out subjects, score them, report."""
