"""The one door to photos: roots, archives, decoding, a subject cut out by its mask, prefetching."""
