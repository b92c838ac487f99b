"""The small backbones, a module each: built, trained, exported, measured."""
