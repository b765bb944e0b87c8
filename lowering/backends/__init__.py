"""One module per kind of code that is emitted."""
