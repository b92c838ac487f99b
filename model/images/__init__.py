"""From photos and masks to the models' inputs."""
