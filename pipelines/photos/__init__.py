"""The only access to photos: roots, archives, decoding, segments, prefetching."""
