"""The world of faces: parametric people under view, light, expression, clothes, scene and style.

`people` defines who and what can be seen, and its captions; `head` is their distance function; `prompts` are what one
asks for; `layouts` writes it to disk in the raw layouts of the real sets.
"""
