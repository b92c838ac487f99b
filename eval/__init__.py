"""DreamBench: generate pictures of held-out subjects, score them, report."""
