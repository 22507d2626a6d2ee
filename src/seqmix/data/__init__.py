"""Text: reading it, splitting it, turning it into tokens, and packing tokens into windows."""
