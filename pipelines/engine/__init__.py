"""The engine of the data stages: items, shards, the work folder, Ray actors, job submission."""
