"""The embedded world: procedurally rendered subjects with known masks, identity, pose, background and captions.

`world` names what can be seen, `render` draws it, `write` lays it on disk in the raw layouts of the real sets.
"""
