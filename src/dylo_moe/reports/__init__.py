"""Tables and figures of results, for the terminal and for files."""
