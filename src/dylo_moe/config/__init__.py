"""The flags of every command as dataclasses, and the parser that fills them."""
