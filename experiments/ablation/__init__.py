"""The paper's tables on the toybox: what is run, its results, and the page written from them."""
