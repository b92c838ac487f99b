"""The page of `customcontrast demo`: the method on your own photos, in a browser on this machine."""
