"""Command-line tools; they only parse arguments, call the library and print."""
